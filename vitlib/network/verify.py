"""Proof that a network is what was asked for: module classes, dtypes, attention, kernels and size in memory."""

from collections import Counter

import bitsandbytes as bnb
import pandas as pd
import torch
from torch import nn

from vitlib.measure import profile
from vitlib.network import plan, quantize
from vitlib.network.fused import Block, FusedViT
from vitlib.network.layers import Dense, Linear, Parts
from vitlib.study.variants import DIRECT, Variant

MB = 2**20  # "MB" is 1,048,576 bytes everywhere, as in the original study (ViT-L/16 in FP32: 1157.4)


_STORED = {"fp16": "Linear", "int8": "Linear", "nf4": "Linear4bit"}  # class of a linear by its format in a plan
ATTRIBUTION_LIMIT = 0.05  # share of the device time that may belong to no part of the model


class EvidenceError(RuntimeError):
    """A network that is not the variant asked for."""


class GateError(RuntimeError):
    """The baseline is not what its name says; nothing may be compared with it."""


def evidence(model: nn.Module) -> dict[str, object]:
    """What the module really is: encoder linear classes, dtypes of the other weights, attention, classifier."""
    classifier, compute, dtypes = type(model.classifier).__name__, set(), set()
    if isinstance(model, FusedViT):
        linears = [module for module in model.blocks.modules() if isinstance(module, Linear)]
        encoder, attention = [module for module in linears if not isinstance(module, Parts)], DIRECT
        classifier = "Linear" if classifier == "Dense" else classifier
        for module in model.modules():  # blocks themselves hold scales of quantized weights
            held = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
            quantized = isinstance(module, (Block, Linear)) and not isinstance(module, Dense)
            dtypes |= {tensor.dtype for name, tensor in held.items() if name == "bias" or not quantized}
    else:
        linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        encoder = [module for name, module in linears if quantize.CLASSIFIER not in name]
        attention = model.config._attn_implementation
        dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
        compute = {module.compute_dtype for module in encoder if hasattr(module, "compute_dtype")}
    found = {"encoder_linears": dict(Counter(type(module).__name__ for module in encoder)), "dtypes": _names(dtypes)}
    found |= {"compute_dtypes": _names(compute), "attention": attention, "classifier": classifier}
    return found | {"training": model.training}


def _names(dtypes: set[torch.dtype]) -> list[str]:
    return sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)


def verify(model: nn.Module, variant: Variant) -> dict[str, object]:
    """The evidence for `model`; EvidenceError where it contradicts `variant`.

    The plain network that a fused variant is made from must hold what its checkpoint stores.
    """
    found, row = evidence(model), variant.format
    kinds = {row.fused if isinstance(model, FusedViT) else row.stored}
    expected = {"attention": variant.attention, "classifier": "Linear", "training": False, "dtypes": [row.dtype]}
    if found["compute_dtypes"]:
        expected["compute_dtypes"] = [row.dtype]
    faults = [f"{key} is {found[key]}, asked was {value}" for key, value in expected.items() if found[key] != value]
    if row.planned:
        chosen = getattr(model.config, "plan", {})
        kinds = {plan.KINDS[form] if isinstance(model, FusedViT) else _STORED[form] for form in chosen.values()}
        if not isinstance(model, FusedViT) and (wrong := plan.contradictions(chosen, model)):
            faults.append(f"{wrong[0]} has not the format of the plan")
    if set(found["encoder_linears"]) != kinds:
        faults.append(f"encoder linears are {found['encoder_linears']}, asked was {' and '.join(sorted(kinds))} only")
    if faults:
        raise EvidenceError(f"{variant.name}: " + "; ".join(faults))
    return found


def identity_fault(variant: Variant, frame: pd.DataFrame) -> str:
    """What in the kernels of `profile.profile` contradicts `variant`, '' if nothing does.

    FlashAttention-2's own kernels are in the namespace `flash::`, PyTorch's copy of them in `pytorch_flash::`.
    """
    kernel = profile.attention_kernel(frame)
    if profile.attention_time_us(frame) <= 0:
        return "the profiler saw no attention function"
    if frame.attrs["unattributed_share"] > ATTRIBUTION_LIMIT:
        return f"{frame.attrs['unattributed_share']:.1%} of the device time belongs to no part of the model"
    own_flash = "flash::flash_fwd" in kernel and "pytorch_flash" not in kernel
    if own_flash != variant.own_flash:
        return f"attention ran in {kernel}"
    unfused = variant.attention == "eager"
    if unfused and any(part in kernel for part in ("scaled_dot_product", "fmha", "sdpa", "flash")):
        return f"attention ran fused, in {kernel}"
    if variant.fused and variant.quantized:  # several libraries can compute these; the layers were verified
        return ""
    through_bitsandbytes = frame["operation"].str.startswith("bitsandbytes::").any()
    if through_bitsandbytes != variant.quantized:
        return "bitsandbytes was " + ("not used" if variant.quantized else "used")
    return ""


def model_mb(model: nn.Module) -> float:
    """Megabytes of everything that the model keeps in memory: parameters, buffers and quantization state."""
    seen: dict[int, int] = {}
    for module in model.modules():
        held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        for parameter in list(held):
            if isinstance(parameter, bnb.nn.Params4bit) and parameter.quant_state is not None:
                held += _state_tensors(parameter.quant_state)
            if isinstance(parameter, bnb.nn.Int8Params):
                held += [scale for scale in (parameter.SCB, getattr(module.state, "SCB", None)) if scale is not None]
        seen |= {tensor.data_ptr(): tensor.nbytes for tensor in held}
    return sum(seen.values()) / MB


def _state_tensors(state: "bnb.functional.QuantState") -> list[torch.Tensor]:
    held = [state.absmax, state.code]
    if state.nested:
        held += [state.offset, state.state2.absmax, state.state2.code]
    return [tensor for tensor in held if isinstance(tensor, torch.Tensor)]


def encoder_bytes_per_weight(model: nn.Module) -> float:
    """Bytes that the encoder's blocks keep in memory for each weight of their linears (FP16 2, NF4 about 0.52)."""
    blocks = model.blocks if isinstance(model, FusedViT) else model.vit.layers
    linears = [module for module in blocks.modules() if hasattr(module, "in_features")]
    weights = sum(module.in_features * module.out_features for module in linears)
    return sum(model_mb(block) for block in blocks) * MB / weights
