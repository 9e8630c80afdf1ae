"""Weights of a whole block dequantized at once, or while the block before it computes.

A kernel that dequantizes one linear takes about as long to start as to run. Here the weights of a block are adjacent in
memory, so that one kernel dequantizes them all. It may do so on a second stream while the block before computes, which
leaves most of a GPU idle at small batch sizes. One or two buffers are used in turn, so the whole network is never in
memory in FP16. In a CUDA graph the second stream becomes parallel branches.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

import torch

from vitlib.network import layers
from vitlib.network.kernels import dequantize
from vitlib.network.layers import NF4, Int8WeightOnly, Linear

BY_BLOCK, AHEAD = "by block", "ahead"
MODES = {BY_BLOCK: 1, AHEAD: 2}  # buffers: one is filled before its block runs, two also while the block before it runs
LAYER_BY_LAYER = "layer by layer"  # the mode without buffers
ALL_BLOCKS = "all blocks"  # what the tuning table calls the part that a mode concerns


class BlockWeights:
    """The quantized weights of the linears of a block, moved side by side; the linears keep views of their parts.

    The linears' own tensors are replaced, so make it before any graph is captured. int8 rows of several lengths are cut
    into chunks of one length, and their `scales` are repeated for each chunk.
    """

    def __init__(self, linears: Sequence[Linear]) -> None:
        self.layers = linears
        self.counts = [layer.out_features * layer.in_features for layer in linears]
        self.repeats = isinstance(linears[0], Int8WeightOnly)  # whether `scales` are a copy
        if self.repeats:
            self.codes, chunk = _side_by_side(linears, "rows"), math.gcd(*(layer.in_features for layer in linears))
            self.scales = torch.cat([layer.scales.repeat_interleave(layer.in_features // chunk) for layer in linears])
        else:
            self.codes, self.scales = _side_by_side(linears, "packed"), _side_by_side(linears, "absmax")

    def dequantize_into(self, buffer: torch.Tensor) -> None:
        """All weights of the block, one matrix after the other, at the beginning of `buffer`."""
        run = dequantize.dequantize_int8 if self.repeats else dequantize.dequantize_nf4
        run(self.codes, self.scales, buffer[: sum(self.counts)])

    def prepare(self, buffer: torch.Tensor | None) -> None:
        """Let each linear use its part of `buffer` (N, K), or with None its own weight again."""
        parts = [None] * len(self.layers) if buffer is None else buffer[: sum(self.counts)].split(self.counts)
        for layer, part in zip(self.layers, parts, strict=True):
            layer.prepared = None if part is None else part.view(layer.out_features, layer.in_features)


def _side_by_side(linears: Sequence[Linear], name: str) -> torch.Tensor:
    """The tensors `name` of all linears as one run, row by row; each linear's own becomes a view of it."""
    tensors = [getattr(layer, name) for layer in linears]
    run = torch.cat([tensor.reshape(-1) for tensor in tensors])
    for layer, tensor, part in zip(linears, tensors, run.split([t.numel() for t in tensors]), strict=True):
        setattr(layer, name, part.view(tensor.shape))
    return run


def can_run(linears: Sequence[Linear]) -> bool:
    """Whether one kernel can dequantize these linears: all of them NF4 in this project's order, or all int8 rows."""
    if all(isinstance(layer, NF4) and layer.repacked for layer in linears):
        return True
    return all(isinstance(layer, Int8WeightOnly) and layers.use_kernels(layer.device) for layer in linears)


class BlockBuffers:
    """`with buffers.running():` around a pass, and in it `with buffers.block(i):` around each block.

    `mode` is one of `MODES`. `shared_with`: reuse the buffers of another of these for the same blocks; passes of the
    two must not run concurrently, as graphs on one stream do not.
    """

    def __init__(self, blocks: Sequence[BlockWeights], mode: str, shared_with: Self | None = None) -> None:
        self.blocks, count, first = blocks, MODES[mode], blocks[0]
        self.buffers = shared_with.buffers[:count] if shared_with else []
        sizes = {"dtype": first.layers[0].dtype, "device": first.codes.device}
        largest = max(sum(block.counts) for block in blocks)
        self.buffers += [torch.empty(largest, **sizes) for _ in range(count - len(self.buffers))]
        # The second stream, of lower priority than captured passes.
        self.stream = torch.cuda.Stream(first.codes.device, priority=0) if mode == AHEAD else None
        self.megabytes, self._ready = sum(buffer.nbytes for buffer in self.buffers) / 2**20, []

    @contextmanager
    def running(self) -> Iterator[None]:
        """A pass that takes weights from the buffers."""
        if self.stream is None:
            yield
            return
        self._ready.clear()
        self.stream.wait_stream(torch.cuda.current_stream())
        for number in range(min(len(self.buffers), len(self.blocks))):
            self._dequantize(number)
        try:
            yield
        finally:
            torch.cuda.current_stream().wait_stream(self.stream)

    @contextmanager
    def block(self, number: int) -> Iterator[None]:
        """Block `number`, once its weights are ready; afterwards its buffer may be filled for a later block."""
        block, buffer = self.blocks[number], self.buffers[number % len(self.buffers)]
        if self.stream is None:
            block.dequantize_into(buffer)
        else:
            torch.cuda.current_stream().wait_event(self._ready[number])
        block.prepare(buffer)
        try:
            yield
        finally:
            block.prepare(None)
        following = number + len(self.buffers)
        if self.stream is not None and following < len(self.blocks):
            self.stream.wait_event(torch.cuda.current_stream().record_event())
            self._dequantize(following)

    def _dequantize(self, number: int) -> None:
        with torch.cuda.stream(self.stream):
            self.blocks[number].dequantize_into(self.buffers[number % len(self.buffers)])
            self._ready.append(self.stream.record_event())
