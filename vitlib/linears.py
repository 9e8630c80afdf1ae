"""Linear layers by weight format behind one interface, and the choice of how each is computed. Level 1.

`layer(x, gelu=None)` takes rows x (M, K) and gives (M, N), after the GELU of the name given ("erf", the exact one, or
"tanh"). A layer has several *paths* to the same numbers; which is fastest depends on M, so `tune` measures. Formats:

- `Dense`: fp32, fp16 or bf16;
- `NF4`: blocks of 64 with a scale each (Dettmers et al. 2023, section 3);
- `Int8WeightOnly`: int8 rows with a scale each, multiplied in 16 bit;
- `W8A8`: the same rows, the input quantized row by row too (LLM.int8, Dettmers et al. 2022, without its outliers);
- `FP8`: float8_e4m3fn rows with a scale each, the input as well (Micikevicius et al. 2022).
"""

import functools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import bitsandbytes as bnb
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

from vitlib import files, kernels
from vitlib.kernels import BLOCK
from vitlib.quantize import relative_error

try:
    from triton.errors import TritonError  # does not compile, or needs more shared memory than there is
except ImportError:
    TritonError = RuntimeError

FAILURES = (RuntimeError, ValueError, NotImplementedError, AssertionError, TritonError)  # of a path that is tried
NESTED_BLOCK = 256  # scales that share a scale of their own
INT8_MAX = 127.0
DECODING_PAYS = 2048  # rows: each tile of rows decodes all weights again, so beyond it unpacking them once is faster
FASTER = 0.97  # of the time of a path, at most, for another to be taken instead
CALLS = 24  # of a layer's product at least in a timed graph: a graph of one kernel times its launch
AGREES = 0.02  # relative difference at most between two paths of a layer
TUNING_COLUMNS = ("layer", "shape", "batch", "rows", "path", "config", "us", "difference", "chosen", "note")


@torch.compiler.assume_constant_result  # the compiler warns of cached functions that it traces into
def use_kernels(device: torch.device, *, fp8: bool = False) -> bool:
    """Whether this project's Triton kernels, or those of 8-bit floating point, pay on `device`: not on a T4."""
    return device.type == "cuda" and not (kernels.missing_fp8 if fp8 else kernels.missing_products)(device)


# The kernels as operators: torch.compile takes them whole, and the profiler sees who launched what.

_CONFIGURED = "Tensor? bias, str gelu, str config"


@functools.cache
def _config(text: str, kind: type = kernels.Config) -> "kernels.Config | kernels.AttentionConfig | None":
    """The configuration written as JSON by `config_text`, None for ''."""
    return kind(*json.loads(text)) if text else None


def config_text(config: "kernels.Config | kernels.AttentionConfig | None") -> str:
    """A configuration of a kernel as an operator takes it and as the tuning table shows it."""
    return "" if config is None else json.dumps(config)


