"""DINOv2 (Oquab et al. 2024) as a plain ViT with the same outputs, so that every format, kernel and ablation applies.

A DINOv2 block multiplies the outputs of attention and MLP by learnt factors (layer scale). A factor a channel can be
multiplied into the rows of the linear layer before it. Position embeddings are interpolated once, to one picture size.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTForImageClassification

_NAMES = {"encoder.layer.": "layers.", "norm1": "layernorm_before", "norm2": "layernorm_after"}
_SCALED = {"attention.o_proj": "layer_scale1", "mlp.fc2": "layer_scale2"}  # the last linear of each branch


def config_of(source: Dinov2Config, side: int, **more: object) -> ViTConfig:
    """The config of the plain ViT for pictures of `side` pixels. ValueError where there is none (DINOv2 giant)."""
    if source.use_swiglu_ffn:
        raise ValueError("this DINOv2 network has SwiGLU layers (giant), which the plain ViT class lacks")
    if side % source.patch_size:
        raise ValueError(f"{side} pixels are not a multiple of the patch size {source.patch_size}")
    same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "num_channels", "hidden_act")
    sizes = {name: getattr(source, name) for name in (*same, "layer_norm_eps", "qkv_bias")}
    return ViTConfig(**sizes, intermediate_size=source.hidden_size * source.mlp_ratio, image_size=side, **more)


@torch.no_grad()
def folded(source: Dinov2Model, side: int, **more: object) -> ViTForImageClassification:
    """A plain ViT for (n, 3, side, side) whose class token is that of `source`; its head is random.

    `more` goes to the config (label names, say). In float32 outputs agree to rounding. ValueError for DINOv2 giant.
    """
    vit = ViTForImageClassification(config_of(source.config, side, **more))
    grid = torch.empty(1, 1 + (side // source.config.patch_size) ** 2, source.config.hidden_size)
    positions = source.embeddings.interpolate_pos_encoding(grid, side, side)
    state = _renamed(source.state_dict()) | {"embeddings.position_embeddings": positions}
    vit.vit.load_state_dict(state)
    return vit.eval()


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under a ViT's names, layer scale multiplied in."""
    found = {}
    for name, value in state.items():
        if "layer_scale" in name or name.endswith("mask_token"):  # the mask token serves pretraining only
            continue
        block = name.partition("attention.")[0].partition("mlp.")[0]
        for linear, scale in _SCALED.items():
            if linear in name:
                factors = state[f"{block}{scale}.lambda1"]
                value = value * (factors[:, None] if value.ndim == 2 else factors)
        for old, new in _NAMES.items():
            name = name.replace(old, new)
        found[name] = value
    return found
