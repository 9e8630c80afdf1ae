"""4-bit formats beside each other: what each makes of a weight, and the bits that it takes. For comparison only.

Every function takes a weight (out, in) in float32, and X'X (in, in) of the layer's inputs X to compensate errors (None:
round to nearest), and returns the weight that the format stores, in float32.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from bitsandbytes import functional
from torch import Tensor

from vitlib.network.calibrate import Grid

GROUP = 64


def bitsandbytes(weight: Tensor, gram: Tensor | None, *, kind: str, group: int = GROUP, double: bool = False) -> Tensor:
    """NF4 or FP4 (`kind`); with `double` quantization the scales take 8 bits instead of 32."""
    packed, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=group, quant_type=kind, compress_statistics=double
    )
    if gram is None:
        return functional.dequantize_4bit(packed, state).float()
    grid = Grid.of_state(state)
    return grid.values(grid.compensated(weight, gram))


def int4(weight: Tensor, gram: Tensor | None, *, symmetric: bool) -> Tensor:
    """Evenly spaced levels with a FP16 scale a group; without symmetry the zero point is one of the 16 codes."""
    groups = weight.view(len(weight), -1, GROUP)
    if symmetric:
        levels, low = torch.arange(-8.0, 8.0, device=weight.device), -groups.abs().amax(2)
        scales, offsets = (-2 * low / 15).half().float(), None
    else:
        levels, low, high = torch.arange(16.0, device=weight.device), groups.amin(2), groups.amax(2)
        scales = ((high.clamp(min=0) - low.clamp(max=0)) / 15).half().float()
        offsets = (low.clamp(max=0) / scales.clamp(min=1e-8)).round() * scales
    grid = Grid(levels, scales, offsets)
    return grid.values(grid.nearest(weight) if gram is None else grid.compensated(weight, gram))


def hqq(weight: Tensor, gram: None) -> Tensor:
    """Half-quadratic quantization (Badri and Shaji 2023) by the package hqq, with scale and zero point in FP16."""
    from hqq.core.quantize import Quantizer

    how = {"nbits": 4, "group_size": GROUP, "axis": 1, "bitpack": False, "device": str(weight.device)}
    codes, about = Quantizer.quantize(weight, **how)
    scale, zero = (about[name].half().float() for name in ("scale", "zero"))
    return ((codes.float() - zero) * scale).view(weight.shape)


class Row(NamedTuple):
    """A format of the comparison: bits a weight with scales and zero points, and whether it compensates errors."""

    bits: float
    round: Callable[[Tensor, Tensor | None], Tensor]
    compensates: bool = False

    @property
    def missing(self) -> str:
        """Why it cannot be used here, '' if it can."""
        return "the package hqq is not installed" if self.round is hqq and not importlib.util.find_spec("hqq") else ""


_DOUBLE = 4 + (8 + 32 / 256) / GROUP
ROWS = {
    "NF4, groups of 64": Row(4 + 32 / 64, partial(bitsandbytes, kind="nf4")),
    "NF4, groups of 128": Row(4 + 32 / 128, partial(bitsandbytes, kind="nf4", group=128)),
    "NF4, double quantization": Row(_DOUBLE, partial(bitsandbytes, kind="nf4", double=True)),
    "FP4, double quantization": Row(_DOUBLE, partial(bitsandbytes, kind="fp4", double=True)),
    "INT4 symmetric": Row(4 + 16 / GROUP, partial(int4, symmetric=True)),
    "INT4 asymmetric": Row(4 + (16 + 4) / GROUP, partial(int4, symmetric=False)),
    "HQQ": Row(4 + (16 + 16) / GROUP, hqq),
    "GPTQ INT4": Row(4 + (16 + 4) / GROUP, partial(int4, symmetric=False), compensates=True),
    "NF4 calibrated": Row(_DOUBLE, partial(bitsandbytes, kind="nf4", double=True), compensates=True),
}
