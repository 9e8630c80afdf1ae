"""Attention without a mask, and which variant can run where.

transformers builds a mask for its own attention functions when a network is compiled or traced, and a mask of zeros
keeps PyTorch from its fast kernels. A Vision Transformer needs none: every patch sees every other. The function here
is registered with transformers (after importing this module `attn_implementation="direct"` works in plain
`from_pretrained`), together with a mask function that makes no mask.
"""

import importlib
import importlib.util

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from vitlib.study import files
from vitlib.study.variants import DIRECT, Variant


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scaling: float, dropout: float = 0.0
) -> torch.Tensor:
    """softmax(query keyᵀ · scaling) value without a mask, by the kernel that PyTorch chooses.

    `query` is (n, rows, heads, width), `key` and `value` (n, tokens, heads, width); only the last dimension must be
    contiguous, so that views of one QKV product need no copy. Returns (n, rows, heads, width).
    """
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    return scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scaling).transpose(1, 2)


def _for_transformers(
    _: torch.nn.Module, *inputs: torch.Tensor, scaling: float, dropout: float = 0.0, **__: object
) -> tuple[torch.Tensor, None]:
    """`attend` as transformers calls it: query, key and value (n, heads, tokens, width), and the mask."""
    *states, mask = inputs
    _no_mask(attention_mask=mask)
    return attend(*(tensor.transpose(1, 2) for tensor in states), scaling=scaling, dropout=dropout), None


def _no_mask(*_: object, attention_mask: torch.Tensor | None = None, **__: object) -> None:
    """The mask function registered with transformers: it makes no mask, and refuses one (ValueError)."""
    if attention_mask is not None:
        raise ValueError(f"the attention {DIRECT!r} sees every token and takes no mask: use 'sdpa' where one is needed")


AttentionInterface.register(DIRECT, _for_transformers)
AttentionMaskInterface.register(DIRECT, _no_mask)


def missing_flash_attention(device: torch.device) -> str:
    """Why FlashAttention-2 cannot run on `device` ('' if it can).

    transformers 5 may fetch a kernel from the Hub where flash-attn is missing; a row named FlashAttention-2 must have
    run FlashAttention-2, so only the package counts.
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
        return f"flash-attn is installed but cannot be imported: {files.first_line(error)}"
    return ""


def not_runnable(variant: Variant, device: torch.device) -> str:
    """The reason why `variant` cannot run on `device`, '' if it can."""
    row = variant.format
    if variant.own_flash:
        if row.dtype == "float32":
            return "FlashAttention-2 takes fp16 and bf16 only"
        if reason := missing_flash_attention(device):
            return reason
    if variant.graphed and device.type != "cuda":
        return "CUDA graphs need a CUDA device"
    if variant.graphed and not row.capturable:
        return "LLM.int8 with outlier threshold synchronises with the host and cannot be captured in a CUDA graph"
    if device.type != "cuda":
        return ""
    if torch.cuda.get_device_capability(device) < row.capability:
        needed, name = ".".join(map(str, row.capability)), torch.cuda.get_device_name(device)
        return f"{row.name} products need compute capability {needed}, {name} has less"
    if row.dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return f"bf16 is only emulated below compute capability 8.0 ({torch.cuda.get_device_name(device)})"
    return ""
