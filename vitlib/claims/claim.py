"""The claims as data, and verdicts on them that are computed from a study's records. No torch."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, Field

from vitlib.claims.quantities import Figure, Measurement, Quantity, content
from vitlib.study.variants import label

HOLDS, HOLDS_ONLY, FAILS, UNTESTED = "holds", "holds only", "does not hold", "cannot be tested here"
VERDICTS = (HOLDS, HOLDS_ONLY, FAILS, UNTESTED)


class Claim(BaseModel, extra="forbid", frozen=True):
    """One claim: its quantity, and the original's figure, or one by case (`shown` is its own wording).

    "between" has two figures, and "about" a tolerance.
    """

    id: str = Field(pattern=r"^[a-z0-9-]+$")
    subject: str
    source: str = Field(pattern=r"^(README|slides|notebooks), .{3,}$")
    claim: str = Field(pattern=r"\.$")
    quantity: Quantity
    original: float | tuple[float, float] | dict[str, float]
    shown: str = Field(min_length=1)
    unit: str = ""
    criterion: Literal["about", "at least", "at most", "more than", "between"]
    tolerance: float = Field(0.0, ge=0, le=1)
    cause: str = ""

    def accepts(self, case: str = "") -> tuple[float, float]:
        """The range of figures with which the claim holds, bounds included. 'about' is a factor in either direction."""
        value = self.original[case] if isinstance(self.original, dict) else self.original
        if isinstance(value, tuple):
            return value
        about, more = 1 + self.tolerance, 1 + 1e-6
        bounds = {"about": (value / about, value * about), "at most": (-math.inf, value)}
        return (bounds | {"at least": (value, math.inf), "more than": (value * more, math.inf)})[self.criterion]

    @property
    def counts_as(self) -> str:
        """The condition for a measurement to support the claim, as text."""
        if self.criterion == "about":
            return f"within a factor of {1 + self.tolerance:g}"
        if isinstance(self.original, dict):
            return f"{self.criterion} that"
        bounds = " and ".join(number(bound) for bound in self.accepts() if math.isfinite(bound))
        return f"{self.criterion} {bounds} {self.unit}".strip()

    def judge(self, measured: Measurement) -> str:
        """The verdict, which begins with one of VERDICTS."""
        outcomes = {case: self._supported(case, figure) for case, figure in measured.items()}
        held, undecided = ([case for case, seen in outcomes.items() if seen is wanted] for wanted in (True, None))
        if len(held) == len(outcomes):
            return HOLDS
        if len(undecided) == len(outcomes):
            return f"{UNTESTED}: the 95 % interval includes the limit"
        rest = f"; undecided {_listed(undecided)}" if undecided else ""
        return f"{HOLDS_ONLY} {_listed(held)}{rest}" if held else f"{FAILS}{rest}"

    def text(self, measured: Measurement) -> str:
        """The figures in the order of their cases; named unless the original gives one for each, in the same order."""
        single, named = len(measured) == 1, not isinstance(self.original, dict)
        parts = []
        for case, figure in measured.items():
            words = [f"{label(case)}:"] if case and (single or named) else []
            words += [number(figure.value), self.unit if single else ""]
            if single and math.isfinite(figure.high - figure.low) and figure.low < figure.high:
                words.append(f"({number(figure.low)} … {number(figure.high)})")
            parts.append(" ".join(filter(None, [*words, f"({figure.note})" if figure.note else ""])))
        return ", ".join(parts) if single else f"{', '.join(parts)} {self.unit}".rstrip()

    def _supported(self, case: str, figure: Figure) -> bool | None:
        """Whether a figure's whole interval is in the accepted range; None where only a part of it is."""
        low, high = self.accepts(case)
        slack = 1e-9 * abs(figure.value)  # 1.1 × 50 is a little more than 55 in binary
        if low - slack <= figure.low and figure.high <= high + slack:
            return True
        return False if figure.high < low or figure.low > high else None


def load() -> dict[str, Claim]:
    """The claims of `claims.yaml` by id. ValueError with the faults of one."""
    return {entry["id"]: Claim(**entry) for entry in content()["claims"]}


def kind_of(verdict: str) -> str:
    """Which of VERDICTS a verdict begins with."""
    return max((kind for kind in VERDICTS if verdict.startswith(kind)), key=len)


def number(value: float) -> str:
    """Three significant digits, and all digits before the decimal point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _listed(cases: list[str]) -> str:
    """ "at batch 8 and 32", or "for NF4 · SDPA and block 3"."""
    batches = all(case.startswith("batch ") for case in cases)
    names = [case.removeprefix("batch ") if batches else label(case) for case in cases]
    joined = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{'at batch' if batches else 'for'} {joined}"
