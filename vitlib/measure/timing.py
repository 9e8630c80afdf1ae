"""Latency, throughput and memory of a callable; the only module that measures durations.

A latency sample is one call, from an idle device until the device is done. Throughput is measured separately, over
calls that are queued without waiting. All candidates are measured in rounds, each in a new random order, so that a
drift of the machine (clocks, other processes) affects all of them alike.
"""

import contextlib
import gc
import itertools
import random
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass

import pandas as pd
import torch

Call = Callable[[int], object]  # called with a running number, so that it can rotate its inputs


@dataclass(frozen=True)
class Budget:
    """How long to measure: `rounds` of at most `samples` calls or `seconds`, whichever ends first."""

    rounds: int = 6
    samples: int = 24
    seconds: float = 0.3


def synchronise(device: torch.device) -> None:
    """Wait until `device` has finished everything that was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Python's collector stops a call of 9 ms for several of them, at moments that have nothing to do with the call."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def busy(seconds: float) -> Call:
    """A call of known duration, to calibrate the clock with; it spins, as a sleep ends late."""

    def call(_: int) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    return call


def warm_up(call: Call, device: torch.device, *, seconds: float, least: int = 3) -> int:
    """Call until two calls in a row differ by under 10 %, or `seconds` are over; returns the number of calls."""
    last, start = float("inf"), time.perf_counter()
    for count in itertools.count(1):
        took, _ = _timed(call, count - 1, device)
        stable = abs(took - last) < 0.1 * last
        if count >= least and (stable or time.perf_counter() - start > seconds):
            return count
        last = took


def _timed(call: Call, number: int, device: torch.device) -> tuple[float, float]:
    """Seconds of one call by the wall clock, until the device is done, and between two device events (CPU: NaN)."""
    cuda = device.type == "cuda"
    before, after = (torch.cuda.Event(enable_timing=True) if cuda else None for _ in range(2))
    if cuda:
        before.record()
    start = time.perf_counter()  # after recording the event, so that its cost is excluded
    call(number)
    if cuda:
        after.record()
    synchronise(device)
    wall = time.perf_counter() - start
    return wall, before.elapsed_time(after) / 1e3 if cuda else float("nan")


@_no_garbage_collection()
def latency(calls: Mapping[Hashable, Call], device: torch.device, budget: Budget, seed: int = 0) -> pd.DataFrame:
    """Every sample as a row: candidate, round, sample, latency_ms, device_ms.

    `latency_ms` is by the wall clock to the end of the device's work, `device_ms` between two device events around the
    call (missing on a CPU).
    """
    order, shuffle, rows = list(calls), random.Random(seed), []
    for round_number in range(budget.rounds):
        shuffle.shuffle(order)
        for candidate in order:
            call = calls[candidate]
            warm_up(call, device, seconds=budget.seconds, least=3 if round_number == 0 else 1)
            deadline = time.perf_counter() + budget.seconds
            for sample in range(budget.samples):
                wall, events = _timed(call, sample, device)
                rows.append((candidate, round_number, sample, wall * 1e3, events * 1e3))
                if time.perf_counter() > deadline:
                    break
    return pd.DataFrame(rows, columns=["candidate", "round", "sample", "latency_ms", "device_ms"])


@_no_garbage_collection()
def throughput(
    calls: Mapping[Hashable, Call], sizes: Mapping[Hashable, int], device: torch.device, budget: Budget, seed: int = 0
) -> pd.DataFrame:
    """Every round as a row: candidate, round, throughput_img_s, from queued calls, each of `sizes` pictures."""
    order, shuffle, rows = list(calls), random.Random(seed + 1), []
    for round_number in range(budget.rounds):
        shuffle.shuffle(order)
        for candidate in order:
            call = calls[candidate]
            once, _ = _timed(call, 0, device)
            repeats = max(2, min(budget.samples, int(budget.seconds / max(once, 1e-6))))
            start = time.perf_counter()
            for number in range(repeats):
                call(number)
            synchronise(device)
            rows.append((candidate, round_number, repeats * sizes[candidate] / (time.perf_counter() - start)))
    return pd.DataFrame(rows, columns=["candidate", "round", "throughput_img_s"])


def replay_us(graph: "torch.cuda.CUDAGraph", repeats: int = 10) -> float:
    """Median microseconds of a replay of `graph` between two device events; the replays are queued."""
    graph.replay()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for before, after in pairs:
        before.record()
        graph.replay()
        after.record()
    torch.cuda.synchronize()
    return 1e3 * sorted(before.elapsed_time(after) for before, after in pairs)[repeats // 2]


def peak_memory_mb(call: Call, device: torch.device) -> tuple[float, float]:
    """MB (2**20) that a call allocates at its peak above what was there, and that it reserves from the driver.

    On CUDA by the caching allocator; on a CPU by the profiler's events, where nothing is reserved (NaN).
    """
    call(0)  # first-call workspaces stay allocated and are not the call's own
    synchronise(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        call(1)
        synchronise(device)
        peak = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return (peak[0] - before[0]) / 2**20, (peak[1] - before[1]) / 2**20
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profiler:
        call(1)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held, default=0) / 2**20, float("nan")


def known_duration_error(milliseconds: float = 5.0) -> float:
    """Relative error of `latency` for a call of known duration on the CPU."""
    calls, budget = {"": busy(milliseconds / 1e3)}, Budget(rounds=3, samples=20, seconds=0.5)
    samples = latency(calls, torch.device("cpu"), budget)
    return abs(samples["latency_ms"].min() / milliseconds - 1)  # other processes only make a call longer


def known_tensor_error(megabytes: float = 64.0) -> float:
    """Relative error of `peak_memory_mb` for a tensor of known size on the CPU."""
    size = int(megabytes * 2**20)
    allocated, _ = peak_memory_mb(lambda _: torch.empty(size, dtype=torch.uint8).fill_(1), torch.device("cpu"))
    return abs(allocated / megabytes - 1)
