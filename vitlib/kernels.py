"""Products with quantized weights, the norms between them and attention, as Triton kernels. Level 1.

Every public function has a plain PyTorch form that runs on a CPU, in fp32, or without Triton and agrees within
rounding; `missing_triton` says which one runs. Activations are contiguous (M, K) in fp16 or bf16 and sums are fp32
(int32 for int8 × int8). The first call of a shape compiles and places small tables: make it before capturing a CUDA
graph; later calls allocate with `torch.empty` only and never wait for the device.

The kernels for quantized weights and 16-bit activations compute the transposed tile, weights × activationsᵀ, because
Hopper's matrix instruction reads its first operand from registers: the decoded weights never touch memory.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch.nn import functional as F

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # the plain forms remain
    triton = None

    class tl:
        """Stands where the kernels below, which nothing calls now, name Triton's language."""

        constexpr = object

    def jit(function=None, **_):
        return function or (lambda kernel: kernel)


GROUP = 128  # columns of one repacked NF4 group: two blocks of 64, each with one scale a row
BLOCK = 64  # weights that share an NF4 scale
ROW_LIMIT = 4096  # longest row that one program normalises or quantizes
RUN_TILES = {"nf4": (32, 4), "int8": (8192, 4)}  # of runs: groups, or numbers, of a program, and its warps
LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
TINY = 1e-30  # a row whose largest value is smaller quantizes to zeros

# The 16 values of NF4 (Dettmers et al. 2023, appendix E) in fp32: quantiles of a normal distribution in [-1, 1].
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class Config(NamedTuple):
    """How a product is cut: tile of rows of x (bm), of outputs (bn) and of the sum (bk); parts of the sum (split_k).

    `decode` "asm" converts weights with byte permutations in registers, "table" with lookups or plain conversions.
    """

    bm: int
    bn: int
    bk: int
    split_k: int = 1
    warps: int = 4
    stages: int = 3
    decode: str = "table"

    def shared_bytes(self, kind: str) -> int:
        """Estimate of the shared memory that the pipeline's buffers take."""
        weights, activations = {"nf4": (0.5, 2), "int8": (1, 2), "w8a8": (1, 1)}[kind]
        return int(self.stages * self.bk * (self.bn * weights + self.bm * activations)) + 1024


# By the number of rows M: one or two images, a few, many. The first that fits is the default; none is specific to M.
CANDIDATES = {
    "nf4": {
        512: (
            Config(64, 128, 128, 0, 4, 3, "asm"),
            Config(128, 64, 128, 0, 4, 3, "asm"),
            Config(256, 64, 128, 0, 8, 2, "asm"),
            Config(64, 64, 128, 0, 4, 4, "asm"),
            Config(128, 128, 128, 0, 8, 3, "asm"),
            Config(128, 64, 128, 0, 4, 3),
            Config(64, 64, 128, 0, 4, 4),
            Config(32, 64, 128, 1, 4, 4),
        ),
        None: (
            Config(128, 128, 128, 1, 8, 3, "asm"),
            Config(256, 128, 128, 1, 8, 2, "asm"),
            Config(128, 64, 128, 1, 4, 3, "asm"),
            Config(128, 128, 128, 1, 8, 3),
            Config(64, 64, 128, 1, 4, 3),
        ),
    },
    "int8": {
        512: (
            Config(64, 128, 64, 0, 4, 4, "asm"),
            Config(256, 64, 64, 0, 8, 3, "asm"),
            Config(128, 64, 64, 0, 4, 4, "asm"),
            Config(64, 64, 128, 0, 4, 4, "asm"),
            Config(128, 64, 64, 0, 4, 4),
            Config(64, 64, 64, 0, 4, 5),
            Config(32, 64, 64, 1, 4, 4),
        ),
        None: (
            Config(128, 128, 64, 1, 8, 4, "asm"),
            Config(128, 64, 64, 1, 4, 4, "asm"),
            Config(128, 128, 64, 1, 8, 4),
            Config(64, 64, 64, 1, 4, 3),
        ),
    },
    "w8a8": {
        512: (
            Config(64, 128, 128, 1, 4, 4),
            Config(64, 64, 128, 0, 4, 4),
            Config(64, 64, 128, 1, 4, 4),
            Config(128, 64, 128, 1, 4, 4),
            Config(64, 32, 128, 1, 4, 5),
            Config(128, 128, 128, 0, 8, 3),
            Config(64, 64, 256, 1, 4, 3),
            Config(32, 64, 64, 1, 4, 3),
        ),
        None: (
            Config(128, 256, 128, 1, 8, 4),
            Config(128, 256, 128, 1, 8, 3),
            Config(256, 128, 128, 1, 8, 3),
            Config(128, 128, 128, 1, 8, 4),
            Config(128, 128, 128, 1, 4, 4),
            Config(128, 128, 64, 1, 4, 4),
            Config(64, 128, 128, 1, 4, 4),
            Config(64, 64, 64, 1, 4, 3),
        ),
    },
}


def configs(kind: str, m: int, n: int, k: int, shared_bytes: int = 227 * 1024, processors: int = 132) -> list[Config]:
    """Up to 8 configurations worth timing for a (m, k) × (n, k)ᵀ product of `kind` "nf4", "int8" or "w8a8".

    `shared_bytes` is what one program may use and `processors` how many the device has (the defaults: Hopper).
    Where a product has few tiles the sum is cut in up to 8 parts, so that every processor gets one.
    """
    if kind not in CANDIDATES:
        raise ValueError(f"unknown kind of product {kind!r}: known are {', '.join(CANDIDATES)}")
    table = CANDIDATES[kind][512 if m <= 512 else None]
    found = [_filled(config, m, n, k, processors) for config in table if config.shared_bytes(kind) <= shared_bytes]
    smallest = Config(32, 32, 128 if kind == "nf4" else 64, 1, 4, 2)
    return list(dict.fromkeys(found)) or [smallest]


def _filled(config: Config, m: int, n: int, k: int, processors: int) -> Config:
    """`config` with its free split (0) set so that the tiles fill the device."""
    tiles, steps, split = math.ceil(m / config.bm) * math.ceil(n / config.bn), math.ceil(k / config.bk), 1
    if config.split_k:
        return config
    while tiles * split * 2 <= processors * 1.25 and split * 2 <= min(8, steps):
        split *= 2
    return config._replace(split_k=split)


