"""Latency, throughput and memory of a callable. Level 1: knows nothing of models or variants.

A latency sample is one call from an idle device to a finished result: the clock stops only after the device is
done. Throughput is measured apart, over calls that are queued without waiting; it is never computed from a latency.
All candidates are measured in rounds, in an order that is shuffled anew each round, so that a drift of the machine
(clocks, neighbours) falls on all of them alike.
"""

import random
import time
from collections.abc import Callable, Hashable, Mapping
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


def warm_up(call: Call, device: torch.device, *, seconds: float, least: int = 3) -> int:
    """Call until two calls in a row differ by under 10 %, or `seconds` are over; returns the number of calls."""
    last, start, count = float("inf"), time.perf_counter(), 0
    while True:
        took = _timed(call, count, device)
        count += 1
        stable = abs(took - last) < 0.1 * last
        if count >= least and (stable or time.perf_counter() - start > seconds):
            return count
        last = took


def _timed(call: Call, number: int, device: torch.device) -> float:
    start = time.perf_counter()
    call(number)
    synchronise(device)
    return time.perf_counter() - start


def latency(calls: Mapping[Hashable, Call], device: torch.device, budget: Budget, seed: int = 0) -> pd.DataFrame:
    """Every sample as a row: candidate, round, sample, latency_ms (wall clock to the end of the device's work)."""
    order, shuffle, rows = list(calls), random.Random(seed), []
    for round_number in range(budget.rounds):
        shuffle.shuffle(order)
        for candidate in order:
            call = calls[candidate]
            warm_up(call, device, seconds=budget.seconds, least=3 if round_number == 0 else 1)
            deadline = time.perf_counter() + budget.seconds
            for sample in range(budget.samples):
                took = _timed(call, sample, device)
                rows.append((candidate, round_number, sample, took * 1e3))
                if time.perf_counter() > deadline:
                    break
    return pd.DataFrame(rows, columns=["candidate", "round", "sample", "latency_ms"])


def throughput(
    calls: Mapping[Hashable, Call], sizes: Mapping[Hashable, int], device: torch.device, budget: Budget, seed: int = 0
) -> pd.DataFrame:
    """Every round as a row: candidate, round, throughput_img_s, from calls queued back to back.

    `sizes` is the number of pictures of a call.
    """
    order, shuffle, rows = list(calls), random.Random(seed + 1), []
    for round_number in range(budget.rounds):
        shuffle.shuffle(order)
        for candidate in order:
            call = calls[candidate]
            once = _timed(call, 0, device)
            repeats = max(2, min(budget.samples, int(budget.seconds / max(once, 1e-6))))
            start = time.perf_counter()
            for number in range(repeats):
                call(number)
            synchronise(device)
            took = time.perf_counter() - start
            rows.append((candidate, round_number, repeats * sizes[candidate] / took))
    return pd.DataFrame(rows, columns=["candidate", "round", "throughput_img_s"])


def peak_memory_mb(call: Call, device: torch.device) -> float:
    """Megabytes (2**20) that one call allocates at its peak, above what was allocated before it.

    On a CUDA device from the caching allocator; on the CPU from the profiler's allocation events.
    """
    call(0)  # first-call workspaces stay allocated and are not the call's own
    synchronise(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call(1)
        synchronise(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call(1)
    held, peak = 0, 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20
