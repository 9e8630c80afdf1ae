"""Requests share calls of one thread; each gets its own answer, or its own error."""

import threading
from types import SimpleNamespace

import pytest
import torch

from vitlib.deploy import batching
from vitlib.deploy.batching import Batcher, Busy


class Echo:
    """An engine whose logits are a picture's first values; it fails for calls with a 13, and gives NaN for a 99."""

    def __init__(self, pre):
        self.loaded = SimpleNamespace(
            preprocess=pre, device=torch.device("cpu"), dtype=torch.float32, folder=SimpleNamespace(name="echo")
        )
        self.threads, self.sizes = {threading.get_ident()}, []
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()

    def __call__(self, pixels):
        self.entered.set()
        assert self.gate.wait(10)
        self.threads.add(threading.get_ident())
        self.sizes.append(len(pixels))
        rows = (
            255 * (pixels[:, :, 0, 0] * torch.tensor([0.21, 0.24, 0.27]) + torch.tensor([0.31, 0.42, 0.53]))
        ).round()
        if (rows == 13).any():
            raise RuntimeError("no memory for 13")
        return torch.where(rows == 99, torch.nan, rows)


def picture(value: int) -> torch.Tensor:
    return torch.full((3, 32, 32), value, dtype=torch.uint8)


@pytest.fixture
def batcher(pre):
    made = Batcher(lambda: Echo(pre), bound=20)
    made.engine.result().sizes.clear()
    made.engine.result().entered.clear()
    return made


def test_pictures_that_wait_share_calls_and_each_has_its_own_answer(batcher):
    engine = batcher.engine.result()
    engine.gate.clear()
    futures = [batcher.submit(picture(value)) for value in range(20, 40)]
    engine.gate.set()
    answers = [future.result(10) for future in futures]
    assert [answer.logits.tolist() for answer in answers] == [[value] * 3 for value in range(20, 40)]
    assert max(engine.sizes) == batching.LIMIT and sum(engine.sizes) == 20
    assert sorted(answer.batch for answer in answers) == sorted(n for n in engine.sizes for _ in range(n))
    assert len(engine.threads) == 1 and threading.get_ident() not in engine.threads  # also where it was made


def test_an_error_of_one_picture_is_nobody_elses(batcher):
    engine = batcher.engine.result()
    engine.gate.clear()
    first = batcher.submit(picture(1))
    assert engine.entered.wait(10)  # the others wait for the next call
    futures = {value: batcher.submit(picture(value)) for value in (20, 13, 30, 99, 40)}
    cancelled = batcher.submit(picture(50))
    assert cancelled.cancel()
    engine.gate.set()
    assert first.result(10).logits.tolist() == [1, 1, 1]
    assert [futures[value].result(10).logits.tolist() for value in (20, 30, 40)] == [[20] * 3, [30] * 3, [40] * 3]
    with pytest.raises(RuntimeError, match="no memory for 13"):
        futures[13].result(10)
    with pytest.raises(FloatingPointError, match="'echo' hold NaN"):
        futures[99].result(10)
    for wrong in (picture(1)[:, 1:], picture(1).float()):
        with pytest.raises(ValueError, match=r"must be uint8 \(3, 32, 32\), not"):
            batcher.submit(wrong)
    assert batcher.submit(picture(60)).result(10).logits.tolist() == [60, 60, 60]


def test_beyond_the_bound_a_picture_is_refused_and_none_is_lost(batcher):
    engine = batcher.engine.result()
    engine.gate.clear()
    futures = []
    with pytest.raises(Busy, match="20 pictures are waiting already: try again"):
        while len(futures) < 20 + batching.LIMIT + 1:  # those of the call in progress do not wait
            futures.append(batcher.submit(picture(20)))
    assert len(futures) >= 20
    engine.gate.set()
    assert all(future.result(10).logits.tolist() == [20, 20, 20] for future in futures)


def test_an_engine_that_cannot_be_loaded_is_an_error_of_each_request():
    def missing():
        raise FileNotFoundError("no weights")

    batcher = Batcher(missing)
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match="no weights"):
            batcher.submit(picture(1))