@functools.cache
def default_config(kind: str, m: int, n: int, k: int, device: torch.device) -> Config:
    """The configuration that runs when none is given: the first candidate that fits `device`."""
    return configs_for(kind, m, n, k, device)[0]


def configs_for(kind: str, m: int, n: int, k: int, device: torch.device) -> list[Config]:
    """`configs` for the shared memory and the processors of `device`."""
    if device.type != "cuda":
        return configs(kind, m, n, k)
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 64 * 1024)
    return configs(kind, m, n, k, shared, properties.multi_processor_count)


@functools.cache
def missing_triton(device: torch.device) -> str:
    """Why the Triton kernels cannot run on `device` ('' if they can): then the plain PyTorch forms run."""
    if triton is None:
        return "the package triton is not installed"
    interpreted = [not isinstance(function, triton.JITFunction) for function in (_reduce_kernel, tl.sum)]
    if any(interpreted):
        return "" if all(interpreted) else "TRITON_INTERPRET was set after triton was imported: set it before"
    return "" if device.type == "cuda" else "Triton kernels need a CUDA device"


@functools.cache
def missing_products(device: torch.device) -> str:
    """Why the products cannot run as kernels on `device` ('' if they can); norms and unpacking may all the same.

    Triton reaches tensor cores from Ampere on: on a T4 its products would be slower than unpacking and cuBLAS.
    """
    if reason := missing_triton(device):
        return reason
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        return f"Triton's products need compute capability 8.0 (Ampere), {name} has less"
    return ""


def missing_fp8(device: torch.device) -> str:
    """Why 8-bit floating point products cannot run as kernels on `device` ('' if they can)."""
    if reason := missing_triton(device):
        return reason
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return f"fp8 needs compute capability 8.9 (Ada, Hopper), {torch.cuda.get_device_name(device)} has less"
    return ""


# ---------------------------------------------------------------------------------------------------------- decoding


