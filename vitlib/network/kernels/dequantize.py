"""NF4 and int8 weights dequantized to 16 or 32 bit, one matrix or all matrices of a block in one call.

A run is a one-dimensional tensor in which matrices follow each other: dequantization goes by groups of numbers that
share a scale and needs no matrix shapes.
"""

import functools
import math

import torch
from bitsandbytes import functional

from vitlib.network.kernels import triton_support
from vitlib.network.kernels.triton_support import jit, tl, triton

BLOCK = 64  # weights that share an NF4 scale
GROUP = 2 * BLOCK  # weights of a repacked NF4 group: the two blocks that share their bytes
NF4_TILE, INT8_TILE, WARPS = 32, 8192, 4  # groups, or numbers, that one program dequantizes, and its warps


@functools.cache
def _table(device: torch.device) -> torch.Tensor:
    """The 16 values of NF4 (Dettmers et al. 2023, appendix E) in fp32: quantiles of a normal distribution."""
    return functional.get_4bit_type("nf4", device="cpu").to(device)


@jit
def _nf4_kernel(packed, scales, table, out, groups, BG: tl.constexpr):
    group, j = tl.program_id(0) * BG + tl.arange(0, BG), tl.arange(0, 64)
    mask = group < groups
    both = mask[:, None] & (j >= 0)[None, :]
    codes = tl.load(packed + group[:, None] * 64 + j[None, :], mask=both, other=0)
    s_high = tl.load(scales + 2 * group, mask=mask, other=0.0).to(tl.float32)
    s_low = tl.load(scales + 2 * group + 1, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(table + (codes >> 4).to(tl.int32))
    low = tl.load(table + (codes & 15).to(tl.int32))
    at = out + group[:, None] * 128 + j[None, :]
    tl.store(at, (high * s_high[:, None]).to(out.dtype.element_ty), mask=both)
    tl.store(at + 64, (low * s_low[:, None]).to(out.dtype.element_ty), mask=both)


@jit
def _int8_kernel(weights, scales, out, count, LENGTH: tl.constexpr, BLOCK: tl.constexpr, HEIGHT: tl.constexpr):
    row, j = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT), tl.arange(0, BLOCK)
    mask = row < count
    both = mask[:, None] & (j < LENGTH)[None, :]
    at = row[:, None] * LENGTH + j[None, :]
    values = tl.load(weights + at, mask=both, other=0).to(tl.float32)
    values *= tl.load(scales + row, mask=mask, other=0.0)[:, None]
    tl.store(out + at, values.to(out.dtype.element_ty), mask=both)


def repack_nf4(packed: torch.Tensor) -> torch.Tensor:
    """The bytes (L/2,) of `packed`, bitsandbytes' NF4 codes of L weights, in the order that `dequantize_nf4` reads.

    bitsandbytes packs neighbours into a byte, the first in the high nibble. Here byte j of each group of 128 weights
    holds number j in its high and number j + 64 in its low nibble, so that all high nibbles share one scale and are
    written to consecutive addresses. ValueError where L is no multiple of 128.
    """
    if packed.dtype != torch.uint8 or packed.numel() % BLOCK:
        raise ValueError(f"{packed.numel()} of {packed.dtype} are no NF4 codes of a multiple of {GROUP} weights")
    flat = packed.reshape(-1)
    codes = torch.stack([flat >> 4, flat & 15], dim=1).view(-1, 2, BLOCK)
    return (codes[:, 0] << 4 | codes[:, 1]).reshape(-1)


def dequantize_nf4(packed: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`out` (128 G,), filled with the weights of G groups that `repack_nf4` has packed: products in fp32, rounded once.

    `packed` (64 G,) uint8; `scales` (2 G,), one for each 64 weights. ValueError where sizes differ.
    """
    groups = packed.numel() // BLOCK
    _check(packed.numel() == BLOCK * groups and scales.numel() == 2 * groups, packed, scales, out, GROUP * groups)
    table = _table(packed.device)
    if not triton_support.use_kernels(packed.device):
        codes = torch.stack([packed.view(groups, BLOCK) >> 4, packed.view(groups, BLOCK) & 15], dim=1)
        return out.copy_((table[codes.long()] * scales.view(groups, 2, 1).float()).view(-1))
    with torch.cuda.device_of(out):
        _nf4_kernel[(math.ceil(groups / NF4_TILE),)](packed, scales, table, out, groups, BG=NF4_TILE, num_warps=WARPS)
    return out


def dequantize_int8(rows: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`out` (L,), filled with int8 `rows` (L,) times `scales` (R,) fp32, one for each L / R numbers in a row.

    Products in fp32, rounded once. ValueError where sizes differ.
    """
    length = rows.numel() // max(scales.numel(), 1)
    _check(length * scales.numel() == rows.numel(), rows, scales, out, rows.numel())
    if not triton_support.use_kernels(rows.device):
        torch.mul(rows.view(-1, length), scales[:, None], out=out.view(-1, length))
        return out
    block = triton.next_power_of_2(length)
    height = max(1, INT8_TILE // block)
    with torch.cuda.device_of(out):
        sizes = {"LENGTH": length, "BLOCK": block, "HEIGHT": height}
        programs = (math.ceil(scales.numel() / height),)
        _int8_kernel[programs](rows, scales, out, scales.numel(), **sizes, num_warps=WARPS)
    return out


def _check(scales_fit: bool, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, weights: int) -> None:
    if not scales_fit or out.numel() != weights:
        raise ValueError(f"{codes.numel()} codes, {scales.numel()} scales and {out.numel()} weights do not fit")
    if any(tensor.ndim != 1 or not tensor.is_contiguous() or weights >= 2**31 for tensor in (codes, scales, out)):
        raise ValueError("a run is contiguous in one dimension and shorter than 2 ** 31")
