"""Linear layers by weight format behind one interface.

`layer(x, gelu=None)` takes rows x (M, K) and returns (M, N), after the GELU "erf" (exact) or "tanh" if one is given. A
layer has several implementations of the same function; which is fastest depends on M, so `tuning.tune` measures.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

import bitsandbytes as bnb
import torch
from torch import nn
from torch.nn import functional as F

from vitlib.network import quantize
from vitlib.network.kernels import dequantize, products
from vitlib.network.kernels.dequantize import BLOCK
from vitlib.network.kernels.products import Config
from vitlib.network.kernels.triton_support import use_kernels
from vitlib.network.tuning import Implementation, Tuned


def gelu_of(values: torch.Tensor, gelu: str | None) -> torch.Tensor:
    """GELU by name: "erf" (with erf), "tanh" (its approximation), None leaves `values` alone."""
    return values if gelu is None else F.gelu(values, approximate="none" if gelu == "erf" else "tanh")


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: str | None) -> torch.Tensor:
    """GELU(x weightᵀ + bias), in the product's epilogue where it has the form: cuBLASLt's tanh, the CPU's exact."""
    if bias is not None and gelu == ("tanh" if x.is_cuda else "erf"):
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    return gelu_of(F.linear(x, weight, bias), gelu)


class Quantized(NamedTuple):
    """Rows that a norm has quantized already: codes (M, K) and a fp32 scale a row (M,)."""

    codes: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype  # of what the product gives

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape


class Step(nn.Module):
    """Calls a function inside a module, so that the profiler can attribute its kernels to `part`."""

    part = "quantization"

    def forward(self, function: Callable[..., object], *inputs: object) -> object:
        return function(*inputs)


