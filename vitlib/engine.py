"""Run a network eagerly, from CUDA graphs, compiled or fused, behind one call. Level 2."""

import functools
import time
from collections.abc import Callable

import pandas as pd
import torch
from torch import nn

from vitlib import fused, linears, models, timing
from vitlib.ahead import Ahead
from vitlib.models import Loaded


class Engine:
    """`engine(pixel_values) -> logits` (n, classes), with the same weights whatever the execution.

    `pixel_values` (n, 3, h, w) must lie on the engine's device in its dtype. `execution` is one of
    `variants.EXECUTIONS`. A fused one transforms the network (see `fused`) and chooses the path of each layer for
    `batch_sizes` by measurement; `engine.loaded` then holds the fused network in place of the plain one, which is freed
    with the caller's own reference to it. With graphs or compilation a batch is padded to the next of `batch_sizes`,
    and one over the largest is cut, so that nothing is captured or compiled anew.

    `prepare_s` are the seconds of transforming, tuning and capturing, `tune_s` those of tuning among them.
    `compile_s` holds the seconds of the first call of each batch size of a compiled engine. `gelu` and `scales` are
    those of `fused.fuse`; `backend` is torch.compile's.
    """

    def __init__(
        self,
        loaded: Loaded,
        execution: str = "eager",
        batch_sizes: tuple[int, ...] = (1, 8, 32),
        *,
        gelu: str = "checkpoint",
        scales: str = "expanded",
        backend: str = "inductor",
    ) -> None:
        self.execution, self.sizes = execution, tuple(sorted(batch_sizes))
        self.prepare_s = self.tune_s = 0.0
        self.compile_s: dict[int, float] = {}
        self.pool_mb: dict[int, float] = {}  # what the graph of a batch size keeps for its inputs and activations
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = {}
        start = time.perf_counter()
        self.loaded = self._transformed(loaded, gelu, scales) if execution.startswith("fused") else loaded
        self._forward: Callable[[torch.Tensor], torch.Tensor] = self._eager
        if "compile" in execution:
            self._forward = self._clocked(torch.compile(self._eager, dynamic=False, backend=backend))
        if execution.endswith("graph"):
            for size in self.sizes:
                # Not what is allocated afterwards: activations are freed within the graph's pool, and the pool is kept.
                torch.cuda.empty_cache()
                before = torch.cuda.memory_reserved(loaded.device)
                self._graphs[size] = self._capture(size)
                torch.cuda.empty_cache()
                self.pool_mb[size] = (torch.cuda.memory_reserved(loaded.device) - before) / 2**20
            if execution == "fused-graph" and self.network.can_dequantize_ahead():
                self._try_ahead()
        if execution not in ("eager", "compile"):
            self.prepare_s = time.perf_counter() - start

    @property
    def network(self) -> nn.Module:
        """The module that computes: transformers' own, or the fused one."""
        return self.loaded.model

    @property
    def tuning(self) -> pd.DataFrame:
        """The paths measured for a fused network's layers (`fused.tuning_table`); empty for others."""
        return fused.tuning_table(self.network)

    def _transformed(self, loaded: Loaded, gelu: str, scales: str) -> Loaded:
        result = fused.fused_loaded(loaded, gelu=gelu, scales=scales)
        if loaded.variant is not None:
            models.verify(result.model, loaded.variant)
        start = time.perf_counter()
        fused.tune(result.model, self.sizes)
        self.tune_s = time.perf_counter() - start
        return result

    def _eager(self, pixel_values: torch.Tensor) -> torch.Tensor:
        out = self.network(pixel_values)
        return out if isinstance(out, torch.Tensor) else out.logits

    def _clocked(self, compiled: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        """`compiled`, with the time of the first call of each batch size, which compiles, in `compile_s`."""

        def call(pixel_values: torch.Tensor) -> torch.Tensor:
            size = pixel_values.shape[0]
            if size in self.compile_s:
                return compiled(pixel_values)
            start = time.perf_counter()
            logits = compiled(pixel_values)
            timing.synchronise(self.loaded.device)
            self.compile_s[size] = time.perf_counter() - start
            return logits

        return call

    @torch.inference_mode()
    def _try_ahead(self) -> None:
        """Capture each size once more with weights dequantized on a second stream, and keep what is faster."""
        self.network.ahead = Ahead([block.layers() for block in self.network.blocks], self.loaded.dtype, self.device)
        rows = []
        for size in self.sizes:
            plain, other = self._graphs[size], self._capture(size)
            times = [linears.replay_us(graph) for graph, *_ in (plain, other)]
            wins = times[1] < times[0]
            if wins:
                self._graphs[size] = other
                self.pool_mb[size] += self.network.ahead.megabytes
            for path, us, chosen in zip(("in turn", "ahead"), times, (not wins, wins), strict=True):
                row = {"layer": "all blocks", "shape": "", "rows": size, "path": path, "config": "", "us": us}
                rows.append(row | {"difference": 0.0, "chosen": chosen, "note": "rows are pictures"})
        self._ahead, self.network.ahead = self.network.ahead, None  # graphs go on using the buffers
        self.network.tuning = [*self.network.tuning, *rows]

    @property
    def device(self) -> torch.device:
        """Where the network lies."""
        return self.loaded.device

    @torch.inference_mode()
    def _capture(self, size: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]:
        height, width = self.loaded.preprocess.side
        inputs = torch.zeros(size, 3, height, width, dtype=self.loaded.dtype, device=self.loaded.device)
        stream = _capture_stream(self.loaded.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # lazy handles and workspaces must not be made while capturing
            for _ in range(3):
                self._forward(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            outputs = self._forward(inputs)
        return graph, inputs, outputs

    @torch.inference_mode()
    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if self.execution in ("eager", "fused"):
            return self._forward(pixel_values)
        one = self._replay if self._graphs else self._padded
        parts = [one(part) for part in pixel_values.split(self.sizes[-1])]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _size_for(self, count: int) -> int:
        return next(size for size in self.sizes if size >= count)

    def _padded(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Through the compiled code of the next batch size: another size would be compiled anew."""
        count = pixel_values.shape[0]
        missing = self._size_for(count) - count
        if missing:
            pixel_values = torch.cat((pixel_values, pixel_values.new_zeros(missing, *pixel_values.shape[1:])))
        return self._forward(pixel_values)[:count]

    def _replay(self, pixel_values: torch.Tensor) -> torch.Tensor:
        count = pixel_values.shape[0]
        graph, inputs, outputs = self._graphs[self._size_for(count)]
        inputs[:count].copy_(pixel_values)
        graph.replay()
        return outputs[:count].clone()  # the next replay overwrites the buffer


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream that graphs are captured on: libraries keep a workspace of 32 MB a stream.

    Its priority is higher than that of a second stream in a network, whose work can wait.
    """
    return torch.cuda.Stream(device, priority=-1)


@torch.inference_mode()
def logits(engine: Engine, pixels: torch.Tensor, batch_size: int) -> torch.Tensor:
    """float32 logits (n, classes) on the CPU of uint8 `pixels` (n, 3, h, w), in batches."""
    parts = []
    for chunk in pixels.split(batch_size):
        batch = engine.loaded.preprocess.normalise(chunk.to(engine.loaded.device), engine.loaded.dtype)
        parts.append(engine(batch).float().cpu())
    return torch.cat(parts)
