"""Run a network eagerly, from CUDA graphs, or compiled, behind one call. Level 2."""

import time

import torch

from vitlib.models import Loaded


class Engine:
    """`engine(pixel_values) -> logits` (n, classes), with the same weights whatever the execution.

    `pixel_values` (n, 3, h, w) must lie on the engine's device in its dtype. With `graph` a batch is padded to the
    next captured size; a batch over the largest is cut. `prepare_s` holds the seconds that capturing took; a compiled
    engine compiles in the first call of each batch size.
    """

    def __init__(self, loaded: Loaded, execution: str = "eager", batch_sizes: tuple[int, ...] = (1, 8, 32)) -> None:
        self.loaded, self.execution = loaded, execution
        self.sizes = tuple(sorted(batch_sizes))
        self.prepare_s = 0.0
        self.pool_mb: dict[int, float] = {}  # what the graph of a batch size keeps for its inputs and activations
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = {}
        self._forward = torch.compile(self._eager, dynamic=False) if execution == "compile" else self._eager
        if execution == "graph":
            start = time.perf_counter()
            for size in self.sizes:
                # Not what is allocated afterwards: activations are freed within the graph's pool, and the pool is kept.
                torch.cuda.empty_cache()
                before = torch.cuda.memory_reserved(loaded.device)
                self._graphs[size] = self._capture(size)
                torch.cuda.empty_cache()
                self.pool_mb[size] = (torch.cuda.memory_reserved(loaded.device) - before) / 2**20
            self.prepare_s = time.perf_counter() - start

    def _eager(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.loaded.model(pixel_values=pixel_values).logits

    @torch.inference_mode()
    def _capture(self, size: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]:
        height, width = self.loaded.preprocess.side
        inputs = torch.zeros(size, 3, height, width, dtype=self.loaded.dtype, device=self.loaded.device)
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):  # warm-up off the default stream: lazy handles must not be captured
            for _ in range(3):
                self._eager(inputs)
        torch.cuda.current_stream().wait_stream(side_stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self._eager(inputs)
        return graph, inputs, outputs

    @torch.inference_mode()
    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if self.execution != "graph":
            return self._forward(pixel_values)
        parts = [self._replay(part) for part in pixel_values.split(self.sizes[-1])]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _replay(self, pixel_values: torch.Tensor) -> torch.Tensor:
        count = pixel_values.shape[0]
        size = next(size for size in self.sizes if size >= count)
        graph, inputs, outputs = self._graphs[size]
        inputs[:count].copy_(pixel_values)
        graph.replay()
        return outputs[:count].clone()  # the next replay overwrites the buffer


@torch.inference_mode()
def logits(engine: Engine, pixels: torch.Tensor, batch_size: int) -> torch.Tensor:
    """float32 logits (n, classes) on the CPU of uint8 `pixels` (n, 3, h, w), in batches."""
    parts = []
    for chunk in pixels.split(batch_size):
        batch = engine.loaded.preprocess.normalise(chunk.to(engine.loaded.device), engine.loaded.dtype)
        parts.append(engine(batch).float().cpu())
    return torch.cat(parts)
