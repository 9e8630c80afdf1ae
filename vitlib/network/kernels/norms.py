"""Residual and layer norm in one kernel, whose output may be quantized to 8 bits in the same pass."""

import torch
from torch import Tensor
from torch.nn import functional as F

from vitlib.network.kernels import triton_support
from vitlib.network.kernels.products import FP8, LIMITS, plain_quantize, quantized
from vitlib.network.kernels.triton_support import ROW_LIMIT, check_matrix, jit, tl, triton


@jit
def _norm_kernel(
    x, residual, weight, bias, total, normed, q_scale, eps,
    N: tl.constexpr, BN: tl.constexpr, LIMIT: tl.constexpr, INTEGER: tl.constexpr,
):  # fmt: skip
    row, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BN)
    mask, at = cols < N, row * N + cols
    y = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    y += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    rounded = y.to(total.dtype.element_ty)  # the norm sees what the next residual sees
    tl.store(total + at, rounded, mask=mask)
    y = rounded.to(tl.float32)
    centred = tl.where(mask, y - tl.sum(y, axis=0) / N, 0.0)
    y = centred * (1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / N + eps))
    y = y * tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
    y += tl.load(bias + cols, mask=mask, other=0.0).to(tl.float32)
    if LIMIT > 0:
        y, step = quantized(y, LIMIT, INTEGER)
        tl.store(q_scale + row, step)
    tl.store(normed + at, y.to(normed.dtype.element_ty), mask=mask)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, codes: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(sum, normed, q_scale): x + residual and its layer norm, both (M, N), with `weight` and `bias` (N,).

    The sum is rounded to the dtype of the residual before the norm, whose statistics are fp32. With `codes` the normed
    row is quantized to that dtype in the same pass, from fp32, with scales (M,); without, `q_scale` is None. Rows
    longer than 4096 take the plain form. ValueError for strided or unequal inputs.
    """
    for name, tensor in (("x", x), ("residual", residual)):
        check_matrix(name, tensor, weight.shape[0])
    if x.shape != residual.shape:
        raise ValueError(f"x {tuple(x.shape)} and residual {tuple(residual.shape)} must have the same (M, N)")
    m, n = residual.shape
    if not triton_support.use_kernels(weight.device, fp8=codes == FP8) or n > ROW_LIMIT:
        total = (x.float() + residual.float()).to(residual.dtype)
        normed = F.layer_norm(total.float(), (n,), weight.float(), bias.float(), eps)
        return total, *((normed.to(residual.dtype), None) if codes is None else plain_quantize(normed, codes))
    total = torch.empty_like(residual)
    normed = torch.empty_like(residual, dtype=codes or residual.dtype)
    q_scale = None if codes is None else torch.empty(m, dtype=torch.float32, device=weight.device)
    with torch.cuda.device_of(weight):
        _norm_kernel[(m,)](  # without codes `total` is a pointer that the kernel never reads as scales
            *(x, residual, weight, bias, total, normed, total if q_scale is None else q_scale, eps, n),
            **{"BN": triton.next_power_of_2(n), "LIMIT": LIMITS.get(codes, 0.0), "INTEGER": codes == torch.int8},
            num_warps=4,
        )
    return total, normed, q_scale
