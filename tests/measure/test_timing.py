"""The instruments on a clock that only the measured calls move, and on tensors of known size. Nothing is timed."""

from types import SimpleNamespace

import pytest
import torch

from vitlib.measure import timing
from vitlib.measure.timing import Budget

CPU = torch.device("cpu")


class Clock:
    """`perf_counter` that stands still except while a call of known duration runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def takes(self, *seconds: float) -> timing.Call:
        """A call whose durations are these in turn, the last for ever."""
        left = list(seconds)

        def call(_: int) -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(timing, "time", found)
    return found


def test_latency_of_a_known_duration_in_every_round(clock):
    calls = {"a": clock.takes(0.004), "b": clock.takes(0.002)}
    frame = timing.latency(calls, CPU, Budget(rounds=3, samples=5, seconds=1.0))
    assert frame["latency_ms"].tolist() == pytest.approx(frame["candidate"].map({"a": 4.0, "b": 2.0}).tolist())
    assert (frame.groupby(["candidate", "round"]).size() == 5).all() and frame["device_ms"].isna().all()


def test_a_round_ends_with_its_samples_or_its_time(clock):
    frame = timing.latency({"slow": clock.takes(0.4)}, CPU, Budget(rounds=2, samples=50, seconds=1.0))
    assert (frame.groupby("round").size() == 3).all()  # the first call after a second is the last


def test_a_warm_up_goes_on_until_two_calls_agree(clock):
    call = clock.takes(0.9, 0.3, 0.2, 0.1, 0.1)
    assert timing.warm_up(call, CPU, seconds=10.0) == 5
    assert timing.warm_up(clock.takes(1.0, 2.0, 3.0, 4.0, 5.0), CPU, seconds=5.0) == 3


def test_throughput_is_measured_at_its_batch_not_inverted_from_batch_one(clock):
    """A call that takes the same time for 1 and 8 pictures has eight times the throughput at 8."""
    calls = {1: clock.takes(0.004), 8: clock.takes(0.004)}
    frame = timing.throughput(calls, {1: 1, 8: 8}, CPU, Budget(rounds=4, samples=3, seconds=1.0))
    assert frame.groupby("candidate")["throughput_img_s"].mean().to_dict() == pytest.approx({1: 250.0, 8: 2000.0})


def test_a_call_of_known_duration_spins_until_then(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    timing.busy(7.0)(0)
    assert next(ticks) == 8  # it looked at the clock until 7 s after its first look


def test_the_instruments_calibrate_themselves(clock):
    clock.perf_counter = lambda: setattr(clock, "now", clock.now + 1e-5) or clock.now  # each look takes 10 µs
    assert timing.known_duration_error(5.0) < 0.01
    assert timing.known_tensor_error(8.0) < 0.02


def test_every_candidate_is_measured_in_every_round_and_the_order_changes():
    order = []
    calls = {name: lambda _, name=name: order.append(name) for name in "abcd"}
    frame = timing.latency(calls, CPU, Budget(rounds=6, samples=2, seconds=0.1))
    assert len(frame[["candidate", "round"]].drop_duplicates()) == 24
    assert frame.groupby("round")["candidate"].first().nunique() > 1


def test_inputs_rotate():
    numbers = []
    timing.latency({"a": numbers.append}, CPU, Budget(rounds=2, samples=4, seconds=0.1))
    assert {0, 1, 2, 3} <= set(numbers)


def test_peak_memory_is_the_most_held_at_once():
    def call(_: int) -> None:
        for _ in range(5):
            torch.empty(16 * 2**20, dtype=torch.uint8).fill_(1)

    assert timing.peak_memory_mb(call, CPU)[0] == pytest.approx(16, rel=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
def test_a_replayed_graph_has_a_duration():
    x = torch.zeros(1024, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.add_(1)
    assert 0 < timing.replay_us(graph, repeats=3) < 1e6
