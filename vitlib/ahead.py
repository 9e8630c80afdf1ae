"""Weights of coming blocks dequantized on a second stream while the present block computes. Level 1.

At small batches the products of a Vision Transformer leave most of a GPU idle, and dequantizing a weight costs about
half as much again as using it. Side by side it costs almost nothing. A few buffers are used in turn, so the network
never lies in 16 bit in memory as a whole. Captured in a CUDA graph the second stream becomes parallel branches.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from vitlib.linears import Linear

DEPTH = 2  # blocks: the one that computes and the one after it


class Ahead:
    """`with ahead.running():` around a pass, and in it `with ahead.block(i):` around each block.

    `blocks` are the layers of each block; all must be able to `dequantize_into` a tensor of `dtype`. `megabytes` is
    what the buffers weigh.
    """

    def __init__(self, blocks: Sequence[Sequence[Linear]], dtype: torch.dtype, device: torch.device) -> None:
        self.blocks = blocks
        largest = max(sum(layer.out_features * layer.in_features for layer in layers) for layers in blocks)
        self.buffers = [torch.empty(largest, dtype=dtype, device=device) for _ in range(min(DEPTH, len(blocks)))]
        self.stream = torch.cuda.Stream(device, priority=0)  # lower than that of captured passes
        self.active = False
        self._ready: list[torch.cuda.Event] = []

    @property
    def megabytes(self) -> float:
        return sum(buffer.nbytes for buffer in self.buffers) / 2**20

    @contextmanager
    def running(self) -> Iterator[None]:
        """A pass that takes weights from the buffers."""
        main = torch.cuda.current_stream()
        self.active, self._ready = True, []
        self.stream.wait_stream(main)
        for number in range(len(self.buffers)):
            self._dequantize(number)
        try:
            yield
        finally:
            self.active = False
            main.wait_stream(self.stream)

    @contextmanager
    def block(self, number: int) -> Iterator[None]:
        """Block `number`, once its weights are ready; afterwards its buffer is filled for a later block."""
        if not self.active:
            yield
            return
        main = torch.cuda.current_stream()
        main.wait_event(self._ready[number])
        for layer, weight in self._weights(number):
            layer.ahead = weight
        try:
            yield
        finally:
            for layer in self.blocks[number]:
                layer.ahead = None
        following = number + len(self.buffers)
        if following < len(self.blocks):
            self.stream.wait_event(main.record_event())
            self._dequantize(following)

    def _weights(self, number: int) -> Iterator[tuple[Linear, torch.Tensor]]:
        buffer, start = self.buffers[number % len(self.buffers)], 0
        for layer in self.blocks[number]:
            end = start + layer.out_features * layer.in_features
            yield layer, buffer[start:end].view(layer.out_features, layer.in_features)
            start = end

    def _dequantize(self, number: int) -> None:
        with torch.cuda.stream(self.stream):
            for layer, weight in self._weights(number):
                layer.dequantize_into(weight)
            self._ready.append(self.stream.record_event())
