"""Run a network eagerly, from CUDA graphs or fused, behind one call."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import nn

from vitlib.measure import timing
from vitlib.network import checkpoint, fused, tuning, verify
from vitlib.network.blocks import ALL_BLOCKS, LAYER_BY_LAYER, MODES, BlockBuffers
from vitlib.network.checkpoint import Loaded
from vitlib.network.layers import CLASSES, Dense
from vitlib.network.tuning import Trial
from vitlib.study import files
from vitlib.study.variants import EXECUTIONS, find

FASTER_PASS = 0.99  # of the time of a graph, at most, for another to replace it: passes in turn vary less than layers
TURNS, TURN_REPLAYS = 15, 4  # comparisons of two graphs, and the replays in each median: clocks drift


class Graph(NamedTuple):
    """A captured pass: replaying it reads `inputs` and writes `outputs`."""

    graph: "torch.cuda.CUDAGraph"
    inputs: torch.Tensor  # (n, 3, h, w)
    outputs: torch.Tensor  # (n, classes)
    pool_mb: float  # that the driver had to allocate for it
    buffers: BlockBuffers | None = None  # of the dequantized weights of blocks; they must live as long as the graph


class Engine:
    """`engine(pixel_values) -> logits` (n, classes), with the same weights whatever the execution.

    `pixel_values` (n, 3, h, w) must be on the engine's device in its dtype. `execution` is one of
    `variants.EXECUTIONS`, ValueError for any other. A fused one transforms the network (see `fused`) and chooses the
    implementation of each layer for `batch_sizes` by measurement; `engine.loaded` then holds the fused network, and the
    plain one is freed with the caller's own reference to it. With graphs a batch is padded to the next of
    `batch_sizes`, and one over the largest is cut, so that nothing is captured later.

    `prepare_s` are the seconds of transforming, tuning and capturing; `trials` is what tuning tried.
    """

    def __init__(self, loaded: Loaded, execution: str = "eager", batch_sizes: tuple[int, ...] = (1, 8, 32)) -> None:
        if execution not in EXECUTIONS:
            raise ValueError(f"there is no execution {execution!r}: it must be one of {', '.join(EXECUTIONS)}")
        self.execution, self.sizes, self.loaded = execution, tuple(sorted(batch_sizes)), loaded
        self.trials: tuple[Trial, ...] = ()
        self.graphs: dict[int, Graph] = {}
        start = time.perf_counter()
        if execution.startswith("fused"):
            self._fuse(side_by_side=execution.endswith("graph"))
        if execution.endswith("graph"):
            self.graphs = {size: self._capture(size) for size in self.sizes}
            self._choose_modes()
        self.prepare_s = 0.0 if execution == "eager" else time.perf_counter() - start

    @torch.inference_mode()
    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if not len(pixel_values):  # a product with a batch of nothing fails, or ends the process
            return pixel_values.new_empty(0, self.network.config.num_labels)
        if not self.graphs:
            return _logits(self.network, pixel_values)
        if len(pixel_values) <= self.sizes[-1]:  # the host has nothing else to do while a single picture waits
            return self._replay(pixel_values)
        return torch.cat([self._replay(part) for part in pixel_values.split(self.sizes[-1])])

    @property
    def network(self) -> nn.Module:
        """The module that computes: transformers' own, or the fused one."""
        return self.loaded.model

    @property
    def pool_mb(self) -> dict[int, float]:
        """By batch size, the megabytes of a graph's inputs, activations and buffers of dequantized weights."""
        return {n: graph.pool_mb + getattr(graph.buffers, "megabytes", 0.0) for n, graph in self.graphs.items()}

    @property
    def buffers_mb(self) -> float:
        """Megabytes of the buffers of dequantized weights beside the network; batch sizes and modes share them."""
        used = [graph.buffers.buffers for graph in self.graphs.values() if graph.buffers]
        buffers = {id(buffer): buffer.nbytes for each in used for buffer in each}
        return sum(buffers.values()) / 2**20

    def by_block(self, size: int) -> bool:
        """Whether the graph of this batch size dequantizes the weights of whole blocks, and not of each layer."""
        return size in self.graphs and self.graphs[size].buffers is not None

    def _fuse(self, *, side_by_side: bool) -> None:
        network = fused.fuse(self.network, self.loaded.variant)
        if side_by_side:
            network.put_side_by_side()
        verify.verify(network, self.loaded.variant)
        self.loaded = replace(self.loaded, model=network, weights_mb=verify.model_mb(network))
        self.trials = tuning.tune(network, self.sizes)

    @torch.inference_mode()
    def _capture(self, size: int) -> Graph:
        """The graph of a batch size; its pool keeps memory that is no longer allocated, so what is reserved counts."""
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self.loaded.device)
        inputs = torch.zeros(size, 3, *self.loaded.preprocess.side, dtype=self.loaded.dtype, device=self.loaded.device)
        graph, outputs = tuning.captured(lambda: _logits(self.network, inputs), self.loaded.device)
        torch.cuda.empty_cache()
        return Graph(graph, inputs, outputs, (torch.cuda.memory_reserved(self.loaded.device) - before) / 2**20)

    def _choose_modes(self) -> None:
        """Capture each size again with the weights of whole blocks dequantized at once, and keep what is faster.

        Where that wins, no implementation of a quantized layer runs at this batch size any more.
        """
        if not getattr(self.network, "block_weights", None):
            return
        modes, buffers = [], None
        for mode in MODES:
            buffers = self._try_mode(mode, buffers, modes) or buffers
        taken = {trial.batch for trial in modes if trial.chosen and trial.implementation != LAYER_BY_LAYER}
        unused = set(CLASSES) - {Dense.__name__}
        kept = (t._replace(chosen=t.chosen and not (t.batch in taken and t.part in unused)) for t in self.trials)
        self.trials = (*kept, *modes)

    @torch.inference_mode()
    def _try_mode(self, mode: str, shared_with: BlockBuffers | None, trials: list[Trial]) -> BlockBuffers | None:
        """Try one of `blocks.MODES` for each batch size and append its trials; returns its buffers for the next."""
        network, size, buffers, failed = self.network, self.sizes[0], None, ""
        try:
            network.block_buffers = buffers = BlockBuffers(network.block_weights, mode, shared_with)
            for size in self.sizes:
                other = self._capture(size)._replace(buffers=buffers)
                if self._compare(size, other, mode, trials):
                    self.graphs[size] = other
                del other  # before the next is captured
        except tuning.FAILURES as error:  # no memory, or a kernel that does not compile: the graphs so far stay
            failed = files.first_line(error)
        finally:
            network.block_buffers = None
        if failed:
            trials.append(Trial(ALL_BLOCKS, "", size, size, mode, note=failed))
            torch.cuda.synchronize(self.loaded.device)
            torch.cuda.empty_cache()
        return buffers

    def _compare(self, size: int, other: Graph, mode: str, trials: list[Trial]) -> bool:
        """Whether `other` is faster than the graph of `size` and right; appends the trials of both."""
        graphs = self.graphs[size], other
        pixel_values = torch.randn_like(other.inputs)
        for graph in graphs:
            graph.inputs.copy_(pixel_values)
            graph.graph.replay()
        difference = tuning.relative_error(other.outputs, graphs[0].outputs)
        turns = [[timing.replay_us(graph.graph, TURN_REPLAYS) for graph in graphs] for _ in range(TURNS)]
        before, after = (sorted(turn[k] for turn in turns)[TURNS // 2] for k in (0, 1))
        wins = difference <= tuning.AGREES and after < FASTER_PASS * before
        if not any(trial.batch == size and not trial.note for trial in trials):
            trials.append(Trial(ALL_BLOCKS, "", size, size, LAYER_BY_LAYER, "", before, 0.0, chosen=True))
        if wins:
            trials[:] = [trial._replace(chosen=trial.chosen and trial.batch != size) for trial in trials]
        trials.append(Trial(ALL_BLOCKS, "", size, size, mode, "", after, difference, chosen=wins))
        return wins

    def _replay(self, pixel_values: torch.Tensor) -> torch.Tensor:
        count = len(pixel_values)
        graph, inputs, outputs, *_ = self.graphs[next(size for size in self.sizes if size >= count)]
        if count < len(inputs):
            inputs, outputs = inputs[:count], outputs[:count]
        inputs.copy_(pixel_values)
        graph.replay()
        return outputs.clone()  # the next replay overwrites the buffer


def load(checkpoints: Path, name: str, device: str = "auto", batch_sizes: tuple[int, ...] = (1, 8, 32)) -> Engine:
    """The variant called `name` from the folder `checkpoints` of a study, verified and prepared for `batch_sizes`.

    A folder that is one checkpoint, such as an unpacked archive, is taken too.

    ValueError for an unknown name, otherwise the errors of `checkpoint.load`.
    """
    variant, target = find(name), checkpoint.pick_device(device)
    return Engine(checkpoint.load(Path(checkpoints), variant, target), variant.execution, batch_sizes)


def _logits(network: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    out = network(pixel_values)
    return out if isinstance(out, torch.Tensor) else out.logits


def tunings(engines: Mapping[str, Engine], name: str) -> pd.DataFrame:
    """What tuning tried for the fused engines: `tuning.COLUMNS`, and the column `name` says whose row it is."""
    rows = [(*trial, key) for key, engine in engines.items() for trial in engine.trials]
    return pd.DataFrame(rows, columns=[*tuning.COLUMNS, name])


@torch.inference_mode()
def logits(engine: Engine, pixels: torch.Tensor, batch_size: int) -> torch.Tensor:
    """float32 logits (n, classes) on the CPU of uint8 `pixels` (n, 3, h, w), in batches; see `finite`."""
    loaded = engine.loaded
    chunks = (loaded.preprocess.normalise(part.to(loaded.device), loaded.dtype) for part in pixels.split(batch_size))
    return finite(torch.cat([engine(chunk).float().cpu() for chunk in chunks]), loaded)


def finite(logits: torch.Tensor, loaded: Loaded) -> torch.Tensor:
    """The `logits` (n, classes); FloatingPointError where one is NaN or infinite: such a row names no class."""
    if wrong := (~logits.isfinite()).any(dim=-1).sum().item():
        raise FloatingPointError(
            f"{wrong} of {logits[..., 0].numel()} rows of logits of the checkpoint {loaded.folder.name!r} hold NaN or "
            f"infinity: its weights or its normalisation are unfit, or {str(loaded.dtype)[6:]} overflows"
        )
    return logits
