"""Repair trains beside the codes of a quantized network, and is measured on that network."""

from dataclasses import replace

import pytest
import torch

from vitlib.network import checkpoint
from vitlib.study import params
from vitlib.study.records import COLUMNS
from vitlib.study.study import Study
from vitlib.study.variants import Variant
from vitlib.training import repair
from vitlib.training.trainer import Examples

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def study(checkpoints):
    """How to load the NF4 network, its FP16 teacher, and 32 pictures that both train and test."""
    draw = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (32, 3, 4, 4), dtype=torch.uint8, generator=draw)
    pixels = coarse.repeat_interleave(8, 2).repeat_interleave(8, 3)
    both = Examples(pixels, torch.arange(32) % 3)
    teacher = checkpoint.load(checkpoints, Variant("fp16"), CPU)
    return lambda: checkpoint.load(checkpoints, Variant("nf4"), CPU), teacher, {"train": both, "valid": both}


@pytest.fixture(scope="module")
def repaired(study, checkpoints):
    settled = params.check({"study": "unit", "repair_epochs": 12, "device": "cpu"})
    return repair.repair(Study(settled, checkpoints.parent), study[1], "nf4", study[2], seeds=(1,))


def test_distillation_brings_the_network_nearer_to_its_teacher(repaired):
    assert tuple(repaired) == COLUMNS["repair"]
    rows = repaired.set_index("method")
    assert list(rows.index) == ["none", "labels", "distil", "biases"]
    assert rows["logit_kl"]["distil"] < rows["logit_kl"]["none"] / 2
    assert rows["logit_kl"]["biases"] < rows["logit_kl"]["none"]
    assert rows["logit_kl"]["labels"] > rows["logit_kl"]["distil"]
    weights, added = 4 * (4 * 128 * 128 + 2 * 128 * 512), 4 * 4 * (4 * 256 + 2 * 640)
    assert rows["bits"]["distil"] - rows["bits"]["none"] == pytest.approx(16 * added / weights)
    assert rows["bits"]["biases"] == rows["bits"]["none"]
    assert 4.1 < rows["bits"]["none"] < 4.5 and rows["difference"]["none"] == 0


def test_the_codes_stay_and_only_what_is_said_changes(study):
    load, teacher, examples = study
    before = load().model.state_dict()
    recipe = replace(repair.RECIPE, epochs=3)
    loaded, kept, loss = repair.repaired(load, teacher, examples, method="biases", recipe=recipe)
    changed = {name for name, value in loaded.model.state_dict().items() if not torch.equal(value, before[name])}
    assert kept == 0 and loss > 0 and changed
    assert all(before[name].ndim == 1 and name.endswith(("bias", "weight")) for name in changed)
    with pytest.raises(KeyError):
        repair.repaired(load, teacher, examples, method="other", recipe=recipe)
