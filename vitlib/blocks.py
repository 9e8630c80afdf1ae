"""Weights of a whole block dequantized at once, or while the block before it computes.

Each quantized linear costs a small kernel that dequantizes it before the product, and such a kernel takes about as long
to start as to run. Here the weights of a block are adjacent in memory, so that one kernel dequantizes them all. It may
do so on a second stream while the block before computes, which leaves most of a GPU idle at small batch sizes. One or
two buffers are used in turn, so the network is never in memory in FP16 as a whole. In a CUDA graph the second stream
becomes parallel branches.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from vitlib import layers as formats
from vitlib.kernels import dequantize
from vitlib.layers import NF4, Int8WeightOnly, Linear

BY_BLOCK, AHEAD = "by block", "ahead"
MODES = {BY_BLOCK: 1, AHEAD: 2}  # buffers: one is filled before its block runs, two also while the block before it runs
LAYER_BY_LAYER = "layer by layer"  # the mode without buffers
ALL_BLOCKS = "all blocks"  # what the tuning table calls the part that a mode concerns


class BlockWeights:
    """The quantized weights of a block's layers, moved side by side; the layers keep views of their parts.

    Make it before any graph is captured: the layers' own tensors are replaced. int8 rows of several lengths are cut
    into chunks of one length, and their `scales` are repeated for each chunk.
    """

    def __init__(self, layers: Sequence[Linear]) -> None:
        self.layers = layers
        self.counts = [layer.out_features * layer.in_features for layer in layers]
        if isinstance(layers[0], NF4):
            self.codes = _side_by_side(layers, "packed")
            self.scales = _side_by_side(layers, "absmax")
        else:
            self.codes = _side_by_side(layers, "rows")
            chunk = math.gcd(*(layer.in_features for layer in layers))
            self.scales = torch.cat([layer.scales.repeat_interleave(layer.in_features // chunk) for layer in layers])

    def dequantize_into(self, buffer: torch.Tensor) -> None:
        """All weights of the block, one matrix after the other, at the beginning of `buffer`."""
        run = dequantize.dequantize_nf4 if isinstance(self.layers[0], NF4) else dequantize.dequantize_int8
        run(self.codes, self.scales, buffer[: sum(self.counts)])

    def views(self, buffer: torch.Tensor) -> Iterator[tuple[Linear, torch.Tensor]]:
        """Each layer with its weight (N, K) in `buffer`."""
        parts = buffer[: sum(self.counts)].split(self.counts)
        for layer, part in zip(self.layers, parts, strict=True):
            yield layer, part.view(layer.out_features, layer.in_features)


def _side_by_side(layers: Sequence[Linear], name: str) -> torch.Tensor:
    """The tensors `name` of all layers as one run, row by row; each layer's own becomes a view of it."""
    tensors = [getattr(layer, name) for layer in layers]
    run = torch.cat([tensor.reshape(-1) for tensor in tensors])
    for layer, tensor, part in zip(layers, tensors, run.split([t.numel() for t in tensors]), strict=True):
        setattr(layer, name, part.view(tensor.shape))
    return run


def can_run(layers: Sequence[Linear]) -> bool:
    """Whether one kernel can dequantize these layers: all of them NF4 in this project's order, or all int8 rows."""
    if all(isinstance(layer, NF4) for layer in layers):
        return all(layer.repacked for layer in layers)
    return all(isinstance(layer, Int8WeightOnly) and formats.use_kernels(layer.rows.device) for layer in layers)


class BlockBuffers:
    """`with buffers.running():` around a pass, and in it `with buffers.block(i):` around each block.

    `mode` is one of `MODES`, `megabytes` what its buffers of `dtype` weigh. `shared_with`: reuse the buffers of another
    of these for the same blocks; passes of the two must not run concurrently, as graphs on one stream do not.
    """

    def __init__(
        self,
        blocks: Sequence[BlockWeights],
        dtype: torch.dtype,
        device: torch.device,
        mode: str,
        shared_with: "BlockBuffers | None" = None,
    ) -> None:
        self.blocks = blocks
        largest = max(sum(block.counts) for block in blocks)
        self.buffers = shared_with.buffers[: MODES[mode]] if shared_with else []
        missing = MODES[mode] - len(self.buffers)
        self.buffers += [torch.empty(largest, dtype=dtype, device=device) for _ in range(missing)]
        # Of lower priority than captured passes.
        self.stream = torch.cuda.Stream(device, priority=0) if mode == AHEAD else None
        self._ready: list[torch.cuda.Event] = []

    @property
    def megabytes(self) -> float:
        return sum(buffer.nbytes for buffer in self.buffers) / 2**20

    @contextmanager
    def running(self) -> Iterator[None]:
        """A pass that takes weights from the buffers."""
        if self.stream is None:
            yield
            return
        self._ready = []
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
        block, buffer = self.blocks[number], self._buffer(number)
        if self.stream is None:
            block.dequantize_into(buffer)
        else:
            torch.cuda.current_stream().wait_event(self._ready[number])
        for layer, weight in block.views(buffer):
            layer.prepared = weight
        try:
            yield
        finally:
            for layer in block.layers:
                layer.prepared = None
        following = number + len(self.buffers)
        if self.stream is not None and following < len(self.blocks):
            self.stream.wait_event(torch.cuda.current_stream().record_event())
            self._dequantize(following)

    def _buffer(self, number: int) -> torch.Tensor:
        return self.buffers[number % len(self.buffers)]

    def _dequantize(self, number: int) -> None:
        with torch.cuda.stream(self.stream):
            self.blocks[number].dequantize_into(self._buffer(number))
            self._ready.append(self.stream.record_event())
