"""Pictures of many requests in one call of a network, which belongs to one thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

import torch

from vitlib.measure import timing
from vitlib.network.engine import Engine, finite

LIMIT = 8  # most pictures of a call
GATHER_S = 0.003  # seconds that a request waits for others to share its call
# Held while a network is prepared or called: meanwhile another must neither allocate, which would end the capture of a
# CUDA graph, nor lengthen the latencies that are shown.
_device = threading.Lock()


class Busy(RuntimeError):
    """A request that is refused because too many wait; the message says so."""


class Answer(NamedTuple):
    """float32 logits (classes,) on the CPU, and the call that gave them: its milliseconds and number of pictures."""

    logits: torch.Tensor
    ms: float
    batch: int


class Batcher:
    """Calls the engine that `load` makes with up to `LIMIT` of the pictures that wait, of which there are `bound`.

    Loading and all calls run in one thread of its own, as CUDA graphs need it. `engine` is a future with the errors of
    `load`.
    """

    def __init__(self, load: Callable[[], Engine], bound: int = 64) -> None:
        self._waiting: queue.Queue[tuple[torch.Tensor, Future[Answer]]] = queue.Queue(bound)
        self._thread = ThreadPoolExecutor(1, "network")
        self.engine: Future[Engine] = self._thread.submit(_prepared, load)

    def submit(self, pixels: torch.Tensor) -> Future[Answer]:
        """The future answer for uint8 `pixels` (3, height, width) resized by the preprocessing; waits for `engine`.

        ValueError for another shape or dtype, Busy where `bound` pictures wait already. The future fails with
        FloatingPointError for logits that are not finite, and with the errors of the call.
        """
        shape = (3, *self.engine.result().loaded.preprocess.side)
        if pixels.shape != shape or pixels.dtype != torch.uint8:  # it would fail the others of its call
            raise ValueError(f"a picture must be uint8 {shape}, not {pixels.dtype} {tuple(pixels.shape)}")
        future: Future[Answer] = Future()
        try:
            self._waiting.put_nowait((pixels, future))
        except queue.Full:
            raise Busy(f"{self._waiting.maxsize} pictures are waiting already: try again in a moment") from None
        self._thread.submit(self._serve)
        return future

    def _serve(self) -> None:
        """Answer pictures that wait; none where an earlier call had them all."""
        group, until = [], time.monotonic() + GATHER_S
        with suppress(queue.Empty):
            group.append(self._waiting.get_nowait())
            while len(group) < LIMIT:
                group.append(self._waiting.get(timeout=max(0.0, until - time.monotonic())))
        if group := [one for one in group if one[1].set_running_or_notify_cancel()]:
            self._answer(group)

    def _answer(self, group: list[tuple[torch.Tensor, Future[Answer]]]) -> None:
        engine = self.engine.result()
        try:
            logits, ms = _call(engine, [pixels for pixels, _ in group])
            for row, (_, future) in zip(logits, group, strict=True):
                future.set_result(Answer(finite(row, engine.loaded), ms, len(group)))
        except Exception as error:
            if len(group) == 1:
                group[0][1].set_exception(error)
                return
            for one in group:  # each alone, so that none fails for another
                if not one[1].done():
                    self._answer([one])


def _prepared(load: Callable[[], Engine]) -> Engine:
    """The engine after its first calls, which allocate and, for NF4 on a CPU, repack the weights."""
    with _device:
        engine = load()
    for _ in range(2):
        _call(engine, [torch.zeros(3, *engine.loaded.preprocess.side, dtype=torch.uint8)])
    return engine


@torch.inference_mode()
def _call(engine: Engine, pictures: list[torch.Tensor]) -> tuple[torch.Tensor, float]:
    """float32 logits (n, classes) of uint8 pictures (3, h, w), and the milliseconds of the network alone."""
    loaded = engine.loaded
    with _device:
        pixels = loaded.preprocess.normalise(torch.stack(pictures).to(loaded.device), loaded.dtype)
        timing.synchronise(loaded.device)
        start = time.perf_counter()
        logits = engine(pixels)
        timing.synchronise(loaded.device)
        ms = 1e3 * (time.perf_counter() - start)
        return logits.float().cpu(), ms
