"""Linear layers by weight format behind one interface.

`layer(x, gelu=None)` takes rows x (M, K) and gives (M, N), after the GELU of the name given ("erf", the exact one, or
"tanh"). A layer has several implementations of the same numbers; which is fastest depends on M, so `tuning.tune`
measures. Formats:

- `Dense`: fp32, fp16 or bf16;
- `NF4`: blocks of 64 with a scale each (Dettmers et al. 2023, section 3);
- `Int8WeightOnly`: int8 rows with a scale each, dequantized, then multiplied in FP16;
- `W8A8`: the same rows, the input quantized row by row too (LLM.int8(), Dettmers et al. 2022, without its outliers);
- `FP8`: float8_e4m3fn rows with a scale each, the input as well (Micikevicius et al. 2022).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, Self

import bitsandbytes as bnb
import torch
from torch import nn
from torch.nn import functional as F

from vitlib.kernels import dequantize, products, triton_support
from vitlib.kernels.dequantize import BLOCK
from vitlib.kernels.products import Config
from vitlib.quantize import INT8_MAX
from vitlib.tuning import Implementation, Tuned


def use_kernels(device: torch.device, *, fp8: bool = False) -> bool:
    """Whether this project's Triton kernels, or those of 8-bit floating point, pay on `device`: not on a T4."""
    return device.type == "cuda" and not (triton_support.missing_fp8 if fp8 else triton_support.missing_products)(
        device
    )


def gelu_of(values: torch.Tensor, gelu: str | None) -> torch.Tensor:
    """GELU by name: "erf" (with erf), "tanh" (its approximation), None leaves `values` alone."""
    if gelu is None:
        return values
    return F.gelu(values, approximate="none" if gelu == "erf" else "tanh")


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: str | None) -> torch.Tensor:
    """GELU(x weightᵀ + bias), with bias and tanh GELU in the product's epilogue where there is one.

    The epilogue of cuBLASLt computes the tanh form; the CPU's version of the same function computes the exact one, so
    it is used for that form only.
    """
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
    """A function as a module without weights, so that the profiler can attribute its kernels to `part`."""

    def __init__(self, part: str, function: Callable[..., object]) -> None:
        super().__init__()
        self.part, self.function = part, function

    def forward(self, *inputs: object) -> object:
        return self.function(*inputs)