class Linear(Tuned):
    """What all formats share. Made from `layers`, with their outputs side by side.

    The tensors of a single layer are shared with it, those of several are copied into one.
    """

    def __init__(self, out_features: int, in_features: int, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.register_buffer("bias", bias)
        self.usual_gelu: str | None = None  # the one that it is called with, so that tuning times the same work
        self.dtype = torch.float16 if bias is None else bias.dtype  # of inputs and outputs
        self.norm_quantizes = False  # whether its input comes as `Quantized`
        self.prepared: torch.Tensor | None = None  # the dequantized weight, while its block runs

    def example(self, rows: int) -> tuple:
        x = torch.randn(rows, self.in_features, device=self.device).to(self.dtype)
        if self.norm_quantizes:
            x = Quantized(*products.quantize_rows(x, self.codes_dtype), self.dtype)
        return x, self.usual_gelu

    def alike(self) -> tuple:
        return type(self), self.shape, self.rows_per_picture, self.usual_gelu, self.norm_quantizes

    def forward(self, x: torch.Tensor | Quantized, gelu: str | None = None) -> torch.Tensor:
        if self.prepared is not None:
            return product(x, self.prepared, self.bias, gelu)
        return self.run_chosen(x.shape[0], x, gelu)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    @property
    def shape(self) -> str:
        return f"{self.in_features} → {self.out_features}"


class Dense(Linear):
    """FP32, FP16 or BF16 weights (N, K); those of a convolution without overlap are taken as a matrix."""

    def __init__(self, layers: Sequence[nn.Linear | nn.Conv2d]) -> None:
        weight = _joined([layer.weight.flatten(1) for layer in layers])
        super().__init__(*weight.shape, _bias(layers))
        self.dtype = weight.dtype
        self.register_buffer("weight", weight)

    def implementations(self, rows: int) -> dict[str, Implementation]:
        return {"library": Dense.library}

    def library(self, x: torch.Tensor, gelu: str | None, config: None = None) -> torch.Tensor:
        """cuBLASLt's product, or the CPU's."""
        return product(x, self.weight, self.bias, gelu)


class WeightOnly(Linear):
    """What formats with quantized weights and 16-bit products share: dequantize, then multiply."""

    def implementations(self, rows: int) -> dict[str, Implementation]:
        return {"dequantize": WeightOnly.dequantize}

    def dequantize(self, x: torch.Tensor, gelu: str | None, config: None = None) -> torch.Tensor:
        """The weight in the dtype of `x`, and the library's product with it."""
        return product(x, self.step(self.weight, x.dtype), self.bias, gelu)

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The dequantized weight (N, K) of `dtype`: products in fp32, rounded once."""
        raise NotImplementedError


class NF4(WeightOnly):
    """Packed 4-bit codes (N·K/2 bytes), row by row, a scale for each 64 of them (Dettmers et al. 2023, section 3).

    The checkpoint quantizes the scales too: they are fp32 here. The codes have the order of the kernels that run.
    """

    def __init__(self, layers: Sequence[bnb.nn.Linear4bit]) -> None:
        states = [layer.weight.quant_state for layer in layers]
        if any(getattr(state, "packing_format_for_cpu", False) for state in states):
            raise ValueError("bitsandbytes repacked these NF4 weights in a first pass: fuse a freshly loaded network")
        if found := {(s.quant_type, s.blocksize, s.shape[1] % BLOCK) for s in states} - {("nf4", BLOCK, 0)}:
            raise ValueError(f"weights must be (nf4, in blocks of {BLOCK}, 0 over in a row), these are {found}")
        super().__init__(sum(state.shape[0] for state in states), states[0].shape[1], _bias(layers))
        self.step = Step()
        packed = _joined([layer.weight.data.reshape(-1, 1) for layer in layers])
        weights = self.out_features * self.in_features
        self.repacked = weights % dequantize.GROUP == 0 and use_kernels(packed.device)
        self.register_buffer("packed", dequantize.repack_nf4(packed) if self.repacked else packed)
        self.register_buffer("absmax", _joined([quantize.scales_of(state) for state in states]))

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        shape = [self.out_features, self.in_features]
        if not self.repacked:
            return torch.ops.bitsandbytes.dequantize_4bit.default(self.packed, self.absmax, BLOCK, "nf4", shape, dtype)
        out = torch.empty(shape, dtype=dtype, device=self.packed.device)
        dequantize.dequantize_nf4(self.packed, self.absmax, out.view(-1))
        return out


class Rows(Linear):
    """What formats of 8-bit rows share: the weight (N, K) is `rows` of `codes_dtype` times a fp32 scale a row.

    The rows are bitsandbytes' own, whose first pass moves the largest value of each from the weight to the layer's
    state, or they are quantized from 16-bit weights.
    """

    codes_dtype: torch.dtype = torch.int8

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        if isinstance(layers[0], bnb.nn.Linear8bitLt):
            maxima = [layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB for layer in layers]
            rows, scales = _joined([layer.weight.data for layer in layers]), _joined(maxima).float() / quantize.INT8_MAX
        else:
            rows, scales = products.quantize_rows(_joined([layer.weight for layer in layers]), self.codes_dtype)
        super().__init__(*rows.shape, _bias(layers))
        self.step = Step()
        self.register_buffer("rows", rows)
        self.register_buffer("scales", scales)


class Int8WeightOnly(Rows, WeightOnly):
    """int8 rows, dequantized and then multiplied in the input's dtype; also of FP16 weights that are on such a grid."""

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty_like(self.rows, dtype=dtype)
        dequantize.dequantize_int8(self.rows.view(-1), self.scales, out.view(-1))
        return out


class Parts(WeightOnly):
    """Linears of several formats with the same inputs: one product with their weights side by side."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
        super().__init__(sum(part.out_features for part in parts), parts[0].in_features, bias)
        self.step, self.parts = Step(), nn.ModuleList(parts)

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.cat([part.weight if isinstance(part, Dense) else part.weight(dtype) for part in self.parts])

    def alike(self) -> tuple:
        return *super().alike(), *(type(part) for part in self.parts)


class EightBit(Rows):
    """What the products of 8-bit inputs share; these are quantized to `codes_dtype` too."""

    def configurations(self, rows: int, name: str) -> tuple[Config | None, ...]:
        sizes = rows, self.out_features, self.in_features
        return tuple(products.configs_for(*sizes, self.device)) if name == "fused" else (None,)

    def fused(self, x: torch.Tensor | Quantized, gelu: str | None, config: Config | None = None) -> torch.Tensor:
        """This project's kernel: scales, bias and GELU in its epilogue. Without it both sides are dequantized."""
        codes, x_scales = self._codes(x)
        return products.linear_8bit(codes, x_scales, self.rows, self.scales, self.bias, gelu, x.dtype, config)

    def _codes(self, x: torch.Tensor | Quantized) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(x, Quantized):
            return x.codes, x.scales
        return self.step(products.quantize_rows, x.contiguous(), self.codes_dtype)


class W8A8(EightBit):
    """int8 rows, and the input quantized row by row: LLM.int8() (Dettmers et al. 2022) without its outliers."""

    def implementations(self, rows: int) -> dict[str, Implementation]:
        fits = rows > 16 and self.out_features % 8 == 0 and self.in_features % 8 == 0
        found = {"library": W8A8.library} if fits or not self.rows.is_cuda else {}
        if use_kernels(self.rows.device):
            return found | {"fused": EightBit.fused}
        return found or {"dequantize": EightBit.fused}

    def library(self, x: torch.Tensor | Quantized, gelu: str | None, config: None = None) -> torch.Tensor:
        """torch's int8 product, and scales, bias and GELU as operators of their own."""
        codes, x_scales = self._codes(x)
        out = torch._int_mm(codes, self.rows.t()).float() * (x_scales[:, None] * self.scales)
        return gelu_of((out if self.bias is None else out + self.bias).to(x.dtype), gelu)


@functools.cache
def _scaled_product(device: torch.device, dtype: torch.dtype) -> torch.dtype | None:
    """The dtype nearest to `dtype` that torch's fp8 product with a scale a row can return here; None: none."""
    codes, ones = torch.ones(32, 32, device=device).to(torch.float8_e4m3fn), torch.ones(32, 1, device=device)
    for answer in (dtype, torch.bfloat16):  # some versions return bf16 only
        with suppress(RuntimeError, ValueError, NotImplementedError):
            torch._scaled_mm(codes, codes.t(), scale_a=ones, scale_b=ones.t(), out_dtype=answer)
            return answer
    return None


class FP8(EightBit):
    """float8_e4m3fn rows (Micikevicius et al. 2022), quantized from 16-bit weights; the input row by row too."""

    codes_dtype = torch.float8_e4m3fn

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__(layers)
        sizes_fit = self.out_features % 16 == 0 and self.in_features % 16 == 0
        self.answer = _scaled_product(self.device, layers[0].weight.dtype) if sizes_fit else None

    def implementations(self, rows: int) -> dict[str, Implementation]:
        found = {"library": FP8.library} if self.answer else {}
        return found | {"fused" if use_kernels(self.rows.device, fp8=True) else "dequantize": EightBit.fused}

    def library(self, x: torch.Tensor | Quantized, gelu: str | None, config: None = None) -> torch.Tensor:
        """torch's scaled fp8 product, and bias and GELU as operators of their own."""
        codes, x_scales = self._codes(x)
        scales = {"scale_a": x_scales[:, None], "scale_b": self.scales[None]}
        out = torch._scaled_mm(codes, self.rows.t(), **scales, out_dtype=self.answer).to(x.dtype)
        return gelu_of(out if self.bias is None else out + self.bias, gelu)


CLASSES = {kind.__name__: kind for kind in (Dense, NF4, Int8WeightOnly, W8A8, FP8)}  # names: `variants.Format.fused`


def make(layers: Sequence[nn.Linear], kinds: Sequence[str]) -> Linear:
    """One layer for linears with the same inputs, each of which becomes the class of `CLASSES` that `kinds` names."""
    if len(set(kinds)) == 1:
        return CLASSES[kinds[0]](layers)
    return Parts([CLASSES[kind]([layer]) for layer, kind in zip(layers, kinds, strict=True)])


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor of `parts` along the first dimension; a single part is not copied."""
    return parts[0].detach() if len(parts) == 1 else torch.cat([part.detach() for part in parts])


def _bias(layers: Sequence[nn.Module]) -> torch.Tensor | None:
    return None if layers[0].bias is None else _joined([layer.bias for layer in layers])
