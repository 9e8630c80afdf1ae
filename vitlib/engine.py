"""Run a network eagerly, from CUDA graphs, compiled or fused, behind one call. Level 2."""

import functools
import time
from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd
import torch
from torch import nn

from vitlib import files, fused, linears, models, quantize, timing
from vitlib.ahead import WAYS, Ahead
from vitlib.models import Loaded
from vitlib.variants import EXECUTIONS

# Of the time of a graph, at most, for another to replace it: whole passes in turn vary less than layers.
FASTER_PASS = 0.99
COMPILED = 1024  # pairs of network and batch size in a process, at most


class Engine:
    """`engine(pixel_values) -> logits` (n, classes), with the same weights whatever the execution.

    `pixel_values` (n, 3, h, w) must lie on the engine's device in its dtype. `execution` is one of
    `variants.EXECUTIONS`. A fused one transforms the network (see `fused`) and chooses the path of each layer for
    `batch_sizes` by measurement; `engine.loaded` then holds the fused network in place of the plain one, which is freed
    with the caller's own reference to it. With graphs or compilation a batch is padded to the next of `batch_sizes`,
    and one over the largest is cut, so that nothing is captured or compiled anew.

    `prepare_s` are the seconds of transforming, tuning and capturing (with compilation, where compiled code is
    captured), `tune_s` those of tuning among them. `pool_mb` is by batch size what a graph keeps for its inputs and
    activations, with the buffers of weights that are dequantized by block; `buffers_mb` counts those once.
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
        if execution not in EXECUTIONS:
            raise ValueError(f"there is no execution {execution!r}: it must be one of {', '.join(EXECUTIONS)}")
        self.execution, self.sizes = execution, tuple(sorted(batch_sizes))
        self.prepare_s = self.tune_s = 0.0
        self.compile_s: dict[int, float] = {}
        self.pool_mb: dict[int, float] = {}
        self._graphs: dict[int, Graph] = {}
        self._aheads: dict[int, Ahead] = {}
        start = time.perf_counter()
        self.loaded = self._transformed(loaded, gelu, scales) if execution.startswith("fused") else loaded
        # Of the network and not of this engine: a cycle would keep both on the GPU until the collector comes by.
        compiled = functools.partial(_logits, self.network)
        self._compiled = torch.compile(compiled, dynamic=False, backend=backend) if "compile" in execution else None
        if execution.endswith("graph"):
            for size in self.sizes:
                self._graphs[size], self.pool_mb[size] = self._capture(size)
            if execution == "fused-graph" and self.network.block_weights:
                lender = None
                for way, depth in WAYS.items():
                    lender = self._try_ahead(way, depth, lender)
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
        graphs = self.execution == "fused-graph"
        result = fused.fused_loaded(loaded, gelu=gelu, scales=scales, side_by_side=graphs)
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
        # All engines share the compiler's count for one function, beyond which it would run eagerly with a warning.
        with torch._dynamo.config.patch(recompile_limit=COMPILED, accumulated_recompile_limit=COMPILED):
            logits = self._compiled(pixel_values)
        timing.synchronise(self.loaded.device)
        self.compile_s[size] = time.perf_counter() - start
        return logits

    @torch.inference_mode()
    def _try_ahead(self, way: str, depth: int, lender: Ahead | None) -> Ahead | None:
        """Capture each size once more with the weights of whole blocks dequantized at once; keep what is faster.

        Gives back whose buffers the next way may use too.
        """
        network, failed, ahead = self.network, "", None
        try:
            network.ahead = ahead = Ahead(network.block_weights, self.loaded.dtype, self.device, depth, lender)
            for size in self.sizes:
                other, pool = self._capture(size)
                if self._compare(size, other, way):
                    self._graphs[size], self.pool_mb[size] = other, pool + ahead.megabytes
                    self._aheads[size] = ahead  # its buffers live as long as the graph
                other = None  # before the next is captured
        except linears.FAILURES as error:  # no memory, or a kernel that does not compile: what works goes on as it is
            failed = files.first_line(error)
        finally:
            network.ahead = None
        if failed:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            network.tuning += [{"layer": "all blocks", "path": way, "batch": 0, "chosen": False, "note": failed}]
        return ahead or lender

    def by_block(self, size: int) -> bool:
        """Whether the graph of this batch size dequantizes the weights of whole blocks, and not of each layer."""
        return size in self._aheads

    @property
    def buffers_mb(self) -> float:
        """Megabytes that dequantized weights of blocks take beside the network; sizes and ways share them."""
        buffers = {id(buffer): buffer for ahead in self._aheads.values() for buffer in ahead.buffers}
        return sum(buffer.nbytes for buffer in buffers.values()) / 2**20

    def _compare(self, size: int, other: "Graph", way: str) -> bool:
        """Whether `other` is faster than the graph of `size` and right; both are noted in the tuning table."""
        graphs = self._graphs[size], other
        pixel_values = torch.randn_like(other.inputs)
        for graph in graphs:
            graph.inputs.copy_(pixel_values)
            graph.graph.replay()
        difference = quantize.relative_error(other.outputs, graphs[0].outputs)
        turns = [[linears.replay_us(graph.graph, 4) for graph in graphs] for _ in range(15)]  # clocks drift under both
        times = [sorted(turn[k] for turn in turns)[7] for k in (0, 1)]
        wins = difference <= linears.AGREES and times[1] < FASTER_PASS * times[0]
        if wins:
            self._unchoose(size)
        shared = {"layer": "all blocks", "shape": "", "batch": size, "rows": size, "config": "", "note": ""}
        self.network.tuning += [
            {**shared, "path": f"until then, against {way}", "us": times[0], "difference": 0.0, "chosen": False},
            {**shared, "path": way, "us": times[1], "difference": difference, "chosen": wins},
        ]
        return wins

    def _unchoose(self, size: int) -> None:
        """No path of a quantized layer is taken at this batch size any more, nor another way for all blocks."""
        for row in self.network.tuning:
            row["chosen"] &= row["batch"] != size or row["layer"] in ("Dense", "ScaledDotProduct")

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
        graph, outputs = linears.captured(lambda: self._forward(inputs), self.device)
        torch.cuda.empty_cache()
        return Graph(graph, inputs, outputs), (torch.cuda.memory_reserved(self.device) - before) / 2**20

    @torch.inference_mode()
    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if not len(pixel_values):  # a product with a batch of nothing fails, or ends the process
            return pixel_values.new_empty(0, self.network.config.num_labels)
        if self.execution in ("eager", "fused"):
            return self._forward(pixel_values)
        one = self._replay if self._graphs else self._padded
        if len(pixel_values) <= self.sizes[-1]:  # the host has nothing else to do while a single picture waits
            return one(pixel_values)
        return torch.cat([one(part) for part in pixel_values.split(self.sizes[-1])])

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
        if count < len(inputs):
            inputs, outputs = inputs[:count], outputs[:count]
        inputs.copy_(pixel_values)
        graph.replay()
        return outputs.clone()  # the next replay overwrites the buffer


class Graph(NamedTuple):
    """A captured pass: replaying it reads `inputs` (n, 3, h, w) and writes `outputs` (n, classes)."""

    graph: "torch.cuda.CUDAGraph"
    inputs: torch.Tensor
    outputs: torch.Tensor


def _logits(network: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    out = network(pixel_values)
    return out if isinstance(out, torch.Tensor) else out.logits


def tunings(engines: Mapping[str, Engine], name: str) -> pd.DataFrame:
    """The tuning tables of all fused engines in one, whose column `name` says whose row it is; empty without any."""
    tables = [table.assign(**{name: key}) for key, engine in engines.items() if len(table := engine.tuning)]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


@torch.inference_mode()
def logits(engine: Engine, pixels: torch.Tensor, batch_size: int) -> torch.Tensor:
    """float32 logits (n, classes) on the CPU of uint8 `pixels` (n, 3, h, w), in batches."""
    parts = []
    for chunk in pixels.split(batch_size):
        batch = engine.loaded.preprocess.normalise(chunk.to(engine.loaded.device), engine.loaded.dtype)
        parts.append(engine(batch).float().cpu())
    return torch.cat(parts)