class Linear(Tuned):
    """What all formats share: sizes, bias, and the implementation by number of rows."""

    source: type[nn.Linear] = nn.Linear  # the class that `from_linears` takes

    def __init__(self, out_features: int, in_features: int, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.usual_gelu: str | None = None  # the one that it is called with, so that tuning times the same work
        self.dtype = torch.float16 if bias is None else bias.dtype  # of inputs and outputs
        self.norm_quantizes = False  # whether its input comes as `Quantized`
        self.prepared: torch.Tensor | None = None  # the dequantized weight, while its block runs

    @classmethod
    def from_linears(cls, layers: list[nn.Linear]) -> Self:
        """One layer with the outputs of `layers` side by side; the tensors of a single layer are shared with it."""
        raise NotImplementedError

    def example(self, rows: int) -> tuple:
        x = torch.randn(rows, self.in_features, device=self.device).to(self.dtype)
        if self.norm_quantizes:
            x = Quantized(*products.quantize_rows(x, self.codes_dtype), self.dtype)
        return x, self.usual_gelu

    def alike(self) -> tuple:
        sizes = self.out_features, self.in_features, self.rows_per_picture
        return type(self), *sizes, self.usual_gelu, self.norm_quantizes

    def forward(self, x: "torch.Tensor | Quantized", gelu: str | None = None) -> torch.Tensor:
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
        """For the tuning table."""
        return f"{self.in_features} → {self.out_features}"


class Dense(Linear):
    """Weights (N, K) in the dtype of the input."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(*weight.shape, bias)
        self.dtype = weight.dtype
        self.register_buffer("weight", weight.detach())

    @classmethod
    def from_linears(cls, layers: list[nn.Linear]) -> Self:
        return cls(_joined([layer.weight for layer in layers]), _bias(layers))

    def implementations(self, rows: int) -> dict[str, Implementation]:
        return {"library": Dense.library}

    def library(self, x: torch.Tensor, gelu: str | None, config: None = None) -> torch.Tensor:
        """cuBLASLt's product, or the CPU's."""
        return product(x, self.weight, self.bias, gelu)


class WeightOnly(Linear):
    """What formats with quantized weights and 16-bit products share: dequantize, then multiply."""

    def __init__(self, out_features: int, in_features: int, bias: torch.Tensor | None) -> None:
        super().__init__(out_features, in_features, bias)
        self.step = Step("quantization", type(self).weight)  # no bound method: it would hold the layer in a cycle

    def implementations(self, rows: int) -> dict[str, Implementation]:
        return {"dequantize": WeightOnly.dequantize}

    def dequantize(self, x: torch.Tensor, gelu: str | None, config: None = None) -> torch.Tensor:
        """The weight in the dtype of `x`, and the library's product with it."""
        return product(x, self.step(self, x.dtype), self.bias, gelu)

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The dequantized weight (N, K) of `dtype`: products in fp32, rounded once."""
        raise NotImplementedError


class NF4(WeightOnly):
    """Packed 4-bit codes (N·K/2 bytes) with a fp32 scale for each 64 of them, both row by row.

    The checkpoint's scales are quantized too (double quantization); they are expanded to fp32 here. Where this
    project's kernels run, the codes are in their order instead of bitsandbytes'.
    """

    source = bnb.nn.Linear4bit

    def __init__(self, parts: list[bnb.nn.Params4bit], bias: torch.Tensor | None) -> None:
        states = [part.quant_state for part in parts]
        _check_nf4(states)
        super().__init__(sum(state.shape[0] for state in states), states[0].shape[1], bias)
        packed = _joined([part.data.reshape(-1, 1) for part in parts])
        weights = self.out_features * self.in_features
        self.repacked = weights % dequantize.GROUP == 0 and use_kernels(packed.device)
        self.register_buffer("packed", dequantize.repack_nf4(packed) if self.repacked else packed)
        self.register_buffer("absmax", _joined([_expanded(state) for state in states]))

    @classmethod
    def from_linears(cls, layers: list[nn.Linear]) -> Self:
        return cls([layer.weight for layer in layers], _bias(layers))

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        shape = [self.out_features, self.in_features]
        if not self.repacked:
            return torch.ops.bitsandbytes.dequantize_4bit.default(self.packed, self.absmax, BLOCK, "nf4", shape, dtype)
        out = torch.empty(shape, dtype=dtype, device=self.packed.device)
        dequantize.dequantize_nf4(self.packed, self.absmax, out.view(-1))
        return out


class Int8Rows:
    """What the formats of bitsandbytes' int8 rows share: weight = rows · scales."""

    source = bnb.nn.Linear8bitLt

    @classmethod
    def from_linears(cls, layers: list[nn.Linear]) -> Self:
        rows, maxima = _joined([layer.weight.data for layer in layers]), _joined([_maxima(layer) for layer in layers])
        return cls(rows, maxima.float() / INT8_MAX, _bias(layers))


class Int8WeightOnly(Int8Rows, WeightOnly):
    """int8 rows (N, K) with a fp32 scale a row, multiplied in the input's dtype."""

    def __init__(self, rows: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(*rows.shape, bias)
        self.register_buffer("rows", rows.detach())
        self.register_buffer("scales", scales.detach())

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty_like(self.rows, dtype=dtype)
        if use_kernels(self.rows.device):
            dequantize.dequantize_int8(self.rows.view(-1), self.scales, out.view(-1))
            return out
        # One pass: int8 times fp32 is computed in fp32 and rounded once, into the output.
        return torch.mul(self.rows, self.scales[:, None], out=out)


class EightBit(Linear):
    """What the products of 8-bit inputs share: rows (N, K) of `codes_dtype` with a fp32 scale a row.

    An input that a norm has quantized already is taken as it is.
    """

    codes_dtype: torch.dtype

    def __init__(self, rows: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(*rows.shape, bias)
        self.register_buffer("rows", rows.detach())
        self.register_buffer("scales", scales.detach())
        self.quantized = Step("quantization", products.quantize_rows)

    def configurations(self, rows: int, name: str) -> tuple[Config | None, ...]:
        if name != "fused":
            return (None,)
        return tuple(products.configs_for(rows, self.out_features, self.in_features, self.device))

    def fused(self, x: "torch.Tensor | Quantized", gelu: str | None, config: Config | None = None) -> torch.Tensor:
        """This project's kernel: scales, bias and GELU in its epilogue."""
        codes, x_scales = self._codes(x)
        return products.linear_8bit(codes, x_scales, self.rows, self.scales, self.bias, gelu, x.dtype, config)

    def dequantize(self, x: "torch.Tensor | Quantized", gelu: str | None, config: None = None) -> torch.Tensor:
        """The product of both dequantized sides in fp32, for devices and sizes without any 8-bit product."""
        codes, x_scales = self._codes(x)
        out = F.linear(codes.float() * x_scales[:, None], self.rows.float() * self.scales[:, None]).to(x.dtype)
        return gelu_of(out if self.bias is None else out + self.bias, gelu)

    def _codes(self, x: "torch.Tensor | Quantized") -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(x, Quantized):
            return x.codes, x.scales
        return self.quantized(x.contiguous(), self.codes_dtype)


class W8A8(Int8Rows, EightBit):
    """The rows and scales of `Int8WeightOnly`, and the input quantized row by row: an int8 product."""

    codes_dtype = torch.int8

    def implementations(self, rows: int) -> dict[str, Implementation]:
        fits = rows > 16 and self.out_features % 8 == 0 and self.in_features % 8 == 0
        found = {"library": W8A8.library} if fits or not self.rows.is_cuda else {}
        found |= {"fused": EightBit.fused} if use_kernels(self.rows.device) else {}
        return found or {"dequantize": EightBit.dequantize}

    def library(self, x: "torch.Tensor | Quantized", gelu: str | None, config: None = None) -> torch.Tensor:
        """torch's int8 product, and scales, bias and GELU as operators of their own."""
        codes, x_scales = self._codes(x)
        out = torch._int_mm(codes, self.rows.t()).float() * (x_scales[:, None] * self.scales)
        return gelu_of((out if self.bias is None else out + self.bias).to(x.dtype), gelu)


@functools.cache
def _scaled_product(device: torch.device, dtype: torch.dtype) -> torch.dtype | None:
    """The dtype in which torch's fp8 product with a scale a row can answer here, nearest to `dtype`; None: in none."""
    a, b = (torch.ones(32, 32, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    ones = torch.ones(32, 1, device=device)
    for answer in (dtype, torch.bfloat16):  # its first versions answer in bf16 only
        try:
            torch._scaled_mm(a, b.t(), scale_a=ones, scale_b=ones.t(), out_dtype=answer)
        except (RuntimeError, ValueError, NotImplementedError, AttributeError):
            continue
        return answer
    return None


class FP8(EightBit):
    """float8_e4m3fn rows (N, K) with a fp32 scale a row, quantized from 16-bit weights; the input row by row."""

    codes_dtype = torch.float8_e4m3fn

    def __init__(self, rows: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(rows, scales, bias)
        sizes_fit = self.out_features % 16 == 0 and self.in_features % 16 == 0
        self.answer = _scaled_product(rows.device, dtype) if sizes_fit else None

    @classmethod
    def from_linears(cls, layers: list[nn.Linear]) -> Self:
        weight = _joined([layer.weight for layer in layers])
        return cls(*products.quantize_rows(weight.contiguous(), cls.codes_dtype), _bias(layers), weight.dtype)

    def implementations(self, rows: int) -> dict[str, Implementation]:
        found = {} if self.answer is None else {"library": FP8.library}
        found |= {"dequantize": EightBit.dequantize}
        return found | ({"fused": EightBit.fused} if use_kernels(self.rows.device, fp8=True) else {})

    def library(self, x: "torch.Tensor | Quantized", gelu: str | None, config: None = None) -> torch.Tensor:
        """torch's scaled fp8 product, and bias and GELU as operators of their own."""
        codes, x_scales = self._codes(x)
        out = torch._scaled_mm(
            codes, self.rows.t(), scale_a=x_scales[:, None], scale_b=self.scales[None], out_dtype=self.answer
        ).to(x.dtype)
        return gelu_of(out if self.bias is None else out + self.bias, gelu)


# ------------------------------------------------------------------------------------- from transformers' layers


CLASSES = {kind.__name__: kind for kind in (Dense, NF4, Int8WeightOnly, W8A8, FP8)}  # names: `variants.Format.fused`


def make(layers: list[nn.Linear], kind: str) -> Linear:
    """One layer of the class `kind` of `CLASSES` with the outputs of `layers` side by side.

    A single layer's tensors are shared with it, those of several are copied into one. ValueError where the stored
    format cannot become the one asked for.
    """
    stored = next(
        type_ for type_ in (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt, nn.Linear) if isinstance(layers[0], type_)
    )
    if CLASSES[kind].source is not stored:
        raise ValueError(f"a {stored.__name__} cannot be computed as {kind}: load the checkpoint that holds it")
    return CLASSES[kind].from_linears(layers)


def _check_nf4(states: list["bnb.functional.QuantState"]) -> None:
    if any(getattr(state, "packing_format_for_cpu", False) for state in states):
        raise ValueError("bitsandbytes has repacked these NF4 weights in a first pass: fuse a freshly loaded network")
    for state in states:
        if state.quant_type != "nf4" or state.blocksize != BLOCK:
            raise ValueError(f"weights are {state.quant_type} in blocks of {state.blocksize}, known is nf4 in {BLOCK}")
        if state.shape[1] % BLOCK:
            raise ValueError(f"rows of {state.shape[1]} weights do not divide by NF4's blocks of {BLOCK}")


def _expanded(state: "bnb.functional.QuantState") -> torch.Tensor:
    """The fp32 scale of each block of 64."""
    if not state.nested:
        return state.absmax.float()
    return bnb.functional.dequantize_blockwise(state.absmax, state.state2).float() + state.offset


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """One tensor of `parts` along the first dimension; a single part is not copied."""
    return parts[0].detach() if len(parts) == 1 else torch.cat([part.detach() for part in parts])


def _bias(layers: list[nn.Linear]) -> torch.Tensor | None:
    return None if layers[0].bias is None else _joined([layer.bias for layer in layers])


def _maxima(layer: bnb.nn.Linear8bitLt) -> torch.Tensor:
    """Largest absolute value of each row; the first pass moves it from the weight to the layer's state."""
    return layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
