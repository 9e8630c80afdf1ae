"""Scaled dot product attention without a mask, on views of one QKV product."""

import math
from typing import NamedTuple

import torch
from torch.nn import functional as F

from vitlib.network.kernels import triton_support
from vitlib.network.kernels.triton_support import interpreted, jit, tl, triton


class AttentionConfig(NamedTuple):
    """Rows of the query that a program takes (bm), and tokens of a step (bn)."""

    bm: int
    bn: int
    warps: int = 4
    stages: int = 1


# For a few hundred tokens. Few: tiles of 64 rows do not fill the processors. The best on an H200 come first; the first
# of all takes all tokens in one step.
FEW_TILES = (AttentionConfig(32, 256, 4, 1), AttentionConfig(64, 64, 4, 3), AttentionConfig(32, 64, 4, 2))
MANY_TILES = (AttentionConfig(64, 32, 4, 3), AttentionConfig(64, 64, 4, 3))


def attention_configs(count: int, rows: int, heads: int, device: torch.device) -> tuple[AttentionConfig, ...]:
    """Configurations worth timing for queries (count, rows, heads, width), the most promising first."""
    processors = 132 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count
    return FEW_TILES if count * heads * math.ceil(rows / 64) <= processors else MANY_TILES


@jit(do_not_specialize=["rows"])
def _attention_kernel(
    query, key, value, out, scaling, rows,
    q_picture, q_row, q_head, k_picture, k_row, k_head, v_picture, v_row, v_head,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
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


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, config: AttentionConfig | None = None
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
    if query.dtype == torch.float32 or not triton_support.use_kernels(query.device):
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
            **{"BM": config.bm, "BN": config.bn, "WIDE": interpreted()},
            **{"num_warps": config.warps, "num_stages": config.stages},
        )
    return out
