"""Rows quantized to 8 bits, and the product of two such matrices with bias and GELU in its epilogue."""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vitlib.network.kernels import triton_support
from vitlib.network.kernels.triton_support import ROW_LIMIT, check_matrix, jit, tl, triton

FP8 = torch.float8_e4m3fn
LIMITS = {torch.int8: 127.0, FP8: 448.0}  # largest absolute value of a code
TINY = 1e-30  # a row whose largest value is smaller quantizes to zeros


class Config(NamedTuple):
    """Tile of rows of x (bm), of outputs (bn) and of the sum (bk), and the parts that the sum is split into."""

    bm: int
    bn: int
    bk: int
    split_k: int = 1
    warps: int = 4
    stages: int = 3

    @property
    def shared_bytes(self) -> int:
        """Estimate of the shared memory that the pipeline's buffers take."""
        return self.stages * self.bk * (self.bn + self.bm) + 1024


# The best first, as measured on an H200; the others serve cards with less shared memory. split_k 0: as many parts as
# fill the device.
FEW_ROWS = 512
FOR_FEW_ROWS = (
    *(Config(64, 128, 128, 1, 4, 4), Config(64, 64, 128, 0, 4, 4)),
    *(Config(64, 64, 128, 1, 4, 4), Config(32, 64, 64, 1, 4, 3)),
)
FOR_MANY_ROWS = (
    *(Config(128, 256, 128, 1, 8, 4), Config(128, 256, 128, 1, 8, 3)),
    *(Config(128, 128, 64, 1, 4, 4), Config(64, 64, 64, 1, 4, 3)),
)


def configs(m: int, n: int, k: int, shared_bytes: int = 227 * 1024, processors: int = 132) -> list[Config]:
    """Configurations worth timing for a (m, k) × (n, k)ᵀ product, the default first; device sizes are Hopper's.

    Where a product has few tiles the sum is split in up to 8 parts, so that every processor gets one.
    """
    found = []
    for config in FOR_FEW_ROWS if m <= FEW_ROWS else FOR_MANY_ROWS:
        tiles, split = math.ceil(m / config.bm) * math.ceil(n / config.bn), config.split_k or 1
        most = 1 if config.split_k else min(8, math.ceil(k / config.bk), processors * 1.25 / tiles)
        while split * 2 <= most:
            split *= 2
        found += [config._replace(split_k=split)] if config.shared_bytes <= shared_bytes else []
    return list(dict.fromkeys(found))


@functools.cache
def configs_for(m: int, n: int, k: int, device: torch.device) -> list[Config]:
    """`configs` for the shared memory and the processors of `device`."""
    if device.type != "cuda":
        return configs(m, n, k)
    properties = torch.cuda.get_device_properties(device)
    return configs(m, n, k, properties.shared_memory_per_block_optin, properties.multi_processor_count)


