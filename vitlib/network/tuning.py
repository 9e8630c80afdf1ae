"""Which implementation of each part of a network is fastest on this device, by measurement."""

import functools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import nn

from vitlib.measure import timing
from vitlib.network.kernels.triton_support import TritonError
from vitlib.study import files

FAILURES = (RuntimeError, ValueError, NotImplementedError, AssertionError, TritonError)  # of what is tried
FASTER = 0.97  # of the time of an implementation, at most, for another to be taken instead
CALLS = 24  # of a part at least in a timed graph: a graph of one kernel times its launch
AGREES = 0.02  # relative difference at most between two implementations
CONFIGURATIONS = 2  # of a kernel that are tried: each is compiled once a shape, which takes a second or two
Implementation = Callable[..., torch.Tensor]  # (part, *inputs, config) -> what the part's `forward` gives
COLUMNS = ("layer", "shape", "batch", "rows", "path", "config", "us", "difference", "chosen", "note")


class Tuned(nn.Module):
    """A part of a network with several implementations; which is fastest depends on the number of rows."""

    rows_per_picture = 1  # all tokens of a picture, or the class token alone
    shape: str  # the part's sizes in words
    device: torch.device

    def __init__(self) -> None:
        super().__init__()
        # Functions of the class, not bound methods: those would hold the network in a cycle, and on the GPU.
        self.choices: dict[int, tuple[Implementation, tuple | None]] = {}

    def implementations(self, rows: int) -> dict[str, Implementation]:
        """What can run for `rows` rows on this device, by name; the first is the reference and the default."""
        raise NotImplementedError

    def configurations(self, rows: int, name: str) -> tuple[tuple | None, ...]:
        """Configurations of an implementation worth timing for `rows` rows; None for one that has no parameters."""
        return (None,)

    def example(self, rows: int) -> tuple:
        """Random inputs of `forward` with `rows` rows, as the network would give them."""
        raise NotImplementedError

    def alike(self) -> tuple:
        """Equal for parts that do the same work with different weights: `tune` times them as one."""
        raise NotImplementedError

    def choose(self, rows: int, name: str, config: tuple | None = None) -> None:
        """Take the implementation `name`, with its `config`, for inputs of `rows` rows from now on."""
        self.choices[rows] = self.implementations(rows)[name], config

    def run(self, name: str, config: tuple | None, rows: int, *inputs: object) -> torch.Tensor:
        """The result of `forward` for `inputs` of `rows` rows by one implementation, whatever was chosen."""
        return self.implementations(rows)[name](self, *inputs, config=config)

    def run_chosen(self, rows: int, *inputs: object) -> torch.Tensor:
        """`run` with the chosen implementation, or the first where nothing was chosen."""
        function, config = self.choices.get(rows) or (next(iter(self.implementations(rows).values())), None)
        return function(self, *inputs, config=config)


class Trial(NamedTuple):
    """One implementation of a part of the network that was tried for a batch size.

    In records the columns are called `COLUMNS`.
    """

    part: str  # class of the layer, or `blocks.ALL_BLOCKS`
    shape: str
    batch: int
    rows: int
    implementation: str
    config: str = ""
    us: float = float("nan")  # microseconds of one call; NaN on a CPU or where it failed
    difference: float = float("nan")  # relative, to the reference
    chosen: bool = False
    note: str = ""  # why it is not usable


@torch.inference_mode()
def tune(module: nn.Module, batch_sizes: Iterable[int]) -> tuple[Trial, ...]:
    """Time the implementations of every `Tuned` part of `module` for each batch size, and choose the fastest.

    On CUDA the parts of one shape run one after another inside a captured graph, each with its own weights, as they
    do in a pass. On a CPU the first implementation is taken. An implementation replaces another that is slower by more
    than 3 %, the noise of ten replays, unless it fails here or differs from the first by more than 2 %. Of a kernel the
    first `CONFIGURATIONS` that run are tried, of a part without others like it only one. RuntimeError if none runs.
    """
    groups: dict[tuple, list[Tuned]] = defaultdict(list)
    for part in module.modules():
        if isinstance(part, Tuned):
            groups[part.alike()].append(part)
    trials = [trial for parts in groups.values() for size in sorted(set(batch_sizes)) for trial in _tuned(parts, size)]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what the timed graphs had allocated
    return tuple(trials)


def _tuned(parts: list[Tuned], batch: int) -> list[Trial]:
    """Trials of parts that are alike, for which the best is chosen."""
    first, rows, found = parts[0], batch * parts[0].rows_per_picture, []
    for name in first.implementations(rows):
        left = CONFIGURATIONS if len(parts) > 1 else 1
        for config in first.configurations(rows, name):
            trial = _measured(parts, batch, name, config)
            found.append((trial, config))
            left -= 0 if trial.note else 1  # one that does not run here leaves its turn to the next
            if not left:
                break
    usable = [pair for pair in found if not pair[0].note]
    if not usable:
        raise RuntimeError(f"no implementation of {type(first).__name__} runs for {rows} rows: {found[0][0].note}")
    best = usable[0]
    for pair in usable[1:]:  # comparisons with the missing times of a CPU are false
        best = pair if pair[0].us < FASTER * best[0].us else best
    for part in parts:
        part.choose(rows, best[0].implementation, best[1])
    return [trial._replace(chosen=trial is best[0]) for trial, _ in found]


def _measured(parts: list[Tuned], batch: int, name: str, config: tuple | None) -> Trial:
    """The trial of one implementation: microseconds of one call, and the relative difference to the first."""
    first, rows, times = parts[0], batch * parts[0].rows_per_picture, -(-CALLS // len(parts))
    trial = Trial(type(first).__name__, first.shape, batch, rows, name, "" if config is None else json.dumps(config))
    if first.device.type != "cuda":
        return trial
    inputs = first.example(rows)
    try:
        reference = first.run(next(iter(first.implementations(rows))), None, rows, *inputs)
        trial = trial._replace(difference=relative_error(first.run(name, config, rows, *inputs), reference))
        if not trial.difference <= AGREES:
            return trial._replace(note="differs from the reference")
        graph, _ = captured(lambda: _each(parts * times, name, config, rows, inputs), first.device)
        return trial._replace(us=timing.replay_us(graph) / (times * len(parts)))
    except FAILURES as error:
        return trial._replace(note=files.first_line(error))


def _each(parts: list[Tuned], name: str, config: tuple | None, rows: int, inputs: tuple) -> None:
    for part in parts:  # results are dropped at once: their memory is used again, as in a pass
        part.run(name, config, rows, *inputs)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of `expected`, in float64; both of one shape and on one device."""
    expected = expected.double()
    return ((found.double() - expected).norm() / expected.norm()).item()


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream that graphs are captured on: libraries keep a workspace of 32 MB for each stream."""
    return torch.cuda.Stream(device, priority=-1)  # above that of the second stream, which dequantizes ahead


def captured(call: Callable[[], object], device: torch.device) -> tuple["torch.cuda.CUDAGraph", object]:
    """`call` as a CUDA graph on `device`, and what it returned: the tensors that a replay writes."""
    stream = capture_stream(device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # lazy handles and workspaces must not be made while capturing
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = call()
    return graph, result
