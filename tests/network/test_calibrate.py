"""Calibrated NF4: less error than plain NF4 on unseen inputs, in the same format, through save and reload."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from vitlib.network import calibrate, quantize


def correlated(rows: int, width: int, seed: int) -> torch.Tensor:
    """Inputs (rows, width) that a few directions dominate, as those of a trained network."""
    basis = torch.randn(width, width, generator=torch.Generator().manual_seed(7))
    draw = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return draw @ (basis * torch.logspace(0, -2, width)[:, None])


@torch.no_grad()
def test_the_error_of_outputs_is_less_than_half_of_plain_nf4s():
    torch.manual_seed(0)
    linear, seen, unseen = nn.Linear(256, 128), correlated(2000, 256, 1), correlated(500, 256, 2)
    layer, expected = quantize.quantize_linear(linear, 4), unseen @ linear.weight.T

    def error(weight: torch.Tensor) -> float:
        return ((unseen @ weight.T - expected).norm() / expected.norm()).item()

    plain, grid = error(quantize.dequantized(layer)), calibrate.Grid.of_state(layer.weight.quant_state)
    codes = grid.compensated(linear.weight, seen.T @ seen)
    quantize.set_codes(layer, codes)
    assert error(quantize.dequantized(layer)) < plain / 2
    # What bitsandbytes reads from the layer is what was computed.
    assert torch.allclose(quantize.dequantized(layer), grid.values(codes), atol=1e-6)


def test_without_correlation_it_is_rounding_to_nearest_as_bitsandbytes_rounds():
    """A diagonal matrix leaves nothing to compensate, with one scale a row and offsets too."""
    linear = nn.Linear(256, 64)
    layer = quantize.quantize_linear(linear, 4)
    grid, weight = calibrate.Grid.of_state(layer.weight.quant_state), linear.weight.detach()
    assert torch.equal(grid.compensated(weight, torch.eye(256)), grid.nearest(weight))
    # bitsandbytes rounds weights before it rounds their scales, so that borderline weights differ.
    assert (grid.values(grid.nearest(weight)) - quantize.dequantized(layer)).abs().gt(1e-6).float().mean() < 0.02
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    uniform = calibrate.Grid(torch.arange(16.0), (high - low) / 15, low)
    found = uniform.values(uniform.compensated(weight, torch.eye(256)))
    assert ((found - weight).abs() <= 0.5001 * uniform.scales).all()


def test_inputs_that_are_always_0_do_no_harm():
    gram = torch.zeros(64, 64)
    gram[:32, :32] = torch.eye(32)
    layer = quantize.quantize_linear(nn.Linear(64, 8), 4)
    assert torch.isfinite(calibrate._inverse_factor(gram)).all()
    assert calibrate.Grid.of_state(layer.weight.quant_state).compensated(torch.randn(8, 64), gram).max() < 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.no_grad()
def test_a_calibrated_network_survives_save_and_reload_bit_for_bit(tmp_path, dtype):
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 128}
    network = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=4)).eval()
    network.save_pretrained(tmp_path / "plain")
    how = {"quantization_config": quantize.config(4, dtype), "dtype": dtype}
    quantized = AutoModelForImageClassification.from_pretrained(tmp_path / "plain", **how)
    before, pixels = copy.deepcopy(quantized.state_dict()), torch.randn(16, 3, 32, 32)
    calibrate.calibrate(copy.deepcopy(network), quantized, pixels)
    changed = {name for name, value in quantized.state_dict().items() if not torch.equal(value, before[name])}
    linears = [name for name, module in quantized.vit.layers.named_modules() if isinstance(module, nn.Linear)]
    assert changed == {f"vit.layers.{name}.weight" for name in linears}  # codes alone: scales and biases stay
    quantized.save_pretrained(tmp_path / "calibrated")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "calibrated").state_dict()
    assert {name for name, value in quantized.state_dict().items() if not torch.equal(value, again[name])} == set()
