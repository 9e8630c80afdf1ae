"""Linear layers by weight format behind one interface, and the choice of how each is computed. Level 1.

`layer(x, gelu=None)` takes rows x (M, K) and gives (M, N), after the GELU of the name given ("exact" or "tanh"). A
layer has several *paths* to the same numbers; which is fastest depends on M, so `tune` measures. Formats:

- `Dense`: fp32, fp16 or bf16;
- `NF4`: blocks of 64 with a scale each (Dettmers et al. 2023, section 3);
- `Int8WeightOnly`: int8 rows with a scale each, multiplied in 16 bit;
- `W8A8`: the same rows, the input quantized row by row too (LLM.int8, Dettmers et al. 2022, without its outliers);
- `FP8`: float8_e4m3fn rows with a scale each, the input as well (Micikevicius et al. 2022).
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable

import bitsandbytes as bnb
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

try:
    from vitlib import kernels
except ImportError:  # Triton is missing, or no kernels were written: the paths of PyTorch and bitsandbytes remain
    kernels = None

BLOCK = 64  # weights that share a scale in NF4
NESTED_BLOCK = 256  # scales that share a scale of their own
INT8_MAX, FP8_MAX = 127.0, 448.0
TINY = 1e-12  # a row of zeros has scale 0; nothing may be divided by it
AGREES = 0.02  # relative difference at most between two paths of a layer
TUNING_COLUMNS = ("layer", "shape", "rows", "path", "us", "difference", "chosen", "note")


def use_kernels(device: torch.device) -> bool:
    """Whether this project's Triton kernels can run on `device`."""
    return kernels is not None and device.type == "cuda" and bool(kernels.available())


def gelu_of(values: torch.Tensor, gelu: str | None) -> torch.Tensor:
    """GELU by name: "exact" (with erf), "tanh" (its approximation), None leaves `values` alone."""
    if gelu is None:
        return values
    return F.gelu(values, approximate="none" if gelu == "exact" else "tanh")


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: str | None) -> torch.Tensor:
    """GELU(x weightᵀ + bias), with bias and tanh GELU in the product's epilogue where there is one.

    The epilogue of cuBLASLt computes the tanh form; the CPU's version of the same function computes the exact one, so
    it is used for that form only.
    """
    if bias is not None and gelu == ("tanh" if x.is_cuda else "exact"):
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    return gelu_of(F.linear(x, weight, bias), gelu)


class Step(nn.Module):
    """A function as a module without weights, so that the profiler can book its kernels under `part`."""

    def __init__(self, part: str, function: Callable[..., object]) -> None:
        super().__init__()
        self.part, self.function = part, function

    def forward(self, *inputs: object, **settings: object) -> object:
        return self.function(*inputs, **settings)