def _operator(name: str, schema: str, function: Callable, fake: Callable) -> Callable:
    operator = torch.library.custom_op(f"vitlib::{name}", function, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    return operator


_linear_nf4 = _operator(
    "linear_nf4",
    f"(Tensor x, Tensor packed, Tensor absmax, {_CONFIGURED}) -> Tensor",
    lambda x, packed, absmax, bias, gelu, config: kernels.linear_nf4(
        x, packed, absmax, bias, gelu or False, _config(config)
    ),
    lambda x, packed, absmax, bias, gelu, config: x.new_empty(x.shape[0], packed.shape[0]),
)
_dequantize_nf4 = _operator(
    "dequantize_nf4",
    "(Tensor packed, Tensor absmax, ScalarType dtype) -> Tensor",
    lambda packed, absmax, dtype: kernels.dequantize_nf4(packed, absmax, dtype),
    lambda packed, absmax, dtype: packed.new_empty(packed.shape[0], 2 * packed.shape[1], dtype=dtype),
)
_linear_int8 = _operator(
    "linear_int8",
    f"(Tensor x, Tensor rows, Tensor scales, {_CONFIGURED}) -> Tensor",
    lambda x, rows, scales, bias, gelu, config: kernels.linear_int8(
        x, rows, scales, bias, gelu or False, _config(config)
    ),
    lambda x, rows, scales, bias, gelu, config: x.new_empty(x.shape[0], rows.shape[0]),
)
_dequantize_int8 = _operator(
    "dequantize_int8",
    "(Tensor rows, Tensor scales, ScalarType dtype) -> Tensor",
    lambda rows, scales, dtype: kernels.dequantize_int8(rows, scales, dtype),
    lambda rows, scales, dtype: torch.empty_like(rows, dtype=dtype),
)
# Also the form without Triton of this step: `kernels` computes it in PyTorch there.
quantized_rows = _operator(
    "quantize_rows",
    "(Tensor x, ScalarType dtype) -> (Tensor, Tensor)",
    lambda x, dtype: kernels.quantize_rows(x, dtype),
    lambda x, dtype: (torch.empty_like(x, dtype=dtype), x.new_empty(x.shape[0], dtype=torch.float32)),
)
_linear_w8a8 = _operator(
    "linear_w8a8",
    f"(Tensor codes, Tensor code_scales, Tensor rows, Tensor scales, {_CONFIGURED}, ScalarType dtype) -> Tensor",
    lambda codes, code_scales, rows, scales, bias, gelu, config, dtype: kernels.linear_w8a8(
        codes, code_scales, rows, scales, bias, gelu or False, dtype, _config(config)
    ),
    lambda codes, code_scales, rows, scales, bias, gelu, config, dtype: torch.empty(
        codes.shape[0], rows.shape[0], dtype=dtype, device=codes.device
    ),
)
add_layer_norm_quantize = _operator(
    "add_layer_norm_quantize",
    "(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    lambda x, residual, weight, bias, eps, dtype: kernels.add_layer_norm_quantize(
        x, residual, weight, bias, eps, dtype
    ),
    lambda x, residual, weight, bias, eps, dtype: (
        torch.empty_like(residual),
        torch.empty_like(residual, dtype=dtype),
        residual.new_empty(residual.shape[0], dtype=torch.float32),
    ),
)
add_layer_norm_kernel = _operator(
    "add_layer_norm",
    "(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)",
    lambda x, residual, weight, bias, eps: kernels.add_layer_norm(x, residual, weight, bias, eps),
    lambda x, residual, weight, bias, eps: (torch.empty_like(residual), torch.empty_like(residual)),
)
attention_kernel = _operator(
    "attention",
    "(Tensor query, Tensor key, Tensor value, float scaling, str config) -> Tensor",
    lambda query, key, value, scaling, config: kernels.attention(
        query, key, value, scaling, _config(config, kernels.AttentionConfig)
    ),
    lambda query, key, value, scaling, config: query.new_empty(query.shape),
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
    """A function as a module without weights, so that the profiler can book its kernels under `part`."""

    def __init__(self, part: str, function: Callable[..., object]) -> None:
        super().__init__()
        self.part, self.function = part, function

    def forward(self, *inputs: object, **settings: object) -> object:
        return self.function(*inputs, **settings)


class Tuned(nn.Module):
    """A part of a network with several *paths* to the same numbers; which is fastest depends on the number of rows.

    `rows_per_picture` says how many rows a picture brings: patches and class token, or the class token alone. `shape`
    is what the tuning table shows of its sizes, `device` where it computes.
    """

    rows_per_picture = 1
    shape: str
    device: torch.device

    def __init__(self) -> None:
        super().__init__()
        self.choices: dict[int, str] = {}
        self.configs: dict[int, str] = {}

    def paths(self, rows: int) -> tuple[str, ...]:
        """The implementations that could run for `rows` rows on this device; the first is the reference."""
        raise NotImplementedError

    def configurations(self, rows: int, path: str) -> tuple[str, ...]:
        """The configurations of `path` worth timing for `rows` rows; '' is the only one of a library's function."""
        raise NotImplementedError

    def run(self, path: str, config: str, *inputs: object) -> torch.Tensor:
        """What `forward` gives for `inputs`, through one path, whatever was chosen."""
        raise NotImplementedError

    def example(self, rows: int) -> tuple:
        """Random inputs of `run` with `rows` rows, as the network would give them."""
        raise NotImplementedError

    def alike(self) -> tuple:
        """Equal for parts that do the same work with other weights: `tune` times them as one."""
        raise NotImplementedError

    def choose(self, rows: int, path: str, config: str = "") -> None:
        """Take `path` (and the kernel's `config`) for inputs of `rows` rows from now on."""
        if path not in self.paths(rows):
            raise ValueError(f"{type(self).__name__} has no path {path!r} here: one of {', '.join(self.paths(rows))}")
        self.choices[rows], self.configs[rows] = path, config

    def chosen(self, rows: int) -> tuple[str, str]:
        """The path and its configuration for inputs of `rows` rows; the first path where nothing was chosen."""
        return self.choices.get(rows) or self.paths(rows)[0], self.configs.get(rows, "")


class Linear(Tuned):
    """What all formats share: sizes, bias, and the path by number of rows."""

    def __init__(self, out_features: int, in_features: int, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.usual_gelu: str | None = None  # the one that it is called with, so that tuning times the same work
        self.dtype = torch.float16 if bias is None else bias.dtype  # of inputs and outputs
        self.norm_quantizes = False  # whether its input comes as `Quantized`
        self.ahead: torch.Tensor | None = None  # the weight in 16 bit, where it was dequantized with its block

    def configurations(self, rows: int, path: str) -> tuple[str, ...]:
        if path != "fused":
            return ("",)
        if self.kernel != "w8a8" and rows > DECODING_PAYS:
            return ()
        found = kernels.configs_for(self.kernel, rows, self.out_features, self.in_features, self.device)
        return tuple(config_text(config) for config in found)

    def example(self, rows: int) -> tuple:
        x = torch.randn(rows, self.in_features, device=self.device).to(self.dtype)
        if self.norm_quantizes:
            x = Quantized(*quantized_rows(x, self.codes_dtype), self.dtype)
        return x, self.usual_gelu

    def alike(self) -> tuple:
        sizes = self.out_features, self.in_features, self.rows_per_picture
        return type(self), *sizes, self.usual_gelu, self.norm_quantizes

    def forward(self, x: "torch.Tensor | Quantized", gelu: str | None = None) -> torch.Tensor:
        if self.ahead is not None:
            return product(x, self.ahead, self.bias, gelu)
        return self.run(*self.chosen(x.shape[0]), x, gelu)

    def run(self, path: str, config: str, x: torch.Tensor, gelu: str | None = None) -> torch.Tensor:
        """(M, N) of x (M, K) through one path, whatever was chosen."""
        return self._fused(x, gelu, config) if path == "fused" else getattr(self, "_" + path)(x, gelu)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _with_fused(self, *paths: str) -> tuple[str, ...]:
        return (*paths, "fused") if use_kernels(self.device) else paths

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

    def paths(self, rows: int) -> tuple[str, ...]:
        return ("library",)

    def _library(self, x: torch.Tensor, gelu: str | None) -> torch.Tensor:
        return product(x, self.weight, self.bias, gelu)


class NF4(Linear):
    """Packed 4-bit codes (N·K/2 bytes, bitsandbytes' order) with a fp32 scale for each 64 of them.

    With nested scales these are themselves uint8 codes with a scale and an offset for each 256: less memory, and a
    pass more over the scales in every call. `scales_extra_mb` is what the expanded ones weigh more. Where this
    project's kernels run, the codes are kept in their order instead of bitsandbytes', which rules out its product.
    """

    kernel = "nf4"

    def __init__(self, parts: list[bnb.nn.Params4bit], bias: torch.Tensor | None, *, scales: str = "expanded") -> None:
        states = [part.quant_state for part in parts]
        _check_nf4(states)
        rows, columns = sum(state.shape[0] for state in states), states[0].shape[1]
        super().__init__(rows, columns, bias)
        self.register_buffer("packed", _joined([part.data.reshape(-1, 1) for part in parts]))
        self.nested = scales == "nested" and all(state.nested for state in states)
        self.scales_extra_mb = 0.0
        if self.nested:
            self._keep_nested(states)
        else:
            self.register_buffer("absmax", _joined([_expanded(state) for state in states]))
            self.scales_extra_mb = (self.absmax.nbytes - sum(_scale_bytes(state) for state in states)) / 2**20
        self.repacked = not self.nested and columns % kernels.GROUP == 0 and use_kernels(self.packed.device)
        if self.repacked:
            self.packed, self.absmax = kernels.repack_nf4(self.packed, self.absmax, (rows, columns))
        self.dequantized = Step("quantization", self._dequantized)

    def _keep_nested(self, states: list["bnb.functional.QuantState"]) -> None:
        if len(states) > 1 and any(state.absmax.numel() % NESTED_BLOCK for state in states[:-1]):
            raise ValueError("nested scales of layers this narrow cannot be put in a row: fuse with scales='expanded'")
        self.register_buffer("absmax_codes", _joined([state.absmax for state in states]))
        self.register_buffer("absmax_table", states[0].state2.code)
        self.register_buffer("absmax_scales", _joined([state.state2.absmax for state in states]))
        offsets = [state.offset.float().expand(state.state2.absmax.numel()) for state in states]
        self.register_buffer("absmax_offsets", _joined(offsets))

    def scales(self) -> torch.Tensor:
        """The fp32 scale of each block of 64 (N·K/64)."""
        if not self.nested:
            return self.absmax
        count = self.absmax_codes.numel()
        block = torch.arange(count, device=self.absmax_codes.device) // NESTED_BLOCK
        values = self.absmax_table[self.absmax_codes.int()] * self.absmax_scales[block]
        return values + self.absmax_offsets[block]

    def _dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        if self.repacked:
            return _dequantize_nf4(self.packed, self.absmax, dtype)
        shape = [self.out_features, self.in_features]
        return torch.ops.bitsandbytes.dequantize_4bit.default(self.packed, self.scales(), BLOCK, "nf4", shape, dtype)

    def paths(self, rows: int) -> tuple[str, ...]:
        if self.repacked:
            return ("dequantize", "fused")
        # On a CPU bitsandbytes multiplies by dequantizing too.
        return ("dequantize", "bitsandbytes") if self.packed.is_cuda else ("dequantize",)

    def _dequantize(self, x: torch.Tensor, gelu: str | None) -> torch.Tensor:
        return product(x, self.dequantized(x.dtype), self.bias, gelu)

    def _bitsandbytes(self, x: torch.Tensor, gelu: str | None) -> torch.Tensor:
        shape = [self.out_features, self.in_features]
        out = torch.ops.bitsandbytes.gemm_4bit.default(
            x.contiguous(), self.packed, shape, self.scales(), BLOCK, "nf4", bias=self.bias
        )
        return gelu_of(out, gelu)

    def _fused(self, x: torch.Tensor, gelu: str | None, config: str) -> torch.Tensor:
        return _linear_nf4(x.contiguous(), self.packed, self.absmax, self.bias, gelu or "", config)


class Int8WeightOnly(Linear):
    """int8 rows (N, K) with a fp32 scale a row: weight = rows · scales / 127, multiplied in the input's dtype."""

    kernel = "int8"

    def __init__(self, rows: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(*rows.shape, bias)
        self.register_buffer("rows", rows.detach())
        self.register_buffer("scales", scales.detach().float() / INT8_MAX)
        self.dequantized = Step("quantization", self._dequantized)

    def _dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        if use_kernels(self.rows.device):
            return _dequantize_int8(self.rows, self.scales, dtype)
        # One pass: int8 times fp32 is computed in fp32 and rounded once, into the output.
        out = torch.empty_like(self.rows, dtype=dtype)
        return torch.mul(self.rows, self.scales[:, None], out=out)

    def paths(self, rows: int) -> tuple[str, ...]:
        return self._with_fused("dequantize")

    def _dequantize(self, x: torch.Tensor, gelu: str | None) -> torch.Tensor:
        return product(x, self.dequantized(x.dtype), self.bias, gelu)

    def _fused(self, x: torch.Tensor, gelu: str | None, config: str) -> torch.Tensor:
        return _linear_int8(x.contiguous(), self.rows, self.scales, self.bias, gelu or "", config)


class EightBit(Linear):
    """What the products of 8-bit inputs share: rows that come quantized from a norm are taken as they are."""

    kernel = "w8a8"
    codes_dtype: torch.dtype

    def _codes(self, x: "torch.Tensor | Quantized") -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(x, Quantized):
            return x.codes, x.scales
        return self.quantized(x.contiguous(), self.codes_dtype)

    def _fused(self, x: "torch.Tensor | Quantized", gelu: str | None, config: str) -> torch.Tensor:
        codes, x_scales = self._codes(x)
        return _linear_w8a8(codes, x_scales, self.rows, self.scales, self.bias, gelu or "", config, x.dtype)


class W8A8(EightBit):
    """The rows and scales of `Int8WeightOnly`, and the input quantized row by row: an 8-bit product."""

    codes_dtype = torch.int8

    def __init__(self, rows: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(*rows.shape, bias)
        self.register_buffer("rows", rows.detach())
        self.register_buffer("scales", scales.detach().float() / INT8_MAX)
        self.quantized = Step("quantization", quantized_rows)

    def paths(self, rows: int) -> tuple[str, ...]:
        if not self.rows.is_cuda:
            return self._with_fused("library")
        sizes_fit = self.out_features % 8 == 0 and self.in_features % 8 == 0
        library = ("library",) if rows > 16 and sizes_fit else ()
        return self._with_fused(*library, *(() if self.norm_quantizes else ("bitsandbytes",)))

    def _library(self, x: torch.Tensor, gelu: str | None) -> torch.Tensor:
        codes, x_scales = self._codes(x)
        out = torch._int_mm(codes, self.rows.t()).float() * (x_scales[:, None] * self.scales)
        return gelu_of((out if self.bias is None else out + self.bias).to(x.dtype), gelu)

    def _bitsandbytes(self, x: torch.Tensor, gelu: str | None) -> torch.Tensor:
        codes, x_maxima, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(x.contiguous().half())
        out = torch.ops.bitsandbytes.int8_scaled_mm.default(
            codes, self.rows, x_maxima, self.scales * INT8_MAX, bias=self.bias, dtype=x.dtype
        )
        return gelu_of(out, gelu)


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
    """float8_e4m3fn rows (N, K) with a fp32 scale a row, made from `weight`; the input is quantized row by row."""

    codes_dtype = torch.float8_e4m3fn

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(*weight.shape, bias)
        rows, scales = quantized_rows(weight.detach().contiguous(), torch.float8_e4m3fn)
        self.register_buffer("rows", rows)
        self.register_buffer("scales", scales)
        self.quantized = Step("quantization", quantized_rows)
        sizes_fit = self.out_features % 16 == 0 and self.in_features % 16 == 0
        self.answer = _scaled_product(weight.device, weight.dtype) if sizes_fit else None

    def paths(self, rows: int) -> tuple[str, ...]:
        paths = ("dequantize",) if self.answer is None else ("library", "dequantize")
        return (*paths, "fused") if use_kernels(self.rows.device, fp8=True) else paths

    def _library(self, x: torch.Tensor, gelu: str | None) -> torch.Tensor:
        codes, x_scales = self._codes(x)
        out = torch._scaled_mm(
            codes, self.rows.t(), scale_a=x_scales[:, None], scale_b=self.scales[None], out_dtype=self.answer
        ).to(x.dtype)
        return gelu_of(out if self.bias is None else out + self.bias, gelu)

    def _dequantize(self, x: torch.Tensor, gelu: str | None) -> torch.Tensor:
        codes, x_scales = self._codes(x)
        out = F.linear(codes.float() * x_scales[:, None], self.rows.float() * self.scales[:, None]).to(x.dtype)
        return gelu_of(out if self.bias is None else out + self.bias, gelu)


# ------------------------------------------------------------------------------------- from bitsandbytes' layers


def _check_nf4(states: list["bnb.functional.QuantState"]) -> None:
    if any(getattr(state, "packing_format_for_cpu", False) for state in states):
        raise ValueError("bitsandbytes has repacked these NF4 weights in a first pass: fuse a freshly loaded network")
    for state in states:
        if state.quant_type != "nf4" or state.blocksize != BLOCK:
            raise ValueError(f"weights are {state.quant_type} in blocks of {state.blocksize}, known is nf4 in {BLOCK}")
        if state.shape[1] % BLOCK:
            raise ValueError(f"rows of {state.shape[1]} weights do not divide by NF4's blocks of {BLOCK}")


def _expanded(state: "bnb.functional.QuantState") -> torch.Tensor:
    if not state.nested:
        return state.absmax.float()
    return bnb.functional.dequantize_blockwise(state.absmax, state.state2).float() + state.offset


def _scale_bytes(state: "bnb.functional.QuantState") -> int:
    nested = state.state2.absmax.nbytes + state.state2.code.nbytes if state.nested else 0
    return state.absmax.nbytes + nested


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """One tensor of `parts` along the first dimension; a single part is not copied."""
    return parts[0].detach() if len(parts) == 1 else torch.cat([part.detach() for part in parts])


def _int8_scales(layer: bnb.nn.Linear8bitLt) -> torch.Tensor:
    """Largest absolute value of each row; the first pass moves it from the weight to the layer's state."""
    return layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB


def of(layers: list[nn.Linear], weights: str | None = None, *, scales: str = "expanded") -> Linear:
    """One layer with the outputs of `layers` side by side, in the format `weights` ('' or None: as they are stored).

    A single layer's tensors are shared with it, those of several are copied into one. ValueError where the stored
    format cannot become the one asked for.
    """
    kind = {bnb.nn.Linear4bit: "nf4", bnb.nn.Linear8bitLt: "int8"}
    stored = next((name for type_, name in kind.items() if isinstance(layers[0], type_)), "dense")
    weights = weights or {"nf4": "nf4", "int8": "w8a16", "dense": "dense"}[stored]
    bias = None if layers[0].bias is None else _joined([layer.bias for layer in layers])
    weight = [layer.weight for layer in layers]
    if stored == "nf4" and weights == "nf4":
        return NF4(weight, bias, scales=scales)
    if stored == "int8" and weights in ("w8a16", "w8a8"):
        rows, maxima = _joined([w.data for w in weight]), _joined([_int8_scales(layer) for layer in layers])
        return (W8A8 if weights == "w8a8" else Int8WeightOnly)(rows, maxima, bias)
    if stored == "dense" and weights in ("dense", "fp8"):
        return (FP8 if weights == "fp8" else Dense)(_joined(weight), bias)
    raise ValueError(f"a layer stored as {stored} cannot be computed as {weights}: load the checkpoint that holds it")


# ------------------------------------------------------------------------------------------------------- tuning


@torch.inference_mode()
def tune(module: nn.Module, batch_sizes: Iterable[int], *, configurations: int = 2) -> pd.DataFrame:
    """Time the paths of every `Tuned` part of `module` for the rows of each batch size, and choose the fastest.

    On CUDA the parts of one shape run one after another inside a captured graph, each with its own weights, as they
    do in a pass; small ones may stay in the GPU's cache all the same. On a CPU the first path is taken. A path is left
    for another that is faster by more than 3 %, which is beyond the noise of ten replays. One that fails here or
    differs from the first by more than 2 % is not chosen. Of a kernel the first `configurations` are tried, of parts
    that no other is like only one: each is compiled once a shape, which takes a second or two. Returns
    `tuning_table(module)`.
    """
    groups: dict[tuple, list[Tuned]] = defaultdict(list)
    for part in module.modules():
        if isinstance(part, Tuned):
            groups[part.alike()].append(part)
    rows, sizes = [], sorted(set(batch_sizes))
    for parts in groups.values():
        for size in sizes:
            found = _tune_group(parts, size * parts[0].rows_per_picture, configurations)
            rows += [{**row, "batch": size} for row in found]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what the timed graphs had allocated
    before = [row for row in getattr(module, "tuning", []) if row["batch"] not in sizes]
    module.tuning = [*before, *rows]
    return tuning_table(module)


def _tune_group(parts: list[Tuned], rows: int, limit: int) -> list[dict[str, object]]:
    first, found = parts[0], []
    for path in first.paths(rows):
        left = limit if len(parts) > 1 else 1
        for config in first.configurations(rows, path):
            found.append(_measured(parts, rows, path, config))
            left -= not found[-1]["note"]  # one that does not run here leaves its turn to the next
            if not left:
                break
    usable = [row for row in found if not row["note"]]
    if not usable:
        raise RuntimeError(f"no path of {type(first).__name__} runs for {rows} rows: {found[0]['note']}")
    best = usable[0]
    for row in usable[1:]:  # comparisons with the missing times of a CPU are false
        best = row if row["us"] < FASTER * best["us"] else best
    for part in parts:
        part.choose(rows, best["path"], best["config"])
    shared = {"layer": type(first).__name__, "shape": first.shape, "rows": rows}
    return [{**shared, **row, "chosen": row is best} for row in found]


def _measured(parts: list[Tuned], rows: int, path: str, config: str) -> dict[str, object]:
    """Microseconds of one call and the relative difference to the first path; `note` says why it is not usable."""
    first, device = parts[0], parts[0].device
    row = {"path": path, "config": config, "us": float("nan"), "difference": float("nan"), "note": ""}
    if device.type != "cuda":
        return row
    inputs, times = first.example(rows), -(-CALLS // len(parts))
    try:
        ways = (path, config), (first.paths(rows)[0], "")
        row["difference"] = relative_error(*(first.run(*way, *inputs) for way in ways))
        if not row["difference"] <= AGREES:
            return row | {"note": "differs from the reference"}
        graph, _ = captured(lambda: _each(parts * times, path, config, inputs), device)
        row["us"] = replay_us(graph) / (times * len(parts))
    except FAILURES as error:
        row["note"] = files.first_line(error)
    return row


def _each(parts: list[Tuned], path: str, config: str, inputs: tuple) -> None:
    for part in parts:  # results are dropped at once: their memory is used again, as in a pass
        part.run(path, config, *inputs)


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream that graphs are captured on: libraries keep a workspace of 32 MB a stream.

    Its priority is higher than that of a second stream in a network, whose work can wait.
    """
    return torch.cuda.Stream(device, priority=-1)


def captured(call: Callable[[], object], device: torch.device) -> tuple["torch.cuda.CUDAGraph", object]:
    """`call` as a CUDA graph on `device`, and what it returned: the tensors that a replay writes."""
    stream = capture_stream(device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # lazy handles and workspaces must not be made while capturing
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = call()
    return graph, result


def replay_us(graph: "torch.cuda.CUDAGraph", repeats: int = 10) -> float:
    """Median microseconds of replaying `graph`, between two device events."""
    graph.replay()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for before, after in pairs:
        before.record()
        graph.replay()
        after.record()
    torch.cuda.synchronize()
    return 1e3 * sorted(before.elapsed_time(after) for before, after in pairs)[repeats // 2]


def tuning_table(module: nn.Module) -> pd.DataFrame:
    """What `tune` found, a row a layer shape, number of rows and path.

    Columns: layer (format), shape, batch (pictures), rows, path, us (microseconds of one call; missing on a CPU),
    difference (relative, to the first path), chosen, note.
    """
    return pd.DataFrame(getattr(module, "tuning", []), columns=list(TUNING_COLUMNS))
