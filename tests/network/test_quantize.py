"""Quantized layers against the float64 product of their own dequantized weights, and exact sizes."""

import pytest
import torch
from torch import nn

from vitlib.network import checkpoint, quantize, verify
from vitlib.network.tuning import relative_error as relative
from vitlib.pictures.sources import Labels
from vitlib.study.variants import Variant


@pytest.mark.parametrize(("bits", "tolerance"), [(4, 0.12), (8, 0.02)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_quantized_linear_is_close_to_the_product_it_replaces(bits, tolerance, dtype):
    linear = nn.Linear(128, 102).to(dtype)  # 102 rows do not divide by the 32 that bitsandbytes packs on some CPUs
    x = torch.randn(16, 128, dtype=dtype)
    with torch.no_grad():
        assert relative(quantize.quantize_linear(linear, bits)(x), linear(x)) < tolerance


@pytest.mark.parametrize("weights", ["nf4", "int8"])
def test_saved_checkpoints_keep_the_classifier_in_16_bit(checkpoints, weights):
    network = checkpoint.load(checkpoints, Variant(weights), torch.device("cpu")).model
    assert type(network.classifier) is nn.Linear
    assert network.config.quantization_config.llm_int8_skip_modules == ["classifier"]
    encoder = [m for n, m in network.named_modules() if isinstance(m, nn.Linear) and n != "classifier"]
    assert len(encoder) == 4 * 6
    kind = {"nf4": quantize.bnb.nn.Linear4bit, "int8": quantize.bnb.nn.Linear8bitLt}[weights]
    assert all(type(m) is kind for m in encoder)


def test_nf4_is_quantized_twice_and_computes_in_16_bit():
    settings = quantize.config(4, torch.float16)
    assert settings.bnb_4bit_compute_dtype == torch.float16 and settings.bnb_4bit_use_double_quant


@pytest.mark.parametrize("weights", ["nf4", "int8"])
def test_saved_checkpoints_hold_what_the_layers_made_here_hold(checkpoints, weights):
    """The same codes and scales, of NF4 on both levels; int8 rows reach 127, the end of their range."""
    merged, stored = (checkpoint.load(checkpoints, Variant(w), torch.device("cpu")).model for w in ("fp16", weights))
    found, bits = stored.vit.layers[2].mlp.fc1, {"nf4": 4, "int8": 8}[weights]
    expected = quantize.quantize_linear(merged.vit.layers[2].mlp.fc1, bits)
    assert torch.equal(found.weight.data, expected.weight.data)
    if bits == 8:
        assert torch.equal(found.weight.SCB, expected.weight.SCB)
        assert found.weight.data.abs().amax(dim=1).eq(127).all()
        return
    state, other = found.weight.quant_state, expected.weight.quant_state
    assert state.nested and (state.blocksize, state.state2.blocksize) == (64, 256)
    assert torch.equal(state.absmax, other.absmax) and torch.equal(state.state2.absmax, other.state2.absmax)


def test_model_mb_counts_every_byte_once_and_scales_of_both_levels():
    network = nn.Sequential(nn.Linear(1024, 512, bias=False))
    network.append(network[0])  # the same tensor twice weighs nothing more
    assert verify.model_mb(network) == 1024 * 512 * 4 / 2**20
    layer, blocks = quantize.quantize_linear(nn.Linear(1024, 512, bias=False).half(), 4), 1024 * 512 // 64
    codes, scales, tables = 1024 * 512 // 2, blocks + 4 * blocks // 256, 16 * 4 + 256 * 4 + 4
    assert verify.model_mb(layer) == pytest.approx((codes + scales + tables) / 2**20)


def test_an_exchanged_block_shares_norms_and_leaves_the_original_alone():
    labels = Labels(("a", "b"), ("a", "b"))
    block = checkpoint.new("vit-micro", image_size=32, labels=labels).half().eval().vit.layers[0]
    twin = quantize.exchanged(block, lambda _, linear: quantize.quantize_linear(linear, 4))
    assert twin.layernorm_before is not None
    assert twin.layernorm_before.weight is block.layernorm_before.weight
    assert type(block.mlp.fc1) is nn.Linear
    assert type(twin.mlp.fc1) is quantize.bnb.nn.Linear4bit
