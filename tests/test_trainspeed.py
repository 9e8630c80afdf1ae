"""The table of training steps runs anywhere, leaves the network as it was, and names what could not run."""

from itertools import pairwise

import pytest
import torch

from vitlib import checkpoint, preprocess, trainspeed

CPU = torch.device("cpu")


@pytest.fixture
def network(labels):
    torch.manual_seed(0)
    return checkpoint.new("vit-micro", image_size=32, labels=labels)


def test_every_step_has_a_speed_and_compiling_a_time_of_its_own(network):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    table = trainspeed.step_speed(
        network, 4, pre=preprocess.new(32), device=CPU, calls=2, seconds=0.1, backend="aot_eager"
    )
    assert table["step"].tolist() == [step.name for step in trainspeed.STEPS]
    assert (table["images_per_s"] > 0).all()
    assert table["reason"].isna().all()
    assert (table["compile_s"] > 0).tolist() == [step.compiled for step in trainspeed.STEPS]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.config._attn_implementation == "sdpa"


def test_each_step_adds_to_the_one_before():
    def switched(step):
        return {name for name, on in vars(step).items() if on is True} - {"dropout"}

    dropping = [step for step in trainspeed.STEPS if step.dropout]
    assert all(switched(low) < switched(high) for low, high in pairwise(dropping))
    # The last step works without dropout only, so the first is measured without it too.
    plain, last = [step for step in trainspeed.STEPS if not step.dropout]
    assert not switched(plain) and switched(dropping[-1]) < switched(last)


def test_a_step_that_cannot_run_is_a_row_with_the_reason(network, monkeypatch):
    def no_compiler(*_):
        raise RuntimeError("no compiler here\nand a long trace")

    monkeypatch.setattr(trainspeed.training, "compiled_blocks", no_compiler)
    table = trainspeed.step_speed(
        network, 2, pre=preprocess.new(32), device=CPU, calls=2, seconds=0.1, steps=trainspeed.STEPS[:1]
    )
    assert table["reason"].tolist() == ["no compiler here"]
    assert table["images_per_s"].isna().all()
