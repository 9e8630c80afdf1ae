"""A DINOv2 network folded into a plain ViT computes the same class token, and loads as a base like any ViT."""

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, ViTImageProcessorPil

from vitlib.network import checkpoint, dinov2
from vitlib.pictures.sources import Labels

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "patch_size": 14, "mlp_ratio": 2}


@pytest.fixture
def source() -> Dinov2Model:
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(**SIZES, image_size=70, layerscale_value=0.3)).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():  # biases and scales that differ by channel
            if value.ndim == 1 or "position" in name:
                value.add_(0.2 * torch.randn_like(value))
    return model


@pytest.mark.parametrize("side", [70, 42, 98])
@torch.no_grad()
def test_folding_is_exact_at_any_size(source, side):
    """Positions are interpolated once instead of in each pass, and layer scale is multiplied into the weights."""
    pixels = torch.randn(2, 3, side, side)
    expected = source(pixels).last_hidden_state
    found = dinov2.folded(source, side).vit(pixels).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-5)


def test_what_has_no_plain_form_is_refused(source):
    with pytest.raises(ValueError, match="SwiGLU"):
        dinov2.config_of(Dinov2Config(**SIZES, use_swiglu_ffn=True), 70)
    with pytest.raises(ValueError, match="multiple of the patch size"):
        dinov2.folded(source, 64)


@torch.no_grad()
def test_a_folder_with_dinov2_is_a_base(source, tmp_path):
    source.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 42, "width": 42}).save_pretrained(tmp_path)
    how = {"revision": "", "side": 42, "labels": Labels(("a", "b"), ("a", "b")), "device": torch.device("cpu")}
    base = checkpoint.load_base(str(tmp_path), dtype=torch.float32, quantized=False, **how)
    pixels = torch.randn(1, 3, 42, 42)
    assert base(pixel_values=pixels).logits.shape == (1, 2)
    assert torch.allclose(base.vit(pixels).last_hidden_state, source(pixels).last_hidden_state, atol=1e-5)
    quantized = checkpoint.load_base(str(tmp_path), dtype=torch.bfloat16, quantized=True, **how)
    assert type(quantized.vit.layers[0].mlp.fc1).__name__ == "Linear4bit"
