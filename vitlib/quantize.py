"""NF4 and int8 weights through bitsandbytes, and what a model weighs. Level 1.

NF4 is the 4-bit NormalFloat of QLoRA (Dettmers et al. 2023, section 3) in blocks of 64 with the block scales
quantized once more; int8 is LLM.int8() (Dettmers et al. 2022): a scale a row, outlier features above a
threshold in 16 bit. The classifier stays in 16 bit: it is 0.03 % of ViT-L/16, and bitsandbytes' int8 product
reads a ViT's classifier input, a strided view of the class token, as if it were contiguous, which makes the
logits of every batch over 1 wrong.
"""

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import BitsAndBytesConfig

CLASSIFIER = "classifier"
INT8_THRESHOLD = 6.0
MB = 2**20  # "MB" is 1,048,576 bytes everywhere, as in the original study (ViT-L/16 in fp32: 1157.4)


def config(weights: str, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """transformers' quantization settings for `weights`; None for unquantized ones.

    `llm_int8_skip_modules` is the list for both formats. An empty list would mean "quantize everything", and
    transformers' own default does quantize a ViT's classifier.
    """
    if weights == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,  # its default is fp32
            llm_int8_skip_modules=[CLASSIFIER],
        )
    if weights == "int8":
        return BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=INT8_THRESHOLD, llm_int8_skip_modules=[CLASSIFIER]
        )
    return None


class Linear8bitContiguous(bnb.nn.Linear8bitLt):
    """bitsandbytes' int8 linear that is right on any input: a strided one is copied first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.contiguous())


def quantize_linear(linear: nn.Linear, bits: int) -> nn.Module:
    """A quantized copy of `linear` (out, in) on its device: NF4 with double quantization, or int8."""
    weight = linear.weight.detach()
    shape = (linear.in_features, linear.out_features, linear.bias is not None)
    if bits == 4:
        layer = bnb.nn.Linear4bit(
            *shape, compute_dtype=weight.dtype, compress_statistics=True, quant_type="nf4", device="meta"
        )
        layer.weight = bnb.nn.Params4bit(
            weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
        ).to(weight.device)
        # bitsandbytes packs NF4 rows by 32 for CPUs with AVX-512 bf16 and asserts that they divide: 102 classes do not.
        layer.support_avx512bf16_for_cpu = layer.support_avx512bf16_for_cpu and layer.out_features % 32 == 0
    else:
        layer = Linear8bitContiguous(*shape, has_fp16_weights=False, threshold=INT8_THRESHOLD, device="meta")
        layer.weight = bnb.nn.Int8Params(weight.cpu().clone(), requires_grad=False, has_fp16_weights=False).to(
            weight.device
        )
    layer.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    return layer.eval()


def quantized_copy(module: nn.Module, bits: int) -> nn.Module:
    """`module` with every linear in it quantized; other parameters are shared with the original, not copied."""
    if isinstance(module, nn.Linear):
        return quantize_linear(module, bits)
    clone = module.__new__(type(module))
    clone.__dict__ = module.__dict__.copy()
    clone._modules = {name: quantized_copy(child, bits) for name, child in module.named_children()}
    return clone


def dequantize_int8(model: nn.Module) -> nn.Module:
    """`model` with every int8 linear replaced, in place, by a plain fp16 one with the weights that its rows stand for.

    What weight-only int8 computes, without its kernels: nothing of the input is quantized. Before the first pass.
    """
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, bnb.nn.Linear8bitLt):
                plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
                weight = layer.weight.data.float() * (layer.weight.SCB.float() / 127)[:, None]
                plain.weight, plain.bias = nn.Parameter(weight.half(), requires_grad=False), layer.bias
                setattr(parent, name, plain)
    return model


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of `expected`, in float64; both of one shape and on one device."""
    expected = expected.double()
    return ((found.double() - expected).norm() / expected.norm()).item()


def keep_readable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking NF4 weights for the CPU in the first evaluation pass.

    Repacked weights cannot be dequantized any more: training on them after a validation, and merging adapters into
    them, would silently use other weights.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def parameter_count(parameter: nn.Parameter) -> int:
    """Numbers in a parameter; of NF4, which packs two in a byte, as many as before packing."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def model_mb(model: nn.Module) -> float:
    """Megabytes of everything the model must keep in memory: parameters, buffers and quantization state."""
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