class Linear(nn.Module):
    """What all formats share: sizes, bias, and the path by number of rows.

    `rows_per_picture` says how many rows a picture brings: patches and class token, or the class token alone.
    """

    def __init__(self, out_features: int, in_features: int, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features, self.rows_per_picture = out_features, in_features, 1
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.choices: dict[int, str] = {}

    def paths(self, rows: int) -> tuple[str, ...]:
        """The implementations that could run for `rows` rows on this device; the first is the reference."""
        raise NotImplementedError

    def choose(self, rows: int, path: str) -> None:
        """Take `path` for inputs of `rows` rows from now on."""
        if path not in self.paths(rows):
            raise ValueError(f"{type(self).__name__} has no path {path!r} here: one of {', '.join(self.paths(rows))}")
        self.choices[rows] = path

    def forward(self, x: torch.Tensor, gelu: str | None = None) -> torch.Tensor:
        path = self.choices.get(x.shape[0]) or self.paths(x.shape[0])[0]
        return getattr(self, "_" + path)(x, gelu)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _with_fused(self, *paths: str) -> tuple[str, ...]:
        return (*paths, "fused") if use_kernels(self._device()) else paths

    def _device(self) -> torch.device:
        return next(self.buffers()).device


class Dense(Linear):
    """Weights (N, K) in the dtype of the input."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(*weight.shape, bias)
        self.register_buffer("weight", weight.detach())

    def paths(self, rows: int) -> tuple[str, ...]:
        return ("library",)

    def _library(self, x: torch.Tensor, gelu: str | None) -> torch.Tensor:
        return product(x, self.weight, self.bias, gelu)


class NF4(Linear):
    """Packed 4-bit codes (N·K/2 bytes, bitsandbytes' order) with a fp32 scale for each 64 of them.

    With nested scales these are themselves uint8 codes with a scale and an offset for each 256: less memory, and a
    pass more over the scales in every call. `scales_extra_mb` is what the expanded ones weigh more.
    """

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
            kept = sum(
                s.absmax.nbytes + (s.state2.absmax.nbytes + s.state2.code.nbytes if s.nested else 0) for s in states
            )
            self.scales_extra_mb = (self.absmax.nbytes - kept) / 2**20
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
        shape = [self.out_features, self.in_features]
        return torch.ops.bitsandbytes.dequantize_4bit.default(self.packed, self.scales(), BLOCK, "nf4", shape, dtype)

    def paths(self, rows: int) -> tuple[str, ...]:
        # On a CPU bitsandbytes multiplies by dequantizing too.
        return self._with_fused("dequantize", "bitsandbytes") if self.packed.is_cuda else ("dequantize",)

    def _dequantize(self, x: torch.Tensor, gelu: str | None) -> torch.Tensor:
        return product(x, self.dequantized(x.dtype), self.bias, gelu)

    def _bitsandbytes(self, x: torch.Tensor, gelu: str | None) -> torch.Tensor:
        shape = [self.out_features, self.in_features]
        out = torch.ops.bitsandbytes.gemm_4bit.default(
            x.contiguous(), self.packed, shape, self.scales(), BLOCK, "nf4", bias=self.bias
        )
        return gelu_of(out, gelu)

    def _fused(self, x: torch.Tensor, gelu: str | None) -> torch.Tensor:
        return kernels.linear_nf4(x, self.packed, self.scales(), self.bias, gelu)


class Int8WeightOnly(Linear):
    """int8 rows (N, K) with a fp32 scale a row: weight = rows · scales / 127, multiplied in the input's dtype."""

    def __init__(self, rows: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(*rows.shape, bias)
        self.register_buffer("rows", rows.detach())
        self.register_buffer("scales", scales.detach().float() / INT8_MAX)
        self.dequantized = Step("quantization", self._dequantized)

    def _dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        # One pass: int8 times fp32 is computed in fp32 and rounded once, into the output.
        out = torch.empty_like(self.rows, dtype=dtype)
        return torch.mul(self.rows, self.scales[:, None], out=out)

    def paths(self, rows: int) -> tuple[str, ...]:
        return self._with_fused("dequantize")

    def _dequantize(self, x: torch.Tensor, gelu: str | None) -> torch.Tensor:
        return product(x, self.dequantized(x.dtype), self.bias, gelu)

    def _fused(self, x: torch.Tensor, gelu: str | None) -> torch.Tensor:
        return kernels.linear_int8(x, self.rows, self.scales, self.bias, gelu)


def quantized_rows(x: torch.Tensor, largest: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x (M, K) as int8 or float8 rows of at most `largest`, and fp32 scales (M, 1) with x ≈ rows · scales."""
    scales = x.abs().amax(dim=1, keepdim=True).float().clamp_(min=TINY) / largest
    values = x.float() / scales
    return (values.round_() if dtype == torch.int8 else values.clamp_(-largest, largest)).to(dtype), scales


class W8A8(Linear):
    """The rows and scales of `Int8WeightOnly`, and the input quantized row by row: an 8-bit product."""

    def __init__(self, rows: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(*rows.shape, bias)
        self.register_buffer("rows", rows.detach())
        self.register_buffer("scales", scales.detach().float() / INT8_MAX)
        self.quantized = Step("quantization", quantized_rows)

    def paths(self, rows: int) -> tuple[str, ...]:
        if not self.rows.is_cuda:
            return ("library",)
        sizes_fit = self.out_features % 8 == 0 and self.in_features % 8 == 0
        return self._with_fused(*(("library",) if rows > 16 and sizes_fit else ()), "bitsandbytes")

    def _library(self, x: torch.Tensor, gelu: str | None) -> torch.Tensor:
        codes, x_scales = self.quantized(x, INT8_MAX, torch.int8)
        out = torch._int_mm(codes, self.rows.t()).float() * (x_scales * self.scales)
        return gelu_of((out if self.bias is None else out + self.bias).to(x.dtype), gelu)

    def _bitsandbytes(self, x: torch.Tensor, gelu: str | None) -> torch.Tensor:
        codes, x_maxima, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(x.contiguous().half())
        out = torch.ops.bitsandbytes.int8_scaled_mm.default(
            codes, self.rows, x_maxima, self.scales * INT8_MAX, bias=self.bias, dtype=x.dtype
        )
        return gelu_of(out, gelu)

    def _fused(self, x: torch.Tensor, gelu: str | None) -> torch.Tensor:
        return kernels.linear_w8a8(x, self.rows, self.scales, self.bias, gelu)


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


class FP8(Linear):
    """float8_e4m3fn rows (N, K) with a fp32 scale a row, made from `weight`; the input is quantized row by row."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(*weight.shape, bias)
        rows, scales = quantized_rows(weight.detach(), FP8_MAX, torch.float8_e4m3fn)
        self.register_buffer("rows", rows)
        self.register_buffer("scales", scales.t().contiguous())  # (1, N)
        self.quantized = Step("quantization", quantized_rows)
        sizes_fit = self.out_features % 16 == 0 and self.in_features % 16 == 0
        self.answer = _scaled_product(weight.device, weight.dtype) if sizes_fit else None

    def paths(self, rows: int) -> tuple[str, ...]:
        return ("dequantize",) if self.answer is None else ("library", "dequantize")

    def _library(self, x: torch.Tensor, gelu: str | None) -> torch.Tensor:
        codes, x_scales = self.quantized(x, FP8_MAX, torch.float8_e4m3fn)
        out = torch._scaled_mm(codes, self.rows.t(), scale_a=x_scales, scale_b=self.scales, out_dtype=self.answer).to(
            x.dtype
        )
        return gelu_of(out if self.bias is None else out + self.bias, gelu)

    def _dequantize(self, x: torch.Tensor, gelu: str | None) -> torch.Tensor:
        codes, x_scales = self.quantized(x, FP8_MAX, torch.float8_e4m3fn)
        out = F.linear(codes.float() * x_scales, self.rows.float() * self.scales.t()).to(x.dtype)
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
def tune(module: nn.Module, batch_sizes: Iterable[int]) -> pd.DataFrame:
    """Time the paths of every linear of `module` for the rows of each batch size, and choose the fastest.

    On CUDA the layers of one shape run one after another inside a captured graph, each with its own weights, as they
    do in a pass, so that weights come from memory and not from a warm cache. On a CPU the first path is taken. A path
    that fails here or differs from the first by more than 2 % is not chosen. Returns `tuning_table(module)`.
    """
    groups: dict[tuple, list[Linear]] = defaultdict(list)
    for layer in module.modules():
        if isinstance(layer, Linear):
            groups[type(layer), layer.out_features, layer.in_features, layer.rows_per_picture].append(layer)
    rows = []
    for layers in groups.values():
        for size in sorted(set(batch_sizes)):
            rows += _tune_group(layers, size * layers[0].rows_per_picture)
    module.tuning = [*getattr(module, "tuning", []), *rows]
    return tuning_table(module)


def _tune_group(layers: list[Linear], rows: int) -> list[dict[str, object]]:
    first = layers[0]
    found = [_measured(layers, rows, path) for path in first.paths(rows)]
    usable = [row for row in found if not row["note"]]
    if not usable:
        raise RuntimeError(f"no path of {type(first).__name__} runs for {rows} rows: {found[0]['note']}")
    best = min(usable, key=lambda row: row["us"]) if usable[0]["us"] == usable[0]["us"] else usable[0]
    for layer in layers:
        layer.choose(rows, best["path"])
    shape = f"{first.in_features} → {first.out_features}"
    return [{"layer": type(first).__name__, "shape": shape, "rows": rows, **r, "chosen": r is best} for r in found]


def _measured(layers: list[Linear], rows: int, path: str) -> dict[str, object]:
    """Microseconds of one call and the relative difference to the first path; `note` says why it is not usable."""
    device, first = layers[0]._device(), layers[0]
    row = {"path": path, "us": float("nan"), "difference": 0.0, "note": ""}
    if device.type != "cuda":
        return row
    dtype = first.bias.dtype if first.bias is not None else torch.float16
    x = torch.randn(rows, first.in_features, device=device).to(dtype)
    try:
        found, expected = (getattr(first, "_" + name)(x, None).double() for name in (path, first.paths(rows)[0]))
        row["difference"] = ((found - expected).norm() / expected.norm()).item()
        if not row["difference"] <= AGREES:
            return row | {"note": "differs from the reference"}
        row["us"] = _graph_us(lambda: [getattr(layer, "_" + path)(x, None) for layer in layers]) / len(layers)
    except (RuntimeError, ValueError, NotImplementedError, AssertionError) as error:
        row["note"] = (str(error).splitlines() or [type(error).__name__])[0]
    return row


def _graph_us(call: Callable[[], object], repeats: int = 10) -> float:
    """Median microseconds of `call` replayed from a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
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

    Columns: layer (format), shape, rows, path, us (microseconds of one call; missing on a CPU), difference (relative,
    to the first path), chosen, note.
    """
    return pd.DataFrame(getattr(module, "tuning", []), columns=list(TUNING_COLUMNS))