@functools.cache
def _table(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(NF4, dtype=torch.float32).to(dtype).to(device)


@functools.cache
def _nf4_assembly(dtype: torch.dtype) -> str:
    """PTX that turns 4 bytes of NF4 codes ($4) into 4 values of the high ($0, $1) and 4 of the low nibbles ($2, $3).

    `prmt` picks 4 of 8 bytes by 4-bit selectors, of which 3 bits count: so one picks from codes 0 to 7, one from
    8 to 15, and a third between both by the codes' top bits; once for the values' low and once for their high bytes.
    """
    values = torch.tensor(NF4, dtype=torch.float32).to(dtype).view(torch.int16).tolist()
    low, high = [v & 255 for v in values], [v >> 8 & 255 for v in values]
    words = [sum(half[i + j] << 8 * j for j in range(4)) for half in (low, high) for i in range(0, 16, 4)]
    l0, l1, l2, l3, h0, h1, h2, h3 = (f"0x{word:08x}" for word in words)
    lines = [".reg .b32 x, t, s, p, q, u, v;"]
    for pair in (0, 1):  # two bytes, which are four codes, at a time
        lines += [f"shr.u32 x, $4, {16 * pair};", "and.b32 t, x, 0x7777;"]
        lines += ["and.b32 s, x, 0x8888;", "shr.u32 s, s, 1;", "or.b32 s, s, 0x3210;"]
        lines += [f"prmt.b32 p, {l0}, {l1}, t;", f"prmt.b32 q, {l2}, {l3}, t;", "prmt.b32 u, p, q, s;"]
        lines += [f"prmt.b32 p, {h0}, {h1}, t;", f"prmt.b32 q, {h2}, {h3}, t;", "prmt.b32 v, p, q, s;"]
        lines += [f"prmt.b32 ${pair}, u, v, 0x7351;", f"prmt.b32 ${pair + 2}, u, v, 0x6240;"]
    return "{ " + " ".join(lines) + " }"


# 4 int8 ($2) to fp16 ($0, $1): 0x64 above the byte v + 128 is the half 1024 + 128 + v, from which 1152 is taken.
INT8_ASSEMBLY = (
    "{ .reg .b32 x, c; xor.b32 x, $2, 0x80808080; mov.b32 c, 0x64806480; prmt.b32 $0, x, 0x64646464, 0x5150; "
    "prmt.b32 $1, x, 0x64646464, 0x5352; sub.f16x2 $0, $0, c; sub.f16x2 $1, $1, c; }"
)


@jit
def _decode_nf4(codes, table, ASM: tl.constexpr):
    """Values of the high and of the low nibbles of a tile of bytes, before their scales."""
    if ASM == "":
        high = tl.load(table + (codes >> 4).to(tl.int32))
        low = tl.load(table + (codes & 15).to(tl.int32))
    else:
        high, low = tl.inline_asm_elementwise(
            asm=ASM,
            constraints="=r,=r,=r,=r,r",
            args=[codes],
            dtype=(table.dtype.element_ty, table.dtype.element_ty),
            is_pure=True,
            pack=4,
        )
    return high, low


@jit
def _decode_int8(values, DTYPE: tl.constexpr, ASM: tl.constexpr):
    if ASM == "":
        return values.to(DTYPE)
    else:
        return tl.inline_asm_elementwise(
            asm=ASM, constraints="=r,=r,r", args=[values], dtype=tl.float16, is_pure=True, pack=4
        )


# ---------------------------------------------------------------------------------------------------- parts of kernels


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


@jit
def _store_tile(
    y, out, bias, rows, cols, part, m, N: tl.constexpr, PARTIALS: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr
):
    """Store a fp32 tile (BM, BN): as it is into part `part` of (S, M, N), or finished into (M, N)."""
    mask = (rows[:, None] < m) & (cols[None, :] < N)
    at = rows[:, None] * N + cols[None, :]
    if PARTIALS:
        tl.store(out + part.to(tl.int64) * m * N + at, y, mask=mask)
    else:
        if BIAS:
            y += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        tl.store(out + at, _gelu(y, GELU).to(out.dtype.element_ty), mask=mask)


@jit
def _quantized(values, LIMIT: tl.constexpr, INTEGER: tl.constexpr):
    """A row in steps of its scale, still in fp32, and that scale. Adding 1.5 · 2²³ rounds halves to even."""
    largest = tl.max(tl.abs(values), axis=0)
    inverse = tl.where(largest > 1e-30, LIMIT / tl.maximum(largest, 1e-30), 0.0)
    steps = tl.minimum(tl.maximum(values * inverse, -LIMIT), LIMIT)
    if INTEGER:
        steps = (steps + 12582912.0) - 12582912.0
    return steps, largest / LIMIT


# ------------------------------------------------------------------------------------------------------------- kernels


@jit(do_not_specialize=["m"])
def _nf4_kernel(
    x,
    packed,
    absmax,
    table,
    bias,
    out,
    m,
    N: tl.constexpr,
    K: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STEPS: tl.constexpr,
    PARTIALS: tl.constexpr,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    ASM: tl.constexpr,
    WIDE: tl.constexpr,
):
    tile_m, tile_n = _place(tl.program_id(0), m, N, BM, BN)
    part = tl.program_id(1)
    rows, cols = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    safe_rows, safe_cols = tl.minimum(rows, m - 1), cols
    if N % BN != 0:
        safe_cols = tl.minimum(cols, N - 1)
    j = tl.arange(0, 64)
    bytes_at = packed + safe_cols[:, None] * (K // 2) + j[None, :]
    x_at = x + safe_rows[None, :] * K + j[:, None]
    scale_at = absmax + safe_cols * SCALE_N
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for group in range(part * STEPS, tl.minimum(part * STEPS + STEPS, K // 128)):
        codes = tl.load(bytes_at + group * 64)
        x_high, x_low = tl.load(x_at + group * 128), tl.load(x_at + group * 128 + 64)
        s_high = tl.load(scale_at + 2 * group * SCALE_K).to(table.dtype.element_ty)
        s_low = tl.load(scale_at + (2 * group + 1) * SCALE_K).to(table.dtype.element_ty)
        high, low = _decode_nf4(codes, table, ASM)
        if WIDE:  # the interpreter computes with the bit patterns of bf16
            high, low, x_high, x_low = (
                high.to(tl.float32),
                low.to(tl.float32),
                x_high.to(tl.float32),
                x_low.to(tl.float32),
            )
            s_high, s_low = s_high.to(tl.float32), s_low.to(tl.float32)
        high, low = high * s_high[:, None], low * s_low[:, None]
        acc = tl.dot(high, x_high, acc)
        acc = tl.dot(low, x_low, acc)
    _store_tile(tl.trans(acc), out, bias, rows, cols, part, m, N, PARTIALS, BIAS, GELU)


@jit(do_not_specialize=["m"])
def _int8_kernel(
    x,
    weights,
    scale,
    bias,
    out,
    m,
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STEPS: tl.constexpr,
    PARTIALS: tl.constexpr,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    ASM: tl.constexpr,
    WIDE: tl.constexpr,
):
    tile_m, tile_n = _place(tl.program_id(0), m, N, BM, BN)
    part = tl.program_id(1)
    rows, cols, j = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    safe_rows, safe_cols = tl.minimum(rows, m - 1), cols
    if N % BN != 0:
        safe_cols = tl.minimum(cols, N - 1)
    w_at = weights + safe_cols[:, None] * K + j[None, :]
    x_at = x + safe_rows[None, :] * K + j[:, None]
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for step in range(part * STEPS, tl.minimum(part * STEPS + STEPS, (K + BK - 1) // BK)):
        k = step * BK
        if K % BK == 0:
            w, xs = tl.load(w_at + k), tl.load(x_at + k)
        else:
            w = tl.load(w_at + k, mask=(k + j)[None, :] < K, other=0)
            xs = tl.load(x_at + k, mask=(k + j)[:, None] < K, other=0.0)
        if WIDE:  # the interpreter computes with the bit patterns of bf16
            w, xs = w.to(tl.float32), xs.to(tl.float32)
        else:
            w = _decode_int8(w, x.dtype.element_ty, ASM)
        acc = tl.dot(w, xs, acc)
    acc *= tl.load(scale + safe_cols)[:, None]
    _store_tile(tl.trans(acc), out, bias, rows, cols, part, m, N, PARTIALS, BIAS, GELU)


@jit(do_not_specialize=["m"])
def _w8a8_kernel(
    q,
    q_scale,
    weights,
    scale,
    bias,
    out,
    m,
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STEPS: tl.constexpr,
    PARTIALS: tl.constexpr,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    SUM: tl.constexpr,
):
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
    _store_tile(y, out, bias, rows, cols, part, m, N, PARTIALS, BIAS, GELU)


@jit(do_not_specialize=["m"])
def _reduce_kernel(
    partials,
    bias,
    out,
    m,
    N: tl.constexpr,
    SPLIT: tl.constexpr,
    BN: tl.constexpr,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
):
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    mask, at = cols < N, tl.program_id(0).to(tl.int64) * N + cols
    y = tl.zeros((BN,), dtype=tl.float32)
    for part in tl.static_range(SPLIT):
        y += tl.load(partials + part * m.to(tl.int64) * N + at, mask=mask, other=0.0)
    if BIAS:
        y += tl.load(bias + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, _gelu(y, GELU).to(out.dtype.element_ty), mask=mask)


@jit
def _dequantize_nf4_kernel(
    packed,
    absmax,
    table,
    out,
    N: tl.constexpr,
    K: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    BN: tl.constexpr,
):
    rows, group, j = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1), tl.arange(0, 64)
    mask = rows < N
    both = mask[:, None] & (j >= 0)[None, :]
    codes = tl.load(packed + rows[:, None] * (K // 2) + group * 64 + j[None, :], mask=both, other=0)
    s_high = tl.load(absmax + rows * SCALE_N + 2 * group * SCALE_K, mask=mask, other=0.0).to(tl.float32)
    s_low = tl.load(absmax + rows * SCALE_N + (2 * group + 1) * SCALE_K, mask=mask, other=0.0).to(tl.float32)
    high, low = _decode_nf4(codes, table, "")
    at = out + rows[:, None] * K + group * 128 + j[None, :]
    tl.store(at, (high * s_high[:, None]).to(out.dtype.element_ty), mask=both)
    tl.store(at + 64, (low * s_low[:, None]).to(out.dtype.element_ty), mask=both)


@jit
def _dequantize_int8_kernel(weights, scale, out, K: tl.constexpr, BK: tl.constexpr):
    row, cols = tl.program_id(0), tl.program_id(1) * BK + tl.arange(0, BK)
    at = row * K + cols
    values = tl.load(weights + at, mask=cols < K, other=0).to(tl.float32) * tl.load(scale + row)
    tl.store(out + at, values.to(out.dtype.element_ty), mask=cols < K)


@jit
def _nf4_run_kernel(packed, scales, table, out, groups, BG: tl.constexpr):
    group, j = tl.program_id(0) * BG + tl.arange(0, BG), tl.arange(0, 64)
    mask = group < groups
    both = mask[:, None] & (j >= 0)[None, :]
    codes = tl.load(packed + group[:, None] * 64 + j[None, :], mask=both, other=0)
    s_high = tl.load(scales + 2 * group, mask=mask, other=0.0).to(tl.float32)
    s_low = tl.load(scales + 2 * group + 1, mask=mask, other=0.0).to(tl.float32)
    high, low = _decode_nf4(codes, table, "")
    at = out + group[:, None] * 128 + j[None, :]
    tl.store(at, (high * s_high[:, None]).to(out.dtype.element_ty), mask=both)
    tl.store(at + 64, (low * s_low[:, None]).to(out.dtype.element_ty), mask=both)


@jit
def _int8_run_kernel(weights, scales, out, chunks, CHUNK: tl.constexpr, BC: tl.constexpr):
    chunk, j = tl.program_id(0) * BC + tl.arange(0, BC), tl.arange(0, CHUNK)
    mask = chunk < chunks
    both = mask[:, None] & (j >= 0)[None, :]
    at = chunk[:, None] * CHUNK + j[None, :]
    values = tl.load(weights + at, mask=both, other=0).to(tl.float32)
    values *= tl.load(scales + chunk, mask=mask, other=0.0)[:, None]
    tl.store(out + at, values.to(out.dtype.element_ty), mask=both)


@jit
def _quantize_kernel(x, q, q_scale, K: tl.constexpr, BK: tl.constexpr, LIMIT: tl.constexpr, INTEGER: tl.constexpr):
    row, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BK)
    values = tl.load(x + row * K + cols, mask=cols < K, other=0.0).to(tl.float32)
    steps, step = _quantized(values, LIMIT, INTEGER)
    tl.store(q + row * K + cols, steps.to(q.dtype.element_ty), mask=cols < K)
    tl.store(q_scale + row, step)


@jit(do_not_specialize=["m"])
def _norm_kernel(
    x,
    partials,
    linear_bias,
    residual,
    weight,
    bias,
    total,
    normed,
    q_scale,
    eps,
    m,
    N: tl.constexpr,
    BN: tl.constexpr,
    SPLIT: tl.constexpr,
    X: tl.constexpr,
    LINEAR_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    TOTAL: tl.constexpr,
    LIMIT: tl.constexpr,
    INTEGER: tl.constexpr,
):
    row, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BN)
    mask, at = cols < N, row * N + cols
    y = tl.zeros((BN,), dtype=tl.float32)
    for part in tl.static_range(SPLIT):
        y += tl.load(partials + part * m.to(tl.int64) * N + at, mask=mask, other=0.0)
    if X:
        y += tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if LINEAR_BIAS:
        y += tl.load(linear_bias + cols, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        y += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    rounded = y.to(total.dtype.element_ty)  # the norm sees what the next residual sees
    if TOTAL:
        tl.store(total + at, rounded, mask=mask)
    y = rounded.to(tl.float32)
    centred = tl.where(mask, y - tl.sum(y, axis=0) / N, 0.0)
    y = centred * (1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / N + eps))
    y = y * tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
    y += tl.load(bias + cols, mask=mask, other=0.0).to(tl.float32)
    if LIMIT > 0:
        y, step = _quantized(y, LIMIT, INTEGER)
        tl.store(q_scale + row, step)
    tl.store(normed + at, y.to(normed.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["rows"])
def _attention_kernel(
    query,
    key,
    value,
    out,
    scaling,
    rows,
    q_picture,
    q_row,
    q_head,
    k_picture,
    k_row,
    k_head,
    v_picture,
    v_row,
    v_head,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BW: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WIDE: tl.constexpr,
):
    tiles = tl.cdiv(rows, BM)
    tile, pair = tl.program_id(0) % tiles, tl.program_id(0) // tiles  # tiles of one head share its keys in the L2 cache
    picture, head = (pair // HEADS).to(tl.int64), pair % HEADS
    i, j, c = tile * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BW)
    inside = c < WIDTH
    q_at = query + picture * q_picture + head * q_head + tl.minimum(i, rows - 1)[:, None] * q_row + c[None, :]
    k_from, v_from = key + picture * k_picture + head * k_head, value + picture * v_picture + head * v_head
    q = tl.load(q_at, mask=inside[None, :], other=0.0)
    highest = tl.full((BM,), float("-inf"), dtype=tl.float32)
    total, acc = tl.zeros((BM,), dtype=tl.float32), tl.zeros((BM, BW), dtype=tl.float32)
    for start in range(0, TOKENS, BN):
        token = tl.minimum(start + j, TOKENS - 1)
        k = tl.load(k_from + token[None, :] * k_row + c[:, None], mask=inside[:, None], other=0.0)
        v = tl.load(v_from + token[:, None] * v_row + c[None, :], mask=inside[None, :], other=0.0)
        if WIDE:  # the interpreter computes with the bit patterns of bf16
            q, k, v = q.to(tl.float32), k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(q, k) * scaling
        if TOKENS % BN != 0:
            scores = tl.where((start + j < TOKENS)[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        shrunk, weights = tl.exp2(highest - higher), tl.exp2(scores - higher[:, None])
        total = total * shrunk + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrunk[:, None])
        highest = higher
    out_at = out + ((picture * rows + i[:, None]) * HEADS + head) * WIDTH + c[None, :]
    tl.store(out_at, (acc / total[:, None]).to(out.dtype.element_ty), mask=(i < rows)[:, None] & inside[None, :])


# -------------------------------------------------------------------------------------------------------------- checks


def _check_matrix(name: str, tensor: torch.Tensor, columns: int | None = None, dtypes: tuple = ()) -> None:
    """ValueError unless `tensor` is a contiguous matrix (rows are read at stride K) within reach of 32-bit offsets."""
    if tensor.ndim != 2 or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous matrix, this one is {tuple(tensor.shape)} with strides {tensor.stride()}: "
            "pass .contiguous(), leading dimensions flattened"
        )
    if columns is not None and tensor.shape[1] != columns:
        raise ValueError(f"{name} has {tensor.shape[1]} columns, {columns} were expected")
    if dtypes and tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}, must be one of {', '.join(map(str, dtypes))}")
    if tensor.numel() >= 2**31:
        raise ValueError(f"{name} has {tensor.numel()} numbers, at most 2**31 - 1 fit: use smaller batches")


FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def _check_gelu(gelu: str | bool) -> str:
    if gelu not in (False, "", "tanh", "erf"):
        raise ValueError(f"gelu must be False, 'tanh' or 'erf', not {gelu!r}")
    return gelu or ""


def _uses_kernels(x: torch.Tensor) -> bool:
    return x.dtype != torch.float32 and not missing_products(x.device)


def _interpreted() -> bool:
    return triton is not None and not isinstance(_reduce_kernel, triton.JITFunction)


# ------------------------------------------------------------------------------------------------------ plain products


def _activated(y: torch.Tensor, gelu: str) -> torch.Tensor:
    return F.gelu(y, approximate="tanh" if gelu == "tanh" else "none") if gelu else y


def _plain_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: str, partials: bool
) -> torch.Tensor:
    """The product of 16-bit numbers; in fp32 on a CPU, whose 16-bit products are slow and round in between."""
    wide = torch.float32 if x.device.type == "cpu" else x.dtype
    if partials:
        return (x.to(wide) @ weight.to(wide).T).float()[None]
    y = F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    return _activated(y, gelu).to(x.dtype)


def _plain_quantize(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    limit, largest = LIMITS[dtype], values.abs().amax(dim=1)
    inverse = torch.where(largest > TINY, limit / largest.clamp_min(TINY), torch.zeros_like(largest))
    steps = (values * inverse[:, None]).clamp(-limit, limit)
    return (steps.round() if dtype == torch.int8 else steps).to(dtype), largest / limit


# ------------------------------------------------------------------------------------------------------------ products


class _Launch:
    """What the three products share: the grid, the output or the workspace for parts of it, and their sum."""

    def __init__(self, kind: str, m: int, n: int, k: int, x: torch.Tensor, config: Config | None) -> None:
        self.config = config or default_config(kind, m, n, k, x.device)
        if kind == "nf4" and self.config.bk != GROUP:
            raise ValueError(f"NF4 products go in steps of {GROUP} columns: bk must be {GROUP}, not {self.config.bk}")
        if m * n >= 2**31:
            raise ValueError(f"an output {m} x {n} has more numbers than the kernels can address: use smaller batches")
        self.m, self.n, self.device = m, n, x.device
        self.steps = math.ceil(math.ceil(k / self.config.bk) / self.config.split_k)
        self.grid = (math.ceil(m / self.config.bm) * math.ceil(n / self.config.bn), self.config.split_k)

    def run(self, kernel, arguments: tuple, bias, gelu: str, dtype: torch.dtype, partials: bool, **settings):
        """(M, N) of `dtype`, or the (S, M, N) fp32 parts where `partials`."""
        split = self.config.split_k
        parts = partials or split > 1
        shape = (split, self.m, self.n) if parts else (self.m, self.n)
        out = torch.empty(shape, dtype=torch.float32 if parts else dtype, device=self.device)
        tile = {"BM": self.config.bm, "BN": self.config.bn, "STEPS": self.steps}
        options = {"num_warps": self.config.warps, "num_stages": self.config.stages}
        with torch.cuda.device_of(out):
            kernel[self.grid](
                *arguments,
                *(out if bias is None else bias, out, self.m),
                **settings,
                **tile,
                **{"N": self.n, "PARTIALS": parts, "BIAS": bias is not None, "GELU": gelu},
                **options,
            )
        return out if partials or split == 1 else reduce_partials(out, bias, gelu, dtype)


def reduce_partials(
    partials: torch.Tensor, bias: torch.Tensor | None, gelu: str | bool, dtype: torch.dtype
) -> torch.Tensor:
    """(M, N) of `dtype`: the sum over parts (S, M, N) fp32, plus `bias` (N,), through GELU where asked."""
    gelu, (split, m, n) = _check_gelu(gelu), partials.shape
    if missing_triton(partials.device):
        total = partials.sum(dim=0)
        return _activated(total if bias is None else total + bias, gelu).to(dtype)
    out = torch.empty(m, n, dtype=dtype, device=partials.device)
    block = min(1024, triton.next_power_of_2(n))
    with torch.cuda.device_of(out):
        _reduce_kernel[(m, math.ceil(n / block))](
            *(partials, out if bias is None else bias, out, m, n),
            **{"SPLIT": split, "BN": block, "BIAS": bias is not None, "GELU": gelu},
            num_warps=4,
        )
    return out


def repack_nf4(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    shape: tuple[int, int],
    group: int = GROUP,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, K/2) uint8 and (N, K/64) scales for the kernels here, from bitsandbytes' NF4 weight of `shape` (N, K).

    `packed` holds two codes a byte along the flattened weight, high nibble first; `absmax` one fp32 scale a block of
    64 (expand double quantization first). Here byte j of each group of 128 columns holds column j in its high and
    column j + 64 in its low nibble: each nibble run has one scale a row. The scales lie in memory column by column.
    ValueError where K is no multiple of 128 (dequantize such a weight instead) or sizes disagree.
    """
    n, k = shape
    if group != GROUP:
        raise ValueError(f"the kernels take groups of {GROUP} columns, not {group}")
    if k % GROUP:
        raise ValueError(f"NF4 products need a multiple of {GROUP} columns, {k} is none: dequantize this weight")
    if packed.dtype != torch.uint8 or packed.numel() * 2 != n * k or absmax.numel() * BLOCK != n * k:
        raise ValueError(
            f"a weight {n} x {k} has {n * k // 2} bytes of codes and {n * k // BLOCK} scales, "
            f"not {packed.numel()} of {packed.dtype} and {absmax.numel()}"
        )
    flat = packed.reshape(-1)
    codes = torch.stack([flat >> 4, flat & 15], dim=1).reshape(n, k // GROUP, 2, BLOCK)
    repacked = (codes[:, :, 0] << 4 | codes[:, :, 1]).reshape(n, k // 2)
    scales = absmax.reshape(n, k // BLOCK).to(scale_dtype)
    return repacked.contiguous(), scales.t().contiguous().t()


def _check_nf4(packed: torch.Tensor, absmax: torch.Tensor) -> tuple[int, int]:
    _check_matrix("packed", packed, dtypes=(torch.uint8,))
    n, k = packed.shape[0], packed.shape[1] * 2
    if k % GROUP or tuple(absmax.shape) != (n, k // BLOCK):
        raise ValueError(f"scales {tuple(absmax.shape)} do not fit codes {tuple(packed.shape)}: use repack_nf4")
    return n, k


def linear_nf4(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    bias: torch.Tensor | None = None,
    gelu: str | bool = False,
    config: Config | None = None,
    partials: bool = False,
) -> torch.Tensor:
    """(M, N) in x's dtype: x (M, K) times a repacked NF4 weight, plus `bias` (N,), through GELU where asked.

    `gelu` is "tanh" or "erf". With `partials` the sums (S, M, N) in fp32 come back without bias and GELU, for
    `add_layer_norm`; S is `config.split_k`, or 1 without Triton. Values and scales are rounded to x's dtype before
    they are multiplied, so a scale over 65504 is infinite in fp16. ValueError for a strided x or sizes that disagree.
    """
    n, k = _check_nf4(packed, absmax)
    _check_matrix("x", x, k, FLOATS)
    gelu = _check_gelu(gelu)
    if not _uses_kernels(x):
        return _plain_linear(x, dequantize_nf4(packed, absmax, x.dtype), bias, gelu, partials)
    launch = _Launch("nf4", x.shape[0], n, k, x, config)
    assembly = "" if launch.config.decode == "table" or _interpreted() else _nf4_assembly(x.dtype)
    settings = {"K": k, "SCALE_N": absmax.stride(0), "SCALE_K": absmax.stride(1)}
    arguments = (x, packed, absmax, _table(x.dtype, x.device))
    return launch.run(
        _nf4_kernel, arguments, bias, gelu, x.dtype, partials, ASM=assembly, WIDE=_interpreted(), **settings
    )


def dequantize_nf4(
    packed: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The weight (N, K) of `dtype` in a repacked NF4 one: products in fp32, rounded once. Into `out` where given."""
    n, k = _check_nf4(packed, absmax)
    out = _output(out, (n, k), dtype, packed.device)
    if missing_triton(packed.device):
        codes = torch.stack([packed.view(n, -1, BLOCK) >> 4, packed.view(n, -1, BLOCK) & 15], dim=2)
        values = _table(torch.float32, packed.device)[codes.long()].view(n, k // BLOCK, BLOCK)
        return out.copy_((values * absmax.float()[:, :, None]).view(n, k))
    with torch.cuda.device_of(out):
        _dequantize_nf4_kernel[(math.ceil(n / 32), k // GROUP)](
            *(packed, absmax, _table(torch.float32, packed.device), out, n, k, *absmax.stride()), BN=32, num_warps=4
        )
    return out


def _output(out: torch.Tensor | None, shape: tuple, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    if tuple(out.shape) != tuple(shape) or out.dtype != dtype or not out.is_contiguous():
        raise ValueError(f"out must be contiguous {shape} of {dtype}, it is {tuple(out.shape)} of {out.dtype}")
    return out


def linear_int8(
    x: torch.Tensor,
    rows: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    gelu: str | bool = False,
    config: Config | None = None,
    partials: bool = False,
) -> torch.Tensor:
    """(M, N) in x's dtype: x (M, K) times rows (N, K) int8 · scale (N,) fp32, plus `bias`, through GELU where asked.

    bitsandbytes' weight is `rows · SCB / 127`: pass `scale = SCB / 127`. It is applied to the fp32 sum. `gelu` and
    `partials` are those of `linear_nf4`. ValueError for a strided x or sizes that disagree.
    """
    _check_matrix("rows", rows, dtypes=(torch.int8,))
    _check_matrix("x", x, rows.shape[1], FLOATS)
    _check_scale("scale", scale, rows.shape[0])
    gelu = _check_gelu(gelu)
    if not _uses_kernels(x):
        return _plain_linear(x, dequantize_int8(rows, scale, x.dtype), bias, gelu, partials)
    launch = _Launch("int8", x.shape[0], *rows.shape, x, config)
    plain = launch.config.decode == "table" or x.dtype != torch.float16 or _interpreted()
    assembly = "" if plain else INT8_ASSEMBLY
    settings = {"K": rows.shape[1], "BK": launch.config.bk, "ASM": assembly, "WIDE": _interpreted()}
    return launch.run(_int8_kernel, (x, rows, scale), bias, gelu, x.dtype, partials, **settings)


def _check_scale(name: str, scale: torch.Tensor, length: int) -> None:
    if tuple(scale.shape) != (length,) or scale.dtype != torch.float32 or not scale.is_contiguous():
        raise ValueError(f"{name} must be contiguous fp32 ({length},), it is {scale.dtype} {tuple(scale.shape)}")


def dequantize_int8(
    rows: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The weight (N, K) of `dtype`: rows int8 · scale (N,), computed in fp32. Into `out` where given."""
    _check_matrix("rows", rows, dtypes=(torch.int8,))
    _check_scale("scale", scale, rows.shape[0])
    out = _output(out, rows.shape, dtype, rows.device)
    if missing_triton(rows.device):
        return out.copy_(rows.float() * scale[:, None])
    n, k = rows.shape
    block = min(4096, triton.next_power_of_2(k))
    with torch.cuda.device_of(out):
        _dequantize_int8_kernel[(n, math.ceil(k / block))](rows, scale, out, K=k, BK=block, num_warps=4)
    return out


def dequantize_nf4_run(packed: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`out` (128 G,), filled with the weights of G repacked groups that lie side by side, of whatever matrices.

    `packed` (64 G,) uint8; `scales` (2 G,) row by row, not column by column as `repack_nf4` lays them. A matrix is a
    run of its groups, so one call dequantizes several. Products in fp32, rounded once. ValueError where sizes differ.
    """
    groups = packed.numel() // 64
    if packed.numel() % 64 or scales.numel() != 2 * groups or out.numel() != GROUP * groups:
        raise ValueError(f"{packed.numel()} bytes, {scales.numel()} scales and {out.numel()} weights do not fit")
    _check_run(packed, scales, out)
    if missing_triton(packed.device):
        codes = torch.stack([packed.view(groups, BLOCK) >> 4, packed.view(groups, BLOCK) & 15], dim=1)
        values = _table(torch.float32, packed.device)[codes.long()] * scales.view(groups, 2, 1).float()
        return out.copy_(values.view(-1))
    with torch.cuda.device_of(out):
        table, (tile, warps) = _table(torch.float32, packed.device), RUN_TILES["nf4"]
        _nf4_run_kernel[(math.ceil(groups / tile),)](packed, scales, table, out, groups, BG=tile, num_warps=warps)
    return out


def dequantize_int8_run(rows: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`out` (L,), filled with int8 `rows` (L,) times `scales` (L / C,) fp32, one for each C numbers in a row.

    A matrix whose rows are a multiple of C long is such a run. ValueError where C is no power of two or sizes differ.
    """
    chunk = rows.numel() // max(scales.numel(), 1)
    if chunk * scales.numel() != rows.numel() or chunk & (chunk - 1) or out.numel() != rows.numel():
        raise ValueError(f"{rows.numel()} rows, {scales.numel()} scales and {out.numel()} weights do not fit")
    _check_run(rows, scales, out)
    if missing_triton(rows.device):
        return out.copy_((rows.view(-1, chunk).float() * scales[:, None]).view(-1))
    numbers, warps = RUN_TILES["int8"]
    height = max(1, numbers // chunk)
    with torch.cuda.device_of(out):
        _int8_run_kernel[(math.ceil(scales.numel() / height),)](
            rows, scales, out, scales.numel(), CHUNK=chunk, BC=height, num_warps=warps
        )
    return out


def _check_run(*tensors: torch.Tensor) -> None:
    if any(tensor.ndim != 1 or not tensor.is_contiguous() or tensor.numel() >= 2**31 for tensor in tensors):
        raise ValueError("a run is contiguous in one dimension and shorter than 2 ** 31")


def quantize_rows(x: torch.Tensor, dtype: torch.dtype = torch.int8) -> tuple[torch.Tensor, torch.Tensor]:
    """(q (M, K) int8 or float8_e4m3fn, scale (M,) fp32), x ≈ q · scale: symmetric, each row by its largest value.

    Rows longer than 4096 take the plain form. ValueError for another `dtype` or a strided x.
    """
    _check_matrix("x", x, dtypes=FLOATS)
    _check_quantized(dtype)
    missing = (missing_fp8 if dtype == torch.float8_e4m3fn else missing_triton)(x.device)
    if missing or x.shape[1] > ROW_LIMIT:
        return _plain_quantize(x.float(), dtype)
    m, k = x.shape
    q = torch.empty(m, k, dtype=dtype, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _quantize_kernel[(m,)](
            *(x, q, scale, k, triton.next_power_of_2(k), LIMITS[dtype], dtype == torch.int8), num_warps=4
        )
    return q, scale


def _check_quantized(dtype: torch.dtype) -> None:
    if dtype not in LIMITS:
        raise ValueError(f"rows are quantized to {' or '.join(map(str, LIMITS))}, not {dtype}")


def linear_w8a8(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    rows: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    gelu: str | bool = False,
    out_dtype: torch.dtype = torch.float16,
    config: Config | None = None,
    partials: bool = False,
) -> torch.Tensor:
    """(M, N) of `out_dtype`: (q · q_scale) times (rows · scale)ᵀ, plus `bias` (N,), through GELU where asked.

    q (M, K) and rows (N, K) are both int8 (summed in int32) or both float8_e4m3fn (in fp32); q_scale (M,) and
    scale (N,) fp32. `gelu` and `partials` are those of `linear_nf4`. ValueError where sizes or dtypes disagree.
    """
    _check_matrix("q", q, dtypes=tuple(LIMITS))
    _check_matrix("rows", rows, q.shape[1], (q.dtype,))
    _check_scale("q_scale", q_scale, q.shape[0])
    _check_scale("scale", scale, rows.shape[0])
    gelu, integer = _check_gelu(gelu), q.dtype == torch.int8
    if (missing_products if integer else missing_fp8)(q.device):
        weight = rows.float() * scale[:, None]
        y = _plain_linear(q.float() * q_scale[:, None], weight, bias, gelu, partials)
        return y if partials else y.to(out_dtype)
    launch = _Launch("w8a8", q.shape[0], *rows.shape, q, config)
    settings = {"K": rows.shape[1], "BK": launch.config.bk, "SUM": tl.int32 if integer else tl.float32}
    return launch.run(_w8a8_kernel, (q, q_scale, rows, scale), bias, gelu, out_dtype, partials, **settings)


# --------------------------------------------------------------------------------------------------------------- norms


def add_layer_norm(
    x: torch.Tensor | None,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    partials: torch.Tensor | None = None,
    linear_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum, normed), both (M, N): x + residual, and its layer norm with `weight` and `bias` (N,).

    Each addend may be None. `partials` (S, M, N) fp32 and `linear_bias` (N,) join the sum, so that a product cut by
    split_k ends here. The sum is rounded to the dtype of the residual (else of x, else of `weight`) before the norm,
    whose statistics are fp32. With x alone, the sum is x itself. Rows longer than 4096 take the plain form.
    """
    total, normed, _ = _norm(x, residual, weight, bias, eps, partials, linear_bias, None)
    return total, normed


def add_layer_norm_quantize(
    x: torch.Tensor | None,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dtype: torch.dtype = torch.int8,
    partials: torch.Tensor | None = None,
    linear_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum (M, N), q (M, N), q_scale (M,)): `add_layer_norm` with the normed row quantized in the same pass.

    The row is quantized to `dtype` from fp32, without the rounding to 16 bits in between.
    """
    _check_quantized(dtype)
    return _norm(x, residual, weight, bias, eps, partials, linear_bias, dtype)


def _norm(x, residual, weight, bias, eps, partials, linear_bias, quantized: torch.dtype | None):
    _check_norm(x, residual, partials, weight.shape[0])
    like = next(tensor for tensor in (residual, x, weight) if tensor is not None)
    needs = missing_fp8 if quantized == torch.float8_e4m3fn else missing_triton
    form = _plain_norm if needs(weight.device) or weight.shape[0] > ROW_LIMIT else _kernel_norm
    return form(x, residual, weight, bias, eps, partials, linear_bias, quantized, like.dtype)


def _check_norm(x, residual, partials, columns: int) -> None:
    if x is None and residual is None and partials is None:
        raise ValueError("nothing to normalise: give x, residual or partials")
    for name, tensor in (("x", x), ("residual", residual)):
        if tensor is not None:
            _check_matrix(name, tensor, columns, FLOATS)
    if partials is not None and (partials.ndim != 3 or not partials.is_contiguous()):
        raise ValueError(f"partials must be contiguous (S, M, N), they are {tuple(partials.shape)}")
    if len({tuple(t.shape[-2:]) for t in (x, residual, partials) if t is not None}) > 1:
        raise ValueError("x, residual and partials must have the same (M, N)")


def _plain_norm(x, residual, weight, bias, eps, partials, linear_bias, quantized, dtype):
    addends = [None if partials is None else partials.sum(dim=0), x, linear_bias, residual]
    total = sum(tensor.float() for tensor in addends if tensor is not None).to(dtype)
    normed = F.layer_norm(total.float(), (weight.shape[0],), weight.float(), bias.float(), eps)
    if quantized is None:
        return total, normed.to(dtype), None
    return total, *_plain_quantize(normed, quantized)


def _kernel_norm(x, residual, weight, bias, eps, partials, linear_bias, quantized, dtype):
    shape = next(tensor for tensor in (residual, x, partials) if tensor is not None).shape[-2:]
    m, n = shape
    alone = x is not None and all(tensor is None for tensor in (residual, partials, linear_bias))
    total = x if alone else torch.empty(shape, dtype=dtype, device=weight.device)
    normed = torch.empty(shape, dtype=quantized or dtype, device=weight.device)
    q_scale = None if quantized is None else torch.empty(m, dtype=torch.float32, device=weight.device)
    unused = total  # a pointer that the kernel never reads
    pointers = [unused if tensor is None else tensor for tensor in (x, partials, linear_bias, residual)]
    with torch.cuda.device_of(weight):
        _norm_kernel[(m,)](
            *(*pointers, weight, bias, total, normed, unused if q_scale is None else q_scale, eps, m, n),
            **{"BN": triton.next_power_of_2(n), "SPLIT": 0 if partials is None else partials.shape[0]},
            **{"X": x is not None, "LINEAR_BIAS": linear_bias is not None, "RESIDUAL": residual is not None},
            **{"TOTAL": not alone, "LIMIT": LIMITS.get(quantized, 0.0), "INTEGER": quantized == torch.int8},
            num_warps=4,
        )
    return total, normed, q_scale


# ----------------------------------------------------------------------------------------------------------- attention


class AttentionConfig(NamedTuple):
    """How attention is cut: rows of the query of a program (bm), and tokens of a step (bn)."""

    bm: int
    bn: int
    warps: int = 4
    stages: int = 1


# For a few hundred tokens, by whether tiles of 64 rows fill the processors; the first are the best on an H200.
FEW_TILES = (
    AttentionConfig(32, 256, 4, 1),  # one step takes all tokens
    AttentionConfig(64, 64, 4, 3),
    AttentionConfig(64, 256, 4, 1),
    AttentionConfig(32, 64, 4, 2),
)
MANY_TILES = (
    AttentionConfig(64, 32, 4, 3),
    AttentionConfig(64, 64, 4, 3),
    AttentionConfig(128, 64, 8, 3),
    AttentionConfig(64, 64, 4, 2),
)


def attention_configs(count: int, rows: int, heads: int, device: torch.device) -> tuple[AttentionConfig, ...]:
    """Configurations worth timing for queries (count, rows, heads, width), the most promising first."""
    processors = 132 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count
    return FEW_TILES if count * heads * math.ceil(rows / 64) <= processors else MANY_TILES


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    config: AttentionConfig | None = None,
) -> torch.Tensor:
    """softmax(query keyᵀ · scaling) value of every head, without a mask: (n, rows, heads, width), contiguous.

    `query` (n, rows, heads, width), `key` and `value` (n, tokens, heads, width) in fp16 or bf16, contiguous in the last
    dimension, so that views of one QKV product need no copy. Sums and softmax are fp32, and the scores never reach
    memory (Dao et al. 2022; the running maximum of Milakov & Gimelshein 2018). ValueError where sizes disagree.
    """
    shapes = [tuple(tensor.shape) for tensor in (query, key, value)]
    fits = query.ndim == 4 and shapes[1] == shapes[2] == (shapes[0][0], key.shape[1], *shapes[0][2:])
    if not fits or any(tensor.stride(-1) != 1 for tensor in (query, key, value)) or not key.shape[1]:
        raise ValueError(f"attention takes (n, tokens, heads, width), contiguous in width, not {shapes}")
    if not _uses_kernels(query):
        swapped = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return F.scaled_dot_product_attention(*swapped, scale=scaling).transpose(1, 2).contiguous()
    count, rows, heads, width = query.shape
    config = config or attention_configs(count, rows, heads, query.device)[0]
    out = torch.empty(count, rows, heads, width, dtype=query.dtype, device=query.device)
    strides = [stride for tensor in (query, key, value) for stride in tensor.stride()[:3]]
    padded = max(16, triton.next_power_of_2(width))
    with torch.cuda.device_of(out):
        _attention_kernel[(math.ceil(rows / config.bm) * count * heads,)](
            *(query, key, value, out, scaling * math.log2(math.e), rows, *strides),
            **{"TOKENS": key.shape[1], "HEADS": heads, "WIDTH": width, "BW": padded},
            **{"BM": config.bm, "BN": config.bn, "WIDE": _interpreted()},
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return out
