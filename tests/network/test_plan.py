"""Plans: a network of several formats is the one that was planned, through save and reload and in a fused network."""

import shutil

import bitsandbytes as bnb
import pytest
import torch

from vitlib.network import checkpoint, engine, plan, quantize, verify
from vitlib.network.layers import Int8WeightOnly
from vitlib.network.verify import EvidenceError
from vitlib.study import records
from vitlib.study.variants import Variant

CPU = torch.device("cpu")


def loaded(checkpoints, weights):
    return checkpoint.load(checkpoints, Variant(weights), CPU).model


def test_every_linear_has_the_weights_of_the_checkpoint_that_the_plan_names(checkpoints):
    mixed, chosen = loaded(checkpoints, "mixed"), records.read_json(checkpoints / "mixed" / plan.FILE)
    sources = {"fp16": "fp16", "int8": "int8", "nf4": "nf4c"}
    networks = {form: plan.linears(loaded(checkpoints, name)) for form, name in sources.items()}
    assert set(chosen.values()) == set(networks)
    for name, layer in plan.linears(mixed).items():
        source = networks[chosen[name]][name]
        assert torch.equal(quantize.dequantized(layer), quantize.dequantized(source).half().float())
        assert torch.equal(layer.bias, source.bias.to(layer.bias.dtype))
        assert isinstance(layer, bnb.nn.Linear4bit) == (chosen[name] == "nf4")


def test_a_fused_network_has_the_codes_of_the_int8_checkpoint_in_one_byte_each(checkpoints):
    runner = engine.load(checkpoints, "mixed-direct-fused", "cpu", (1,))
    network = runner.network
    kinds = set(verify.verify(network, Variant("mixed", "direct", "fused"))["encoder_linears"])
    assert kinds == {"Dense", "Int8WeightOnly", "NF4"}
    assert runner.loaded.weights_mb < 0.8 * verify.model_mb(loaded(checkpoints, "mixed"))
    rows = [module.rows for module in network.blocks.modules() if isinstance(module, Int8WeightOnly)]
    stored = plan.linears(loaded(checkpoints, "int8"))
    chosen = records.read_json(checkpoints / "mixed" / plan.FILE)
    expected = [stored[name].weight.data for name, form in chosen.items() if form == "int8"]
    assert len(rows) == len(expected) > 0
    assert all(any(torch.equal(found, codes) for codes in expected) for found in rows)


def test_a_network_that_contradicts_its_plan_is_refused(checkpoints, tmp_path):
    shutil.copytree(checkpoints / "mixed", tmp_path / "mixed")
    chosen = records.read_json(tmp_path / "mixed" / plan.FILE)
    (tmp_path / "mixed" / "provenance.json").unlink()  # it knows the checksum of the plan
    swapped = {"nf4": "fp16", "fp16": "nf4", "int8": "int8"}
    records.write_json({name: swapped[form] for name, form in chosen.items()}, tmp_path / "mixed" / plan.FILE)
    with pytest.raises(EvidenceError, match="has not the format of the plan"):
        loaded(tmp_path, "mixed")