@jit
def _place(tile, m, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Tile indices (of M, of N): 8 tiles of M run beside each other, so that they share weights in the L2 cache."""
    tiles_m = tl.cdiv(m, BM)
    band = 8 * tl.cdiv(N, BN)
    first = (tile // band) * 8
    height = tl.minimum(tiles_m - first, 8)
    return first + (tile % band) % height, (tile % band) // height


@jit
def _gelu(y, GELU: tl.constexpr):
    if GELU == "tanh":  # y/2 (1 + tanh z) = y sigmoid(2 z)
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    elif GELU == "erf":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    return y


@jit(do_not_specialize=["m"])
def _product_kernel(
    q, q_scale, weights, scale, bias, out, m,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STEPS: tl.constexpr,
    PARTIALS: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = _place(tl.program_id(0), m, N, BM, BN)
    part = tl.program_id(1)
    rows, cols, j = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    safe_rows, safe_cols = tl.minimum(rows, m - 1), cols
    if N % BN != 0:
        safe_cols = tl.minimum(cols, N - 1)
    q_at = q + safe_rows[:, None] * K + j[None, :]
    w_at = weights + safe_cols[None, :] * K + j[:, None]
    acc = tl.zeros((BM, BN), dtype=SUM)
    for step in range(part * STEPS, tl.minimum(part * STEPS + STEPS, (K + BK - 1) // BK)):
        k = step * BK
        if K % BK == 0:
            a, b = tl.load(q_at + k), tl.load(w_at + k)
        else:
            a = tl.load(q_at + k, mask=(k + j)[None, :] < K, other=0.0)
            b = tl.load(w_at + k, mask=(k + j)[:, None] < K, other=0.0)
        acc = tl.dot(a, b, acc, out_dtype=SUM)
    y = acc.to(tl.float32) * tl.load(q_scale + safe_rows)[:, None] * tl.load(scale + safe_cols)[None, :]
    mask = (rows[:, None] < m) & (cols[None, :] < N)
    at = rows[:, None] * N + cols[None, :]
    if PARTIALS:  # part `part` of (S, M, N), which `_reduce_kernel` finishes
        tl.store(out + part.to(tl.int64) * m * N + at, y, mask=mask)
    else:
        if BIAS:
            y += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        tl.store(out + at, _gelu(y, GELU).to(out.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["m"])
def _reduce_kernel(
    partials, bias, out, m,
    N: tl.constexpr, SPLIT: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    mask, at = cols < N, tl.program_id(0).to(tl.int64) * N + cols
    y = tl.zeros((BN,), dtype=tl.float32)
    for part in tl.static_range(SPLIT):
        y += tl.load(partials + part * m.to(tl.int64) * N + at, mask=mask, other=0.0)
    if BIAS:
        y += tl.load(bias + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, _gelu(y, GELU).to(out.dtype.element_ty), mask=mask)


@jit
def quantized(values, LIMIT: tl.constexpr, INTEGER: tl.constexpr):
    """A row in steps of its scale, still in fp32, and that scale. Adding 1.5 · 2²³ rounds halves to even."""
    largest = tl.max(tl.abs(values), axis=0)
    inverse = tl.where(largest > 1e-30, LIMIT / tl.maximum(largest, 1e-30), 0.0)
    steps = tl.minimum(tl.maximum(values * inverse, -LIMIT), LIMIT)
    if INTEGER:
        steps = (steps + 12582912.0) - 12582912.0
    return steps, largest / LIMIT


@jit
def _quantize_kernel(x, q, q_scale, K: tl.constexpr, BK: tl.constexpr, LIMIT: tl.constexpr, INTEGER: tl.constexpr):
    row, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BK)
    values = tl.load(x + row * K + cols, mask=cols < K, other=0.0).to(tl.float32)
    steps, step = quantized(values, LIMIT, INTEGER)
    tl.store(q + row * K + cols, steps.to(q.dtype.element_ty), mask=cols < K)
    tl.store(q_scale + row, step)


def quantize_rows(x: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """(q (M, K) int8 or float8_e4m3fn, scale (M,) fp32), x ≈ q · scale, each row by its largest value. x contiguous."""
    check_matrix("x", x)
    if not triton_support.use_kernels(x.device, fp8=dtype == FP8) or x.shape[1] > ROW_LIMIT:
        return plain_quantize(x.float(), dtype)
    m, k = x.shape
    q, scale = x.new_empty(m, k, dtype=dtype), x.new_empty(m, dtype=torch.float32)
    with torch.cuda.device_of(x):
        sizes = k, triton.next_power_of_2(k)
        _quantize_kernel[(m,)](x, q, scale, *sizes, LIMITS[dtype], dtype == torch.int8, num_warps=4)
    return q, scale


def plain_quantize(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of fp32 values (M, K) in PyTorch."""
    limit, largest = LIMITS[dtype], values.abs().amax(dim=1)
    inverse = torch.where(largest > TINY, limit / largest.clamp_min(TINY), torch.zeros_like(largest))
    steps = (values * inverse[:, None]).clamp(-limit, limit)
    return (steps.round() if dtype == torch.int8 else steps).to(dtype), largest / limit


def linear_8bit(
    q: Tensor, q_scale: Tensor, rows: Tensor, scale: Tensor, bias: Tensor | None = None,
    gelu: str | None = None, dtype: torch.dtype = torch.float16, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """(M, N) of `dtype`: (q · q_scale) times (rows · scale)ᵀ, plus `bias` (N,), through the GELU "tanh" or "erf".

    q (M, K) and rows (N, K) are both int8 (summed in int32) or both float8_e4m3fn (in fp32); q_scale (M,) and
    scale (N,) fp32. `config` None takes the first of `configs_for`. ValueError where matrices disagree.
    """
    check_matrix("q", q)
    check_matrix("rows", rows, q.shape[1])
    if not triton_support.use_kernels(q.device, fp8=q.dtype == FP8):
        y = F.linear(q.float() * q_scale[:, None], rows.float() * scale[:, None])
        y = y if bias is None else y + bias
        return (F.gelu(y, approximate="tanh" if gelu == "tanh" else "none") if gelu else y).to(dtype)
    m, n, k = q.shape[0], *rows.shape
    if m * n >= 2**31:
        raise ValueError(f"an output {m} x {n} has more numbers than the kernels can address: use smaller batches")
    config = config or configs_for(m, n, k, q.device)[0]
    parts = config.split_k > 1
    shape = (config.split_k, m, n) if parts else (m, n)
    out = torch.empty(shape, dtype=torch.float32 if parts else dtype, device=q.device)
    with torch.cuda.device_of(out):
        _product_kernel[(math.ceil(m / config.bm) * math.ceil(n / config.bn), config.split_k)](
            *(q, q_scale, rows, scale, out if bias is None else bias, out, m),
            **{"N": n, "K": k, "BM": config.bm, "BN": config.bn, "BK": config.bk},
            **{"STEPS": math.ceil(math.ceil(k / config.bk) / config.split_k), "PARTIALS": parts},
            **{"BIAS": bias is not None, "GELU": gelu or "", "SUM": tl.float32 if q.dtype == FP8 else tl.int32},
            **{"num_warps": config.warps, "num_stages": config.stages},
        )
        return _reduced(out, bias, gelu, dtype) if parts else out


def _reduced(partials: Tensor, bias: Tensor | None, gelu: str | None, dtype: torch.dtype) -> Tensor:
    """(M, N) of `dtype`: the sum over parts (S, M, N) fp32, plus `bias` (N,), through GELU where asked."""
    split, m, n = partials.shape
    out, block = partials.new_empty(m, n, dtype=dtype), min(1024, triton.next_power_of_2(n))
    sizes = {"SPLIT": split, "BN": block, "BIAS": bias is not None, "GELU": gelu or "", "num_warps": 4}
    _reduce_kernel[(m, math.ceil(n / block))](partials, out if bias is None else bias, out, m, n, **sizes)
    return out
