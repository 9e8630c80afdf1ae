"""Calibrated NF4: less error than plain NF4 on unseen inputs, in the same format, through save and reload."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification, BitsAndBytesConfig, ViTConfig, ViTForImageClassification

from vitlib.network import calibrate, quantize


def correlated(rows: int, width: int, seed: int) -> torch.Tensor:
    """Inputs (rows, width) that a few directions dominate, as those of a trained network."""
    basis = torch.randn(width, width, generator=torch.Generator().manual_seed(7))
    draw = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return draw @ (basis * torch.logspace(0, -2, width)[:, None])


@pytest.fixture(scope="module")
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(256, 128)


def dequantized(layer) -> torch.Tensor:
    return layer.weight.quant_state and __import__("bitsandbytes").functional.dequantize_4bit(
        layer.weight.data, layer.weight.quant_state
    )


@torch.no_grad()
def test_the_error_of_outputs_is_less_than_half_of_plain_nf4s(linear):
    layer, seen, unseen = quantize.quantize_linear(linear, 4), correlated(2000, 256, 1), correlated(500, 256, 2)
    expected = unseen @ linear.weight.T

    def error(weight: torch.Tensor) -> float:
        return ((unseen @ weight.T - expected).norm() / expected.norm()).item()

    plain = error(dequantized(layer))
    hessian = calibrate.Hessian()
    hessian.add(seen)
    written = calibrate.calibrate_linear(layer, linear.weight, hessian.total)
    assert error(written) < plain / 2
    # What bitsandbytes reads from the layer is what was computed: codes, scales and double quantization are in place.
    assert torch.allclose(dequantized(layer), written, atol=1e-6)
    assert layer.weight.quant_state.nested and layer.weight.quant_state.absmax.dtype == torch.uint8


def test_without_correlation_it_is_rounding_to_nearest():
    """A diagonal Hessian leaves nothing to compensate."""
    weight, grid = torch.randn(8, 128), torch.linspace(-1, 1, 16)
    codes, scales = calibrate.compensated(weight, calibrate.inverse_factor(torch.eye(128)), grid)
    expected = weight.view(8, 2, 64).abs().amax(2)
    assert torch.allclose(scales, expected)
    assert torch.equal(codes.long(), calibrate.nearest(weight / expected.repeat_interleave(64, 1), grid))


def test_dead_inputs_do_no_harm():
    hessian = torch.zeros(64, 64)
    hessian[:32, :32] = torch.eye(32)
    assert torch.isfinite(calibrate.inverse_factor(hessian)).all()


@torch.no_grad()
def test_a_calibrated_network_survives_save_and_reload_bit_for_bit(tmp_path):
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 128}
    network = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=4)).eval()
    network.save_pretrained(tmp_path / "plain")
    config: BitsAndBytesConfig = quantize.config(4, torch.float32)
    quantized = AutoModelForImageClassification.from_pretrained(tmp_path / "plain", quantization_config=config)
    before = copy.deepcopy(quantized.state_dict())
    pixels = torch.randn(16, 3, 32, 32)
    calibrate.calibrate(network, quantized, pixels, batch_size=8)
    changed = [name for name, value in quantized.state_dict().items() if not torch.equal(value, before[name])]
    assert any(name.endswith("q_proj.weight") for name in changed) and "vit.layers.0.mlp.fc1.bias" not in changed
    quantized.save_pretrained(tmp_path / "calibrated")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "calibrated").state_dict()
    assert {name for name, value in quantized.state_dict().items() if not torch.equal(value, again[name])} == set()
