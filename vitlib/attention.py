"""Attention: the functions of this project's own, which can run where, and why not. Level 1.

transformers builds a mask for its own attention functions when a network is compiled or traced, and a mask of zeros
keeps PyTorch from its fast kernels. A Vision Transformer needs none: every patch sees every other. The functions here
are registered with transformers (after importing this module `attn_implementation="direct"` works in plain
`from_pretrained`), together with a mask function that makes no mask. Their names avoid the word "flash", for which
transformers would look for a package.
"""

import importlib
import importlib.util

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from vitlib import files
from vitlib.variants import ATTENTIONS, Variant

# PyTorch's backend of each name; `direct` leaves the choice to PyTorch, `direct_fa2` is the package flash-attn.
BACKENDS = {
    "direct_cudnn": SDPBackend.CUDNN_ATTENTION,
    "direct_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "direct_math": SDPBackend.MATH,
    "direct_fa": SDPBackend.FLASH_ATTENTION,
}
DIRECT = tuple(name for name in ATTENTIONS if name.startswith("direct"))
# What transformers' names become in a network that calls attention itself.
DIRECT_OF = {"sdpa": "direct", "eager": "direct_math", "flash_attention_2": "direct_fa2"} | {n: n for n in DIRECT}


def attend(
    name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scaling: float, dropout: float = 0.0
) -> torch.Tensor:
    """softmax(query keyᵀ · scaling) value without a mask, by the function `name` of `DIRECT`.

    `query` is (n, rows, heads, width), `key` and `value` (n, tokens, heads, width); only the last dimension must be
    contiguous, so that views of one QKV product need no copy. Returns (n, rows, heads, width).
    """
    if name == "direct_fa2":
        from flash_attn import flash_attn_func  # optional; torch.compile can trace this form

        return flash_attn_func(query, key, value, dropout_p=dropout, softmax_scale=scaling)
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    if name == "direct":
        out = scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scaling)
    else:
        with sdpa_kernel(BACKENDS[name]):
            out = scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scaling)
    return out.transpose(1, 2)


def _for_transformers(name: str) -> object:
    """`attend` with the signature that transformers calls; states come as (n, heads, tokens, width)."""

    def forward(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **_: object,
    ) -> tuple[torch.Tensor, None]:
        _refuse_mask(name, attention_mask)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        states = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return attend(name, *states, scaling=scaling, dropout=dropout), None

    return forward


def _refuse_mask(name: str, attention_mask: torch.Tensor | None) -> None:
    if attention_mask is not None:
        raise ValueError(f"the attention {name!r} sees every token and takes no mask: use 'sdpa' where one is needed")


def _register() -> None:
    for name in DIRECT:

        def no_mask(*_: object, name: str = name, attention_mask: torch.Tensor | None = None, **__: object) -> None:
            _refuse_mask(name, attention_mask)

        AttentionInterface.register(name, _for_transformers(name))
        AttentionMaskInterface.register(name, no_mask)


_register()


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
        return f"flash-attn is installed but cannot be imported: {files.first_line(error)}"
    return ""


def _missing_backend(variant: Variant, device: torch.device) -> str:
    """Why PyTorch's backend of `variant` cannot run on `device`, '' if it can."""
    names = {
        "direct_cudnn": "cuDNN attention",
        "direct_efficient": "memory-efficient attention",
        "direct_fa": "PyTorch's flash attention",
    }
    if variant.attention not in names:
        return ""
    name = names[variant.attention]
    if device.type != "cuda":  # on a CPU PyTorch has one fused kernel of its own, which `direct` takes
        return f"{name} needs a CUDA device"
    if variant.attention != "direct_efficient":
        if variant.weights == "fp32":
            return f"{name} takes fp16 and bf16 only"
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            here = f"{torch.cuda.get_device_name(device)} has {major}.{minor}"
            return f"{name} needs compute capability 8.0 (Ampere), {here}"
    return ""


def not_runnable(variant: Variant, device: torch.device) -> str:
    """The reason why `variant` cannot run on `device`, '' if it can."""
    if variant.own_flash:
        if variant.weights == "fp32":
            return "FlashAttention-2 takes fp16 and bf16 only"
        if reason := missing_flash_attention(device):
            return reason
    if reason := _missing_backend(variant, device):
        return reason
    if variant.graphed and device.type != "cuda":
        return "CUDA graphs need a CUDA device"
    if variant.graphed and variant.weights == "int8":
        return "LLM.int8 with outlier threshold synchronises with the host and cannot be captured in a CUDA graph"
    if variant.weights == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return "fp8 products need compute capability 8.9 (Ada, Hopper)"
    return ""


def best(device: torch.device) -> str:
    """The attention that 16-bit inference should use here."""
    return "sdpa" if missing_flash_attention(device) else "flash_attention_2"
