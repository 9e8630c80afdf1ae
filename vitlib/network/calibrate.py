"""Calibrated NF4: error compensation (GPTQ, Frantar et al. 2023) onto the grid of bitsandbytes' NF4.

Plain NF4 rounds each weight to the nearest code. Here the columns of a weight matrix are rounded one after another, and
the error of each is compensated in those that follow, so that the layer's *outputs* on some pictures change least. The
scales stay those that bitsandbytes found and rounded (double quantization); only codes change. So the result has the
bytes of plain NF4, and bitsandbytes, transformers and fused kernels load it. Blocks are treated in sequence, so that
each layer sees inputs that went through the quantized layers before it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from vitlib.network import quantize, tuning

DAMPING = 0.01  # of the mean diagonal, added to the diagonal: Frantar et al. 2023, section 3.3
TOGETHER = 128  # columns after which their errors are compensated in all that follow: one large product instead of many
STAGES = (  # linears of a block that have the same inputs, in the order in which they run
    ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    ("attention.o_proj",),
    ("mlp.fc1",),
    ("mlp.fc2",),
)


@dataclass(frozen=True)
class Grid:
    """The values that each weight of a matrix (out, in) may take: `levels` · scale + offset of its group.

    `levels` (k,) rise. `scales` and `offsets` are (out, groups): a group is `in` / groups consecutive weights of a row.
    """

    levels: Tensor
    scales: Tensor
    offsets: Tensor | None = None

    @classmethod
    def of_state(cls, state: "bnb.functional.QuantState") -> "Grid":
        """That of a weight in bitsandbytes' 4 bits, in float32 on its device."""
        scales = quantize.scales_of(state).view(state.shape[0], -1)
        return cls(state.code.to(scales.device).float(), scales)

    def columns(self, width: int) -> tuple[Tensor, Tensor]:
        """Scale and offset of each weight, transposed: (in, out)."""
        scales = self.scales.clamp(min=torch.finfo(torch.float32).tiny)
        offsets = torch.zeros_like(scales) if self.offsets is None else self.offsets
        return tuple(part.repeat_interleave(width // part.shape[1], dim=1).T.contiguous() for part in (scales, offsets))

    def nearest(self, weight: Tensor) -> Tensor:
        """Codes (out, in) of a weight (out, in), each rounded to the nearest value."""
        scales, offsets = self.columns(weight.shape[1])
        return torch.bucketize((weight.float().T.contiguous() - offsets) / scales, _middles(self.levels)).T

    def values(self, codes: Tensor) -> Tensor:
        """The weight (out, in) in float32 that has these codes (out, in)."""
        scales, offsets = self.columns(codes.shape[1])
        return (self.levels[codes.T.long()] * scales + offsets).T.contiguous()

    def compensated(self, weight: Tensor, gram: Tensor, graphs: dict | None = None) -> Tensor:
        """Codes (out, in) of a weight (out, in), with the rounding errors compensated; see the module's docstring.

        `gram` (in, in) is X'X of the layer's inputs X. Columns whose inputs are largest come first, while many are left
        that can compensate them. On CUDA, `graphs` keeps captured steps for later calls: launching them takes longer
        than running them.
        """
        order = gram.diagonal().argsort(descending=True)
        factor, back = _inverse_factor(gram[order][:, order]), order.argsort()
        left = weight.float()[:, order].T.contiguous()  # (in, out): each step works on adjacent memory
        scales, offsets = (part[order] for part in self.columns(len(left)))
        codes = torch.empty_like(left, dtype=torch.long)
        for start in range(0, len(left), TOGETHER):
            end = start + TOGETHER
            inputs = left[start:end], scales[start:end], offsets[start:end], factor[start:end, start:end], self.levels
            found = _step(*inputs) if graphs is None or not left.is_cuda else _replayed(graphs, *inputs)
            codes[start:end] = found[0]
            left[end:].addmm_(factor[start:end, end:].T, found[1], alpha=-1)
        return codes[back].T


def _step(left: Tensor, scales: Tensor, offsets: Tensor, factor: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (t, out) of t columns, each compensated in those after it in place, and their scaled errors (t, out)."""
    codes, errors, middles = torch.empty_like(left, dtype=torch.long), torch.empty_like(left), _middles(levels)
    for at in range(len(left)):
        codes[at] = torch.bucketize((left[at] - offsets[at]) / scales[at], middles)
        errors[at] = (left[at] - levels[codes[at]] * scales[at] - offsets[at]) / factor[at, at]
        left[at + 1 :].addr_(factor[at, at + 1 :], errors[at], alpha=-1)
    return codes, errors


def _replayed(graphs: dict, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """`_step` as a CUDA graph, captured once for each shape."""
    key = tuple(part.shape for part in inputs)
    if key not in graphs:
        own = [part.clone() for part in inputs]
        graphs[key] = own, *tuning.captured(lambda: _step(*own), own[0].device)
    own, graph, outputs = graphs[key]
    for part, value in zip(own, inputs, strict=True):
        part.copy_(value)
    graph.replay()
    return outputs


def _middles(levels: Tensor) -> Tensor:
    return (levels[1:] + levels[:-1]) / 2


def _inverse_factor(gram: Tensor) -> Tensor:
    """Upper Cholesky factor of the damped inverse of `gram` (n, n), float32; inputs that are 0 count as independent."""
    h = gram.double().clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()


@torch.no_grad()
def in_sequence(
    network: nn.Module, pixel_values: Tensor, rounded: Callable[[list[str], Tensor, Tensor], Tensor],
    batch_size: int = 32,
) -> None:  # fmt: skip
    """Round the encoder's linears of a ViT in float32, in place, each seeing inputs of the rounded ones before it.

    `rounded(names, weight, gram)` gives the rounded weight (out, in) of linears side by side that have the same inputs
    X, with `gram` X'X (in, in). `names` are those below `network.vit`; `pixel_values` are (n, 3, h, w).
    """
    device = next(network.parameters()).device
    states = [network.vit.embeddings(part.to(device)) for part in pixel_values.split(batch_size)]
    for number, block in enumerate(network.vit.layers):
        for names in STAGES:
            linears, gram = [block.get_submodule(name) for name in names], _gram(block, names[0], states)
            weight = torch.cat([linear.weight for linear in linears])
            found = rounded([f"layers.{number}.{name}" for name in names], weight, gram)
            for linear, part in zip(linears, found.split([len(linear.weight) for linear in linears]), strict=True):
                linear.weight.copy_(part)
        states = [block(state) for state in states]


def calibrate(network: nn.Module, quantized: nn.Module, pixel_values: Tensor) -> None:
    """Choose other codes for all NF4 layers of `quantized`, in place, from unlabelled `pixel_values` (n, 3, h, w).

    `network` is the unquantized ViT in float32 on the same device, and gets the calibrated weights too. `quantized`
    must not have run on a CPU yet, where bitsandbytes may repack the weights in a first pass.
    """
    graphs = {}

    def rounded(names: list[str], weight: Tensor, gram: Tensor) -> Tensor:
        layers = [quantized.vit.get_submodule(name) for name in names]
        grids = [Grid.of_state(layer.weight.quant_state) for layer in layers]
        grid = Grid(grids[0].levels, torch.cat([grid.scales for grid in grids]))
        codes = grid.compensated(weight, gram, graphs)
        for layer, part in zip(layers, codes.split([layer.out_features for layer in layers]), strict=True):
            quantize.set_codes(layer, part)
        return grid.values(codes)

    in_sequence(network, pixel_values, rounded)


def _gram(block: nn.Module, name: str, states: list[Tensor]) -> Tensor:
    """X'X (in, in) of the inputs X that the linear `name` of `block` sees when these `states` run through it."""
    found = []

    def add(_module: nn.Module, inputs: tuple[Tensor]) -> None:
        x = inputs[0].flatten(0, -2).float()
        found[:] = [x.T @ x + (found[0] if found else 0)]

    hook = block.get_submodule(name).register_forward_pre_hook(add)
    for state in states:
        block(state)
    hook.remove()
    return found[0]
