"""Run a network eagerly, from CUDA graphs, compiled or fused, behind one call. Level 2."""

import functools
import time
from typing import NamedTuple

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

    `prepare_s` are the seconds of transforming, tuning and capturing (with compilation, where compiled code is
    captured), `tune_s` those of tuning among them. `pool_mb` is by batch size what a graph keeps for its inputs and
    activations, with the buffers of weights dequantized ahead, which all sizes share and `buffers_mb` weighs once.
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
        self.prepare_s = self.tune_s = self.buffers_mb = 0.0
        self.compile_s: dict[int, float] = {}
        self.pool_mb: dict[int, float] = {}
        self._graphs: dict[int, Graph] = {}
        self._ahead: Ahead | None = None
        start = time.perf_counter()
        self.loaded = self._transformed(loaded, gelu, scales) if execution.startswith("fused") else loaded
        # Of the network and not of this engine: a cycle would keep both on the GPU until the collector comes by.
        compiled = functools.partial(_logits, self.network)
        self._compiled = torch.compile(compiled, dynamic=False, backend=backend) if "compile" in execution else None
        if execution.endswith("graph"):
            for size in self.sizes:
                self._graphs[size], self.pool_mb[size] = self._capture(size)
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

    def _forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if self._compiled is None:
            return _logits(self.network, pixel_values)
        size = pixel_values.shape[0]
        if size in self.compile_s:
            return self._compiled(pixel_values)
        start = time.perf_counter()
        logits = self._compiled(pixel_values)
        timing.synchronise(self.loaded.device)
        self.compile_s[size] = time.perf_counter() - start
        return logits

    @torch.inference_mode()
    def _try_ahead(self) -> None:
        """Capture each size once more with weights dequantized on a second stream, and keep what is faster."""
        network = self.network
        network.ahead = ahead = Ahead([block.layers() for block in network.blocks], self.loaded.dtype, self.device)
        try:
            for size in self.sizes:
                other, pool = self._capture(size)
                if self._compare(size, other):
                    self._graphs[size], self.pool_mb[size] = other, pool + ahead.megabytes
                    self._ahead, self.buffers_mb = ahead, ahead.megabytes
        except torch.OutOfMemoryError:  # what was captured before goes on as it is
            torch.cuda.empty_cache()
        finally:
            network.ahead = None

    def _compare(self, size: int, other: "Graph") -> bool:
        """Whether `other`, with weights dequantized ahead, is faster than the graph of `size` and right; noted."""
        graphs = self._graphs[size], other
        pixel_values = torch.randn_like(other.inputs)
        for graph in graphs:
            graph.inputs.copy_(pixel_values)
            graph.graph.replay()
        difference = ((other.outputs - graphs[0].outputs).norm() / graphs[0].outputs.norm()).item()
        times = [linears.replay_us(graph.graph) for graph in graphs]
        wins = difference <= linears.AGREES and times[1] < linears.FASTER * times[0]
        if wins:  # then no layer takes a path of its own
            tokens = {
                module.rows_per_picture
                for module in self.network.blocks.modules()
                if isinstance(module, linears.Linear)
            }
            for row in self.network.tuning:
                row["chosen"] &= row["layer"] == "Dense" or row["rows"] not in {size * count for count in tokens}
        shared = {"layer": "all blocks", "shape": "", "rows": size, "config": "", "note": "rows are pictures"}
        self.network.tuning += [
            {**shared, "path": path, "us": us, "difference": apart, "chosen": chosen}
            for path, us, apart, chosen in zip(
                ("in turn", "ahead"), times, (0.0, difference), (not wins, wins), strict=True
            )
        ]
        return wins

    @property
    def device(self) -> torch.device:
        """Where the network lies."""
        return self.loaded.device

    @torch.inference_mode()
    def _capture(self, size: int) -> "tuple[Graph, float]":
        """The graph of a batch size, and the megabytes that the driver had to give for it.

        Not what is allocated afterwards: activations are freed within the graph's pool, and the pool is kept.
        """
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self.device)
        inputs = torch.zeros(size, 3, *self.loaded.preprocess.side, dtype=self.loaded.dtype, device=self.device)
        graph, outputs = linears.captured(lambda: self._forward(inputs))
        torch.cuda.empty_cache()
        return Graph(graph, inputs, outputs), (torch.cuda.memory_reserved(self.device) - before) / 2**20

    @torch.inference_mode()
    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if not len(pixel_values):  # a product with a batch of nothing fails, or ends the process
            return pixel_values.new_empty(0, self.network.config.num_labels)
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


class Graph(NamedTuple):
    """A captured pass: replaying it reads `inputs` (n, 3, h, w) and writes `outputs` (n, classes)."""

    graph: "torch.cuda.CUDAGraph"
    inputs: torch.Tensor
    outputs: torch.Tensor


def _logits(network: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    out = network(pixel_values)
    return out if isinstance(out, torch.Tensor) else out.logits


@torch.inference_mode()
def logits(engine: Engine, pixels: torch.Tensor, batch_size: int) -> torch.Tensor:
    """float32 logits (n, classes) on the CPU of uint8 `pixels` (n, 3, h, w), in batches."""
    parts = []
    for chunk in pixels.split(batch_size):
        batch = engine.loaded.preprocess.normalise(chunk.to(engine.loaded.device), engine.loaded.dtype)
        parts.append(engine(batch).float().cpu())
    return torch.cat(parts)
