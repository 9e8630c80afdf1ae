"""NF4 and int8 weights through bitsandbytes.

NF4 is the 4-bit NormalFloat of QLoRA (Dettmers et al. 2023, section 3) in blocks of 64, with double quantization: the
scales of the blocks are quantized too. int8 is LLM.int8() (Dettmers et al. 2022): one scale a row, and outlier features
above a threshold in FP16. The classifier stays in FP16: it is 0.03 % of ViT-L/16, and bitsandbytes' int8 product reads
a ViT's classifier input, a strided view of the class token, as if it were contiguous, which makes the logits of every
batch over 1 wrong.
"""

from collections.abc import Callable, Sequence

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import BitsAndBytesConfig

CLASSIFIER = "classifier"
INT8_THRESHOLD = 6.0
INT8_MAX = 127.0  # bitsandbytes' int8 weight is code · SCB / 127, with SCB the largest absolute value of the row


def config(bits: int, compute_dtype: torch.dtype, kept: Sequence[str] = (CLASSIFIER,)) -> BitsAndBytesConfig:
    """transformers' quantization settings: NF4 for 4 `bits`, LLM.int8() for 8. The modules `kept` stay in 16 bits.

    `llm_int8_skip_modules` is the list for both formats. An empty list would mean "quantize everything", and
    transformers' own default does quantize a ViT's classifier.
    """
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": compute_dtype}
    own = {"load_in_4bit": True, **nf4} if bits == 4 else {"load_in_8bit": True, "llm_int8_threshold": INT8_THRESHOLD}
    return BitsAndBytesConfig(**own, llm_int8_skip_modules=list(kept))


def quantize_linear(linear: nn.Linear, bits: int) -> nn.Module:
    """A quantized copy of `linear` (out, in) on its device: NF4 with double quantization (4 `bits`) or int8 (8)."""
    weight = linear.weight.detach()
    shape = (linear.in_features, linear.out_features, linear.bias is not None)
    if bits == 4:
        nf4 = {"compress_statistics": True, "quant_type": "nf4"}
        layer = bnb.nn.Linear4bit(*shape, compute_dtype=weight.dtype, **nf4, device="meta")
        codes = bnb.nn.Params4bit(weight.clone(), requires_grad=False, **nf4, module=layer)
        layer.weight = codes.to(weight.device)
        # bitsandbytes packs NF4 rows by 32 for CPUs with AVX-512 bf16 and asserts that they divide: 102 classes do not.
        layer.support_avx512bf16_for_cpu = layer.support_avx512bf16_for_cpu and layer.out_features % 32 == 0
    else:
        layer = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=INT8_THRESHOLD, device="meta")
        codes = bnb.nn.Int8Params(weight.cpu().clone(), requires_grad=False, has_fp16_weights=False)
        layer.weight = codes.to(weight.device)
    layer.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    return layer.eval()


def scales_of(state: "bnb.functional.QuantState") -> torch.Tensor:
    """The fp32 scale of each block of 4-bit weights (blocks,)."""
    if not state.nested:  # without double quantization
        return state.absmax.float()
    return bnb.functional.dequantize_blockwise(state.absmax, state.state2).float() + state.offset


def set_codes(layer: bnb.nn.Linear4bit, codes: torch.Tensor) -> None:
    """Replace the 4-bit codes of a layer by these (out, in), two in a byte, the first in the high half."""
    pairs = codes.to(torch.uint8).flatten().view(-1, 2)
    layer.weight.data = ((pairs[:, 0] << 4) | pairs[:, 1]).view(layer.weight.shape)


def dequantized(layer: nn.Linear) -> torch.Tensor:
    """The weight (out, in) of a bitsandbytes layer that has not run yet, in float32; of another, the weight itself."""
    weight = layer.weight.data
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(weight, layer.weight.quant_state).float()
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return weight.float() * (layer.weight.SCB.float() / INT8_MAX)[:, None]
    return weight.float()


def exchanged(module: nn.Module, twin: Callable[[str, nn.Linear], nn.Module], name: str = "") -> nn.Module:
    """`module` with `twin(name, linear)` in place of each linear; all else is shared with the original, not copied."""
    if isinstance(module, nn.Linear):
        return twin(name, module)
    clone = module.__new__(type(module))
    clone.__dict__ = module.__dict__.copy()
    clone._modules = {key: exchanged(child, twin, f"{name}.{key}".strip(".")) for key, child in module.named_children()}
    return clone


def keep_readable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking NF4 weights for the CPU in the first evaluation pass.

    Repacked weights cannot be dequantized: training and merging adapters would silently use other weights.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def parameter_count(parameter: nn.Parameter) -> int:
    """Number of weights in a parameter; of NF4, which packs two in a byte, the number before packing."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()
