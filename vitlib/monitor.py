"""Clocks, temperature and throttling of the GPU while something runs. Level 0: no torch."""

import threading
from types import TracebackType
from typing import Any

import numpy as np

from vitlib import provenance

FIELDS = ("sm_clock_mhz", "memory_clock_mhz", "temperature_c", "power_w")


class Monitor:
    """Samples `provenance.gpu_state` every `seconds` in a thread, between entering and leaving a `with` block.

    Where there is no nvidia-smi it samples nothing and `summary` says why.
    """

    def __init__(self, seconds: float = 1.0) -> None:
        self.seconds, self.samples, self.reason = seconds, [], None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Monitor":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.is_set():
            states, self.reason = provenance.gpu_state()
            if states is None:
                return
            self.samples.append(states)
            self._stop.wait(self.seconds)

    def summary(self) -> dict[str, Any]:
        """Samples, least, median and largest value of each field over all cards, and every throttle reason seen."""
        rows = [state for states in self.samples for state in states]
        if not rows:
            return {"samples": 0, "reason": self.reason or "nothing was sampled"}
        found: dict[str, Any] = {"samples": len(self.samples)}
        for field in FIELDS:
            values = [row[field] for row in rows if row.get(field) is not None]
            if values:
                found[field] = {"min": min(values), "median": float(np.median(values)), "max": max(values)}
        found["throttle_reasons"] = sorted({reason for row in rows for reason in row.get("throttle_reasons") or []})
        return found
