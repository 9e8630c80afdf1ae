"""Calibrated NF4: error compensation (GPTQ, Frantar et al. 2023) onto the grid of bitsandbytes' NF4.

Plain NF4 rounds each weight to the nearest code. Here the columns of a weight matrix are rounded one after another, and
the error of each is compensated in those that follow, so that the layer's *outputs* on some pictures change least. The
result has the same codes, scales and bytes as plain NF4, so bitsandbytes, transformers and fused kernels load it.

Blocks are treated in sequence, so each layer sees inputs that went through the quantized layers before it. Double
quantization rounds scales, so scales are found first, rounded, and the columns are then rounded onto them.
"""

import copy

import bitsandbytes as bnb
import torch
from bitsandbytes import functional as quantization
from torch import Tensor, nn

BLOCK = 64  # weights that share a scale; consecutive in a row
DAMPING = 0.01  # of the mean diagonal, added to the diagonal: Frantar et al. 2023, section 3.3
STAGES = (
    ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    ("attention.o_proj",),
    ("mlp.fc1",),
    ("mlp.fc2",),
)


class Hessian:
    """X'X (in, in) of the inputs that a linear layer sees, in float64 sums of float32 products."""

    def __init__(self) -> None:
        self.total, self.rows = None, 0

    def add(self, inputs: Tensor) -> None:
        """Add inputs (…, in)."""
        x = inputs.detach().flatten(0, -2).float()
        product = x.T @ x
        self.total = product if self.total is None else self.total + product
        self.rows += len(x)


def inverse_factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor of the damped inverse of `hessian` (n, n), float32; dead inputs count as independent."""
    h = hessian.double().clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()


def nearest(values: Tensor, grid: Tensor) -> Tensor:
    """Index of the nearest entry of the sorted `grid` (16,) for each value, as bitsandbytes rounds."""
    return torch.bucketize(values, (grid[1:] + grid[:-1]) / 2)


def compensated(weight: Tensor, factor: Tensor, grid: Tensor, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes (out, in) and scales (out, in / 64) of a weight (out, in) with the `inverse_factor` of its inputs.

    Without `scales`, each is the largest absolute value of its block when that block's turn comes.
    """
    w, codes = weight.float().clone(), torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    found = torch.empty(len(w), w.shape[1] // BLOCK, device=w.device) if scales is None else scales
    for start in range(0, w.shape[1], BLOCK):
        end, group = start + BLOCK, start // BLOCK
        part, errors = w[:, start:end], torch.empty(len(w), BLOCK, device=w.device)
        if scales is None:
            found[:, group] = part.abs().amax(dim=1)
        scale = found[:, group].clamp(min=torch.finfo(torch.float32).tiny)
        for at in range(BLOCK):
            column = start + at
            chosen = nearest(part[:, at] / scale, grid)
            codes[:, column] = chosen.to(torch.uint8)
            errors[:, at] = (part[:, at] - grid[chosen] * scale) / factor[column, column]
            part[:, at:] -= errors[:, at, None] * factor[column, column:end]
        w[:, end:] -= errors @ factor[start:end, end:]
    return codes, found


def calibrate_linear(layer: bnb.nn.Linear4bit, weight: Tensor, hessian: Tensor) -> Tensor:
    """Replace codes and scales of an NF4 `layer` in place; `weight` (out, in) is what it was quantized from.

    Returns the new weight (out, in), dequantized.
    """
    state = layer.weight.quant_state
    grid, factor = state.code.to(weight.device).float(), inverse_factor(hessian)
    _, scales = compensated(weight, factor, grid)
    rounded = scales
    if state.nested:
        offset = scales.mean()
        codes, second = quantization.quantize_blockwise((scales - offset).flatten(), blocksize=state.state2.blocksize)
        rounded = (quantization.dequantize_blockwise(codes, second) + offset).view_as(scales)
        state.absmax, state.offset, state.state2 = codes, offset, second
    else:
        state.absmax = scales.flatten()
    found, _ = compensated(weight, factor, grid, rounded)
    pairs = found.flatten().view(-1, 2)
    layer.weight.data = ((pairs[:, 0] << 4) | pairs[:, 1]).view(layer.weight.shape).to(layer.weight.device)
    return grid[found.long()] * rounded.repeat_interleave(BLOCK, dim=1)


@torch.no_grad()
def calibrate(network: nn.Module, quantized: nn.Module, pixels: Tensor, batch_size: int = 32) -> None:
    """Calibrate the NF4 layers of `quantized` in place on `pixels` (n, 3, h, w), normalised and unlabelled.

    `network` is the unquantized ViT with the same classes on the same device; it stays as it is.
    """
    weight = next(network.parameters())
    states = [network.vit.embeddings(part.to(weight.device, weight.dtype)) for part in pixels.split(batch_size)]
    for original, block in zip(network.vit.layers, quantized.vit.layers, strict=True):
        twin = copy.deepcopy(original)  # gets the quantized weights in full precision, which is faster to run
        for names in STAGES:
            hessian = Hessian()
            hook = twin.get_submodule(names[0]).register_forward_pre_hook(lambda _, x, to=hessian: to.add(x[0]))
            for state in states:
                twin(state)
            hook.remove()
            for name in names:
                linear = twin.get_submodule(name)
                linear.weight.copy_(calibrate_linear(block.get_submodule(name), linear.weight, hessian.total))
        states = [_hidden(twin(state)) for state in states]


def _hidden(output: object) -> Tensor:
    """A block's hidden states, which some versions of transformers return in a tuple."""
    return output[0] if isinstance(output, tuple) else output
