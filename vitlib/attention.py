"""Which attention can run where, and why not. Level 1."""

import importlib
import importlib.util

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from vitlib.variants import Variant

DIRECT = "direct"  # PyTorch's SDPA without a mask; the name must not contain "flash", or transformers wants a package


def direct(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention of every token to every token: (n, heads, tokens, width) each, out (n, tokens, heads, width).

    Under `torch.compile` transformers materialises a mask for its own "sdpa", and with a mask SDPA cannot take its
    fused kernels. A ViT has nothing to mask.
    """
    out = nn.functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scaling)
    return out.transpose(1, 2), None


AttentionInterface.register(DIRECT, direct)
AttentionMaskInterface.register(DIRECT, lambda *_, **__: None)


def missing_flash_attention(device: torch.device) -> str:
    """Why FlashAttention-2 cannot run on `device` ('' if it can). Its package is meant, never a replacement.

    transformers 5 may fetch a kernel from the Hub where flash-attn is missing; a row that says FlashAttention-2
    must have run FlashAttention-2, so only the package counts.
    """
    if device.type != "cuda":
        return "FlashAttention-2 needs a CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        name = torch.cuda.get_device_name(device)
        return f"FlashAttention-2 needs compute capability 8.0 (Ampere), {name} has {major}.{minor}"
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed (uv pip install -e '.[gpu]' --no-build-isolation)"
    try:
        importlib.import_module("flash_attn")
    except (ImportError, OSError) as error:  # built for another torch, the usual state after an upgrade
        return f"flash-attn is installed but cannot be imported: {str(error).splitlines()[0]}"
    return ""


def not_runnable(variant: Variant, device: torch.device) -> str:
    """The reason why `variant` cannot run on `device`, '' if it can."""
    if variant.attention == "flash_attention_2":
        if variant.weights == "fp32":
            return "FlashAttention-2 takes fp16 and bf16 only"
        if reason := missing_flash_attention(device):
            return reason
    if variant.execution == "graph" and device.type != "cuda":
        return "CUDA graphs need a CUDA device"
    if variant.execution == "graph" and variant.weights == "int8":
        return "LLM.int8 with outlier threshold synchronises with the host and cannot be captured in a CUDA graph"
    return ""


def best(device: torch.device) -> str:
    """The attention that 16-bit inference should use here."""
    return "sdpa" if missing_flash_attention(device) else "flash_attention_2"
