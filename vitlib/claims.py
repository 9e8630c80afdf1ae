"""The original study's claims, what this study measured on the same quantities, and verdicts. Level 3.

`claims.yaml` holds the claims as data: figures, what each is about, and what would bear it out. A claim's quantity
has a kind, and each kind has one lookup here; no line of this module knows a single claim. Verdicts are computed:

- "holds", "does not hold", or "holds only at batch …" where it depends on the number of pictures in a call; batches at
  which intervals overlap are named as not to be told;
- "cannot be tested here: why" where the study lacks what the claim is about (its network, a GPU, the same card for
  milliseconds, the same weights for accuracies), or its pictures are too few to decide.

This module loads no torch: it reads records. `vitlib/mismatch.py` rebuilds the original's preprocessing mistake.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from vitlib import files, records, stats
from vitlib.variants import find

SOURCE = Path(__file__).with_name("claims.yaml")
ABLATION = Path(__file__).with_name("claims_ablation.csv")

HOLDS, HOLDS_ONLY, FAILS, UNTESTED = "holds", "holds only", "does not hold", "cannot be tested here"
VERDICTS = (HOLDS, HOLDS_ONLY, FAILS, UNTESTED)

PERCENT = {"top1", "top5", "f1_weighted"}  # fractions in the records, percentages in the claims
KNOWING = 0.5  # Top-1 of the baseline below which there is little that quantization could lose


# ---------------------------------------------------------------------------------------------- the data file


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Source(_Strict):
    """Where the original says it."""

    document: Literal["README", "slides", "ablation", "notebooks"]
    section: str = Field(min_length=3)

    def __str__(self) -> str:
        return f"original {self.document}, {self.section}"


class Quantity(_Strict):
    """What is looked up: a kind (see LOOKUPS) and what that kind needs (see _FIELDS)."""

    kind: str
    column: str = ""
    variant: str = ""
    baseline: str = ""
    batch: int = 0  # 0: every batch size that was measured
    card: str = ""
    among: list[str] = []
    columns: list[str] = []
    bits: int = 0
    kept: str | list[str] = ""
    blocks: list[int] = []  # first and last of a range
    count: int = 0
    how: str = ""
    layers: str = ""
    change: str = ""
    of: str = ""
    to: str = ""

    @model_validator(mode="after")
    def _complete(self) -> Quantity:
        if self.kind not in LOOKUPS:
            raise ValueError(f"unknown kind {self.kind!r}; known: {', '.join(LOOKUPS)}")
        missing = [name for name in _FIELDS[self.kind] if not getattr(self, name)]
        if missing:
            raise ValueError(f"a quantity of kind {self.kind!r} needs {', '.join(missing)}")
        for name in (self.variant, self.baseline, *self.among):
            if name:
                find(name)
        return self


class Claim(_Strict):
    """One claim: the original's figure (`original`, or `shown` where it said it in other words) and its quantity."""

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    subject: str
    source: Source
    claim: str
    quantity: Quantity
    original: float | int | str | list[float | int]
    shown: str | float = ""
    unit: str = ""
    criterion: Literal["about", "within factor", "at least", "at most", "between", "equals"]
    tolerance: float = Field(0.0, ge=0, lt=1)
    cause: str = ""

    @model_validator(mode="after")
    def _fits(self) -> Claim:
        wanted = {"between": list, "equals": str}.get(self.criterion, (float, int))
        if not isinstance(self.original, wanted):
            raise ValueError(f"{self.id}: {self.original!r} is no original value for {self.criterion!r}")
        if isinstance(self.original, list) and (len(self.original) != 2 or self.original[0] > self.original[1]):
            raise ValueError(f"{self.id}: 'between' needs a lower and an upper value")
        if self.criterion == "within factor" and not (self.original > 0 and self.tolerance > 0):
            raise ValueError(f"{self.id}: 'within factor' needs a positive ratio and a tolerance")
        return self

    @property
    def said(self) -> str:
        """The original's figure as text."""
        value = self.shown if self.shown != "" else self.original
        if isinstance(value, list):
            return f"{' to '.join(number(part) for part in value)} {self.unit}".strip()
        return value if isinstance(value, str) else f"{number(value)} {self.unit}".strip()

    def accepts(self) -> tuple[float, float]:
        """The range of measurements that bear the claim out, bounds included."""
        low, high = self.original if isinstance(self.original, list) else (self.original, self.original)
        if self.criterion == "within factor":
            return low / (1 + self.tolerance), high * (1 + self.tolerance)
        low, high = low - self.tolerance * abs(low), high + self.tolerance * abs(high)
        return (-math.inf if self.criterion == "at most" else low), (math.inf if self.criterion == "at least" else high)

    @property
    def counts_as(self) -> str:
        """What a measurement must be for the claim to hold, as text."""
        if self.criterion == "equals":
            return "no variant is better" if self.quantity.kind == "undominated" else f"exactly {self.original}"
        if self.criterion == "within factor":
            return f"within a factor {1 + self.tolerance:g}"
        if self.criterion == "about" and self.unit not in ("%", "points"):
            return f"±{100 * self.tolerance:g} %" if self.tolerance else "exactly"
        low, high = (number(round(bound, 9)) if math.isfinite(bound) else "" for bound in self.accepts())
        span = {"at least": f"≥ {low}", "at most": f"≤ {high}"}.get(self.criterion, f"{low} … {high}")
        return f"{span} {self.unit}".strip()


@cache
def _content(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def load(path: Path = SOURCE) -> list[Claim]:
    """Every claim, those of the tables (a cell each) first. ValueError with the faults; ids are unique."""
    content = _content(path)
    cells = [cell for table in content["tables"] for cell in _cells(table)]
    claims = [Claim(**entry) for entry in (*cells, *content["claims"])]
    ids = [claim.id for claim in claims]
    if twice := sorted({name for name in ids if ids.count(name) > 1}):
        raise ValueError(f"{path.name}: ids occur twice: {', '.join(twice)}")
    unknown = {name for c in claims for name in (c.quantity.of, c.quantity.to) if name} - set(ids)
    if unknown:
        raise ValueError(f"{path.name}: no claim is called {', '.join(sorted(unknown))}")
    return claims


def _cells(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The cells of one benchmark table as claims; columns marked `relative` once more as ratios to the baseline."""
    found = []
    for variant, row in table["rows"].items():
        for column, value in row.items():
            about = table["columns"][column]
            quantity = {"column": column, "variant": variant, "batch": table["batch"]}
            common = {"source": table["source"], "subject": table["subject"], "criterion": "about"}
            common["cause"] = about.get("cause", "")
            found.append(
                {
                    **common,
                    "id": f"{table['id']}-{variant}-{column}",
                    "claim": f"{spoken(variant)}: {about['phrase']} {number(value)} {about['unit']}.",
                    "quantity": {**quantity, "kind": "value", "card": table["card"]},
                    "original": value,
                    "unit": about["unit"],
                    "tolerance": about["tolerance"],
                }
            )
            if about.get("relative") and variant != table["baseline"]:
                found.append(_relative(table, common, quantity, value))
    return found


def _relative(table: Mapping[str, Any], common: dict, quantity: dict, value: float) -> dict[str, Any]:
    """The cell as a ratio to the same column's baseline cell: what other hardware can test."""
    variant, column, baseline = quantity["variant"], quantity["column"], table["baseline"]
    ratio = value / table["rows"][baseline][column]
    what = {"latency_p50_ms": "median latency", "throughput_img_s": "throughput", "device_time_us": "kernel time"}[
        column
    ]
    return {
        **common,
        "subject": f"{table['subject']}, as ratios",
        "id": f"{table['id']}-{variant}-{column}-relative",
        "claim": f"{spoken(variant)}: its {what} is {ratio:.2f} times the baseline's, at batch {table['batch']}.",
        "quantity": {**quantity, "kind": "times", "baseline": baseline},
        "original": round(ratio, 4),
        "unit": "times",
        "criterion": "within factor",
        "tolerance": 0.25,
    }


def spoken(variant: str) -> str:
    """A variant in words."""
    row = find(variant)
    weights = {"nf4": "4-bit weights", "int8": "8-bit weights"}.get(
        row.weights, f"{row.weights} weights" if row.quantized else f"{row.weights} baseline"
    )
    kernel = {"sdpa": "SDPA", "flash_attention_2": "FlashAttention-2"}.get(row.attention, row.attention)
    return f"{weights} with {kernel}" if row.quantized else weights


def number(value: float) -> str:
    """Four significant digits (one decimal from 1,000 on), whole numbers whole."""
    if isinstance(value, int) or (math.isfinite(value) and value == int(value)):
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.1e}"


# -------------------------------------------------------------------------------------------- what was measured


class Missing(LookupError):
    """The study has no measurement of a quantity; the message says why."""


@dataclass(frozen=True)
class Either:
    """Names of which the measurements do not tell the right one: the intervals of their values overlap."""

    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{' or '.join(self.names)}: intervals overlap"


@dataclass(frozen=True)
class Measurement:
    """What a study found: a value or an interval (low, estimate, high) by batch size (0: not a matter of batches).

    `obstacle` says why it is no test of the claim; `least` is a bound that no honest figure can fall below. `words` are
    those for a percentage above and below 0, ("faster", "slower"), where its sign says that.
    """

    values: dict[int, Any] = field(default_factory=dict)
    obstacle: str = ""
    least: float = -math.inf
    words: tuple[str, str] | None = None

    def text(self, unit: str = "") -> str:
        """The values as text, in the order of their batch sizes; those with the same text stand together."""
        if list(self.values) == [0] and isinstance(self.values[0], tuple):
            low, estimate, high = (number(part) for part in self.values[0])
            return f"{estimate} {unit} ({low} … {high})"
        if self.words and any(value < 0 for value in self.values.values()):
            shown = ", ".join(f"{number(abs(v))} {unit} {self.words[v < 0]}" for v in self.values.values())
            return shown if list(self.values) == [0] else f"{shown} (batch {_listed(list(self.values))})"
        if list(self.values) == [0]:
            unit = "" if isinstance(self.values[0], str | Either) else unit
            return f"{_text(self.values[0])} {unit}".strip()
        if not any(isinstance(value, str | Either) for value in self.values.values()):
            shown = ", ".join(_text(value) for value in self.values.values())
            return f"{shown} {unit} (batch {_listed(list(self.values))})" if shown else "–"
        together: dict[str, list[int]] = {}
        for batch, value in self.values.items():
            together.setdefault(_text(value), []).append(batch)
        return "; ".join(f"{shown} (batch {_listed(batches)})" for shown, batches in together.items())


def _text(value: float | str | Either) -> str:
    return str(value) if isinstance(value, str | Either) else number(value)


class Study:
    """The records of one study, read when first asked for."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def _table(self, name: str) -> pd.DataFrame:
        try:
            return records.read_table(self.folder / "records" / f"{name}.csv")
        except records.MissingRecord as error:
            raise Missing(str(error)) from None

    @cached_property
    def variants(self) -> pd.DataFrame:
        """`records/variants.csv`."""
        return self._table("variants")

    @cached_property
    def ablation(self) -> pd.DataFrame:
        """`records/ablation.csv`."""
        return self._table("ablation")

    @cached_property
    def finetune(self) -> pd.DataFrame:
        """`records/finetune.csv`."""
        return self._table("finetune")

    @cached_property
    def environment(self) -> dict[str, Any]:
        """`records/environment.json`."""
        return self._json(self.folder / "records" / "environment.json")

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration of the merged checkpoint."""
        return self._json(self.folder / "checkpoints" / "merged" / "config.json")

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """How the merged checkpoint came about."""
        return self._json(self.folder / "checkpoints" / "merged" / "provenance.json")

    @cached_property
    def base(self) -> str:
        """What the network was before fine-tuning, without a folder of this machine."""
        base = str(self.provenance.get("origin", {}).get("base", "unknown"))
        return Path(base).name if base.startswith((".", "/", "~")) else base

    @cached_property
    def logits(self) -> dict[str, np.ndarray]:
        """Outputs of every variant on the validation pictures, with their `labels`; empty where none were kept."""
        with suppress(FileNotFoundError), np.load(self.folder / "records" / "logits.npz") as archive:
            return dict(archive)
        return {}

    @property
    def gpu(self) -> str:
        """Name of the card that the records come from; empty where the CPU did the work."""
        cards = self.environment["hardware"].get("gpus") or []
        return cards[0]["name"] if cards and self.environment["parameters"].get("device") != "cpu" else ""

    @staticmethod
    def _json(path: Path) -> dict[str, Any]:
        try:
            return records.read_json(path)
        except records.MissingRecord as error:
            raise Missing(str(error)) from None

    def rows(self, variant: str, batch: int = 0) -> pd.DataFrame:
        """Rows of a variant that ran, by batch size. Missing with the reason of one that did not."""
        rows = self.variants[self.variants["variant"] == variant]
        if rows.empty:
            raise Missing(f"{variant} is not among the study's variants")
        if rows["status"].iloc[0] != "ok":
            raise Missing(f"{variant} did not run: {rows['reason'].iloc[0]}")
        if batch and batch not in set(rows["batch"]):
            raise Missing(f"no call of {batch} pictures was measured")
        return rows[rows["batch"] == batch] if batch else rows

    def column(self, variant: str, name: str, batch: int = 0) -> dict[int, float]:
        """A column of a variant by batch size, one value under 0 where it is the same for all of them."""
        profiled = name in _PROFILED  # one pass of its own batch size, repeated in every row
        rows = self.rows(variant, 0 if profiled else batch).dropna(subset=[name])
        if rows.empty:
            raise Missing(f"{name} was not measured for {variant}")
        batches = rows["profiled_batch" if profiled else "batch"].astype(int)
        if profiled and batch and batches.iloc[0] != batch:
            raise Missing(f"kernels were profiled with {batches.iloc[0]} pictures a call, the claim is about {batch}")
        scale = 100 if name in PERCENT else 1
        values = {size: float(scale * value) for size, value in zip(batches, rows[name], strict=True)}
        return {0: next(iter(values.values()))} if name in _WITHOUT_BATCH else values

    def intervals(self, variant: str, name: str) -> dict[int, stats.Interval]:
        """The same with the bounds of the record: a value without any is its own, an unknown one is infinite."""
        values, bounds = self.column(variant, name), _BOUNDS.get(name, ())
        if not bounds or not set(bounds) <= set(self.variants.columns):
            return {batch: stats.Interval(value, value, value) for batch, value in values.items()}
        rows = self.rows(variant).drop_duplicates("batch").set_index("batch")
        found = {}
        for batch, value in values.items():
            low, high = rows.loc[batch or rows.index[0], list(bounds)].astype(float)
            found[batch] = stats.Interval(
                value, -math.inf if math.isnan(low) else low, math.inf if math.isnan(high) else high
            )
        return found


_BOUNDS = {
    "latency_p50_ms": ("latency_low_ms", "latency_high_ms"),
    "logit_kl": ("logit_kl_low", "logit_kl_high"),
}
"""Columns with the 95 % interval of another."""

_WITHOUT_BATCH = PERCENT | {
    *("model_mb", "disk_mb", "cpu_latency_ms", "agreement_with_baseline", "logit_kl"),
}
_PROFILED = {"device_time_us", "attention_device_time_us"}

CHANGES: dict[str, Callable[[float, float], float]] = {
    "times": lambda value, base: value / base,
    "times_less": lambda value, base: base / value,
    "percent_less": lambda value, base: 100 * (1 - value / base),
    "percent_more": lambda value, base: 100 * (value / base - 1),
    "points": lambda value, base: value - base,
    "not_inverse": lambda value, base: 100 * abs(value * base / 1000 - 1),
}
"""Comparisons of a value with its baseline."""


def _value(quantity: Quantity, study: Study, claims: dict[str, Claim]) -> dict[int, Any]:
    """A column of `variants.csv`; Top-1 and Top-5 with their Wilson interval."""
    values = study.column(quantity.variant, quantity.column, quantity.batch)
    k = {"top1": 1, "top5": 5}.get(quantity.column)
    if k and quantity.variant in study.logits:
        right = stats.topk_right(study.logits[quantity.variant], study.logits["labels"], k)
        low, high = stats.wilson(int(right.sum()), len(right))
        return {0: (100 * low, 100 * float(right.mean()), 100 * high)}
    return values


def _change(quantity: Quantity, study: Study, claims: dict[str, Claim]) -> dict[int, float]:
    """A column against the same of the baseline, by batch size."""
    values = study.column(quantity.variant, quantity.column, quantity.batch)
    base = study.column(quantity.baseline, quantity.column, quantity.batch)
    return {batch: CHANGES[quantity.kind](values[batch], base[batch]) for batch in values if base.get(batch)}


def _points(quantity: Quantity, study: Study, claims: dict[str, Claim]) -> dict[int, Any]:
    """Difference of Top-1 in points with its paired interval, where the outputs were kept."""
    values, base = (study.column(name, quantity.column)[0] for name in (quantity.variant, quantity.baseline))
    if not {quantity.variant, quantity.baseline} <= set(study.logits):
        return {0: values - base}
    labels = study.logits["labels"]
    before, after = (stats.topk_right(study.logits[n], labels) for n in (quantity.baseline, quantity.variant))
    found = stats.paired_difference(before, after)
    return {0: (100 * found.low, 100 * found.estimate, 100 * found.high)}


def _compared(value: stats.Interval, other: stats.Interval) -> str:
    """Where lower is better: "better" or "worse" where the intervals lie apart, "same", or "unclear"."""
    if value == other:
        return "same"
    return "better" if value.high < other.low else "worse" if value.low > other.high else "unclear"


def _best(quantity: Quantity, study: Study, claims: dict[str, Claim]) -> dict[int, str | Either]:
    """By batch size, the variant with the lowest value of a column; all whose intervals reach down to its own."""
    by_variant = {name: study.intervals(name, quantity.column) for name in quantity.among}
    batches, found = set.intersection(*(set(values) for values in by_variant.values())), {}
    for batch in sorted(batches):
        at = {name: values[batch] for name, values in by_variant.items()}
        lowest = min(at, key=lambda name, at=at: at[name].estimate)
        level = tuple(name for name in at if name == lowest or _compared(at[name], at[lowest]) != "worse")
        found[batch] = lowest if len(level) == 1 else Either(level)
    return found


def _undominated(quantity: Quantity, study: Study, claims: dict[str, Claim]) -> dict[int, str | Either]:
    """By batch size, the variants that are as good in every column (lower is better) and better in one; or none.

    Either where there is none that surely is, and some that may be, as intervals overlap.
    """
    study.rows(quantity.variant)  # Missing with the reason where it did not run
    ran = study.variants[study.variants["status"] == "ok"].dropna(subset=quantity.columns)
    names = list(dict.fromkeys(ran["variant"]))
    measured_ = {name: [study.intervals(name, column) for column in quantity.columns] for name in names}
    found = {}
    for batch, rows in ran.groupby("batch"):
        at = {n: [values.get(int(batch), values.get(0)) for values in measured_[n]] for n in rows["variant"]}
        own = at.pop(quantity.variant)
        signs = {name: {_compared(*pair) for pair in zip(values, own, strict=True)} for name, values in at.items()}
        surely = [name for name, seen in signs.items() if "better" in seen and seen <= {"better", "same"}]
        perhaps = [name for name, seen in signs.items() if "unclear" in seen and "worse" not in seen]
        found[int(batch)] = ", ".join(surely) or (Either(("none", *perhaps)) if perhaps else "none")
    return found


def _finetune(quantity: Quantity, study: Study, claims: dict[str, Claim]) -> dict[int, float]:
    column = study.finetune[quantity.column]
    value = column.median() if quantity.how == "median" else column.iloc[-1]
    return {0: float(value * (100 if quantity.column in PERCENT else 1))}


def _adapters(quantity: Quantity, study: Study, claims: dict[str, Claim]) -> dict[int, float]:
    """Parameters of LoRA with this study's rank on the linear layers of its network."""
    width, mlp = study.config["hidden_size"], study.config["intermediate_size"]
    ends = 4 * (width + width) + (2 * (width + mlp) if quantity.layers == "all" else 0)
    rank = study.provenance["parameters"]["lora_rank"]
    return {0: float(study.config["num_hidden_layers"] * rank * ends)}


def _ablated(quantity: Quantity, study: Study) -> pd.DataFrame:
    """The rows of `ablation.csv` with these bits, by what is kept."""
    rows = study.ablation[study.ablation["bits"] == quantity.bits].set_index("kept")
    if rows.empty:
        raise Missing(f"{quantity.bits} bits were not ablated")
    return rows


def _kept_rows(quantity: Quantity, study: Study) -> pd.DataFrame:
    """Those of them that a quantity names, singly or as a range of blocks."""
    rows = _ablated(quantity, study)
    names = [quantity.kept] if isinstance(quantity.kept, str) else quantity.kept
    if quantity.blocks:
        names = [f"block {block}" for block in range(quantity.blocks[0], quantity.blocks[1] + 1)]
    absent = [name for name in names if name not in rows.index]
    if absent:
        raise Missing(f"the network has no {absent[0]}")
    return rows.loc[names]


def _kept(quantity: Quantity, study: Study, claims: dict[str, Claim]) -> dict[int, float]:
    return {0: float(100 * _kept_rows(quantity, study)[quantity.column].iloc[0])}


def _kept_p(quantity: Quantity, study: Study, claims: dict[str, Claim]) -> dict[int, float]:
    """The smallest Holm-adjusted p of the rows that gained accuracy against keeping nothing; 1 where none did."""
    rows = _kept_rows(quantity, study)
    gained = rows[rows["top1"] > _ablated(quantity, study).loc["none", "top1"]]
    return {0: float(gained["holm_p"].min()) if len(gained) else 1.0}


def _kl_alone(quantity: Quantity, study: Study) -> pd.Series:
    """By block, the KL that comes when it alone is quantized.

    Not the KL that goes away when it alone is kept: there the errors of all others remain and may cancel, and other
    pictures may rank the blocks otherwise (`records/reliability.csv` has both correlations).
    """
    rows = _ablated(quantity, study)
    alone = rows.loc[rows.index.str.fullmatch(r"all but block \d+"), "logit_kl"]
    if alone.empty:
        raise Missing("no block was quantized alone")
    return alone.rename(lambda name: name.removeprefix("all but "))


def _kl_share(quantity: Quantity, study: Study, claims: dict[str, Claim]) -> dict[int, float]:
    """The smallest KL of the named blocks, each quantized alone, against that of a block on average."""
    names, alone = _kept_rows(quantity, study).index, _kl_alone(quantity, study)
    return {0: float(alone[names].min() / alone.mean())}


def _most_sensitive(quantity: Quantity, study: Study, claims: dict[str, Claim]) -> dict[int, str]:
    """The blocks whose quantization alone changes the outputs most."""
    blocks = _kl_alone(quantity, study).nlargest(quantity.count)
    return {0: ", ".join(str(block) for block in sorted(int(name.split()[1]) for name in blocks.index))}


def _own(quantity: Quantity, study: Study, claims: dict[str, Claim]) -> dict[int, float]:
    """Two figures of the original, compared."""
    value, base = (claims[name].original for name in (quantity.of, quantity.to))
    value, base = (part[0] if isinstance(part, list) else part for part in (value, base))
    return {0: float(CHANGES[quantity.change](value, base))}


def own(name: str) -> float:
    """The figure of the claim called `name`, which compares two of the original's own."""
    claims = {claim.id: claim for claim in load()}
    return _own(claims[name].quantity, Study(""), claims)[0]


def _own_kept_p(quantity: Quantity, study: Study, claims: dict[str, Claim]) -> dict[int, float]:
    rows = reanalysis().set_index(["bits", "kept"])
    return {0: float(rows.loc[(quantity.bits, quantity.kept), "least_holm_p"])}


LOOKUPS: dict[str, Callable[[Quantity, Study, dict[str, Claim]], dict[int, Any]]] = {
    "value": _value,
    **dict.fromkeys(("times", "times_less", "percent_less", "percent_more"), _change),
    "points": _points,
    "best": _best,
    "undominated": _undominated,
    "finetune": _finetune,
    "adapters": _adapters,
    "kept": _kept,
    "kept_p": _kept_p,
    "kl_share": _kl_share,
    "most_sensitive": _most_sensitive,
    "own": _own,
    "own_kept_p": _own_kept_p,
}
"""How each kind of quantity is read from the records."""

_FIELDS: dict[str, tuple[str, ...]] = {
    "value": ("column", "variant"),
    **dict.fromkeys(
        ("times", "times_less", "percent_less", "percent_more", "points"), ("column", "variant", "baseline")
    ),
    "best": ("column", "among"),
    "undominated": ("columns", "variant"),
    "finetune": ("column", "how"),
    "adapters": ("layers",),
    "kept": ("column", "bits", "kept"),
    "kept_p": ("bits",),
    "kl_share": ("bits", "kept"),
    "most_sensitive": ("bits", "count"),
    "own": ("change", "of", "to"),
    "own_kept_p": ("bits", "kept"),
}


# ------------------------------------------------------------------------------------------ may it be compared?

_TIMED = dict.fromkeys(
    (
        *("latency_mean_ms", "latency_p50_ms", "latency_p95_ms", "latency_p99_ms", "throughput_img_s"),
        *("device_time_us", "attention_device_time_us", "epoch_s"),
    ),
    ("network", "gpu", "card"),
)
_NEEDS: dict[str, tuple[str, ...]] = {
    **_TIMED,
    **dict.fromkeys(PERCENT, ("network", "weights", "pictures")),
    "model_mb": ("network",),
    "peak_vram_mb": ("network", "gpu"),
    "cpu_latency_ms": ("network", "host"),
    "logit_kl": ("network", "trained"),
}
"""What a column of the original can only be compared with; a ratio or a difference needs less (see `_needs`)."""


def _needs(quantity: Quantity) -> list[str]:
    if quantity.kind in ("own", "own_kept_p"):
        return []
    if quantity.kind in ("kept_p", "kl_share", "most_sensitive"):
        return ["network", "trained"]
    needs = {need: None for name in (quantity.column, *quantity.columns) for need in _NEEDS.get(name, ("network",))}
    if quantity.kind in ("value", "finetune", "kept", "adapters"):
        return list(needs)
    # The card, the host and the weights cancel in a comparison; only a network that knows something can lose it.
    cancelled = {"card": "", "host": "", "pictures": "", "weights": "trained"}
    return [kept for need in needs if (kept := cancelled.get(need, need))]


def _no_network(quantity: Quantity, study: Study) -> str:
    wanted, config = _constants()["network"], study.config
    names = {"blocks": "num_hidden_layers", "width": "hidden_size", "mlp": "intermediate_size"}
    names |= {"patch": "patch_size", "side": "image_size"}
    other = [f"{key} {config[name]}, not {wanted[key]}" for key, name in names.items() if config[name] != wanted[key]]
    return f"not the original's ViT-L/16 ({'; '.join(other[:2])})" if other else ""


def _no_gpu(quantity: Quantity, study: Study) -> str:
    return "" if study.gpu else "the claim is about a GPU, and none took part"


def _no_card(quantity: Quantity, study: Study) -> str:
    if not quantity.card:
        return "the original does not name its card"
    # A longer name that begins alike is another card: T4 is not T400.
    same = re.search(rf"\b{re.escape(quantity.card)}(?![A-Za-z0-9])", study.gpu)
    return "" if same else f"times of {quantity.card} and {study.gpu} do not compare, only ratios do"


def _no_host(quantity: Quantity, study: Study) -> str:
    return "the original does not name its CPU"


def _no_weights(quantity: Quantity, study: Study) -> str:
    wanted = _constants()["base"]
    return (
        "" if study.base == wanted else f"the network was fine-tuned from {study.base!r}, the original's from {wanted}"
    )


def _no_pictures(quantity: Quantity, study: Study) -> str:
    wanted = _constants()["network"]
    found = {"valid": len(study.logits.get("labels", ())), "classes": len(study.config["id2label"])}
    if all(wanted[key] == count for key, count in found.items()):
        return ""
    return "other pictures: {valid} of {classes} classes".format(**found)


def _untrained(quantity: Quantity, study: Study) -> str:
    ran = study.variants[study.variants["status"] == "ok"]
    top1 = float(ran["top1"].iloc[0]) if len(ran) else math.nan
    return "" if top1 >= KNOWING else f"the baseline is right on {100 * top1:.0f} % only: it has little to lose"


_OBSTACLES: dict[str, Callable[[Quantity, Study], str]] = {
    "network": _no_network,
    "gpu": _no_gpu,
    "card": _no_card,
    "host": _no_host,
    "weights": _no_weights,
    "pictures": _no_pictures,
    "trained": _untrained,
}


def _constants() -> dict[str, Any]:
    """Network, base and cards of the original study."""
    return {key: _content(SOURCE)[key] for key in ("network", "base", "cards")}


def least_time_us(column: str, weights: str, card: str) -> float:
    """Microseconds that the arithmetic of one picture takes at the card's highest rate; -inf where it is not known.

    No pass is shorter. Multiply-adds count twice: 4 width² + 2 width mlp a token and block, tokens² width twice for
    attention, and the patch embedding.
    """
    net, rates = _constants()["network"], _constants()["cards"].get(card)
    if rates is None or column not in ("device_time_us", "attention_device_time_us"):
        return -math.inf
    patches = (net["side"] // net["patch"]) ** 2
    attention = net["blocks"] * 4 * (patches + 1) ** 2 * net["width"]
    linears = net["blocks"] * 2 * (patches + 1) * (4 * net["width"] ** 2 + 2 * net["width"] * net["mlp"])
    linears += 2 * patches * 3 * net["patch"] ** 2 * net["width"]
    # Attention itself is never 8-bit: at the rate of 16-bit products (fp32 at its own).
    seconds = attention / rates["fp32" if weights == "fp32" else "nf4"]
    if column == "device_time_us":
        seconds += linears / rates[weights]
    return seconds * 1e-12 * 1e6


def measured(claim: Claim, study: Study | Path, claims: Mapping[str, Claim] | None = None) -> Measurement:
    """What the study found on the claim's quantity, and what keeps it from being a test of the claim.

    `claims` are those that it may refer to, by id; all of `load` unless given.
    """
    study = study if isinstance(study, Study) else Study(study)
    quantity = claim.quantity
    known = dict(claims) if claims is not None else {other.id: other for other in load()}
    weights = find(quantity.variant).weights if quantity.variant else ""
    least = least_time_us(quantity.column, weights, quantity.card)
    obstacle, values = "", {}
    try:
        obstacle = next((why for need in _needs(quantity) if (why := _OBSTACLES[need](quantity, study))), "")
        values = LOOKUPS[quantity.kind](quantity, study, known)
    except Missing as why:
        obstacle = obstacle or str(why)
    if not values:
        obstacle = obstacle or "nothing was measured"
    return Measurement(values, obstacle, least, _words(quantity, known))


def _words(quantity: Quantity, claims: Mapping[str, Claim]) -> tuple[str, str] | None:
    """What a positive and a negative percentage mean; None for what is no percentage of a change."""
    change = quantity.change or quantity.kind
    if change not in ("percent_less", "percent_more"):
        return None
    column = quantity.column or claims[quantity.of].quantity.column
    less, more = ("faster", "slower") if column.startswith("latency") else ("less", "more")
    return (less, more) if change == "percent_less" else (more, less)


# ------------------------------------------------------------------------------------------------------ verdicts


def judge(claim: Claim, measurement: Measurement) -> str:
    """The verdict, computed; it begins with one of VERDICTS."""
    if isinstance(claim.original, (int, float)) and claim.original < measurement.least:
        return f"{FAILS}: the arithmetic alone takes {number(round(measurement.least, 1))} {claim.unit} on that card"
    if measurement.obstacle:
        return f"{UNTESTED}: {measurement.obstacle}"
    outcomes = {batch: _borne_out(claim, value) for batch, value in measurement.values.items()}
    held, open_ = ([b for b, outcome in outcomes.items() if outcome is wanted] for wanted in (True, None))
    if len(held) == len(outcomes):
        return HOLDS
    if len(open_) == len(outcomes):
        noisy = any(isinstance(value, Either) for value in measurement.values.values())
        why = (
            "too noisy, 95 % intervals overlap"
            if noisy
            else (f"too few pictures, the 95 % interval neither meets nor misses {claim.said}")
        )
        return f"{UNTESTED}: {why}"
    rest = f"; cannot be told at batch {_listed(open_)}" if open_ else ""
    return f"{HOLDS_ONLY} at batch {_listed(held)}{rest}" if held else f"{FAILS}{rest}"


def _borne_out(claim: Claim, value: Any) -> bool | None:
    """Whether a value, or a whole interval, lies in the accepted range; None where an interval reaches across."""
    if isinstance(value, Either):
        return None if claim.original in value.names else False
    if claim.criterion == "equals":
        return value == claim.original
    accepted_low, accepted_high = claim.accepts()
    low, _, high = value if isinstance(value, tuple) else (value, value, value)
    slack = 1e-9 * max(abs(low), abs(high))  # 1.1 × 50 is a little more than 55 in binary
    if accepted_low - slack <= low and high <= accepted_high + slack:
        return True
    return False if high < accepted_low or low > accepted_high else None


def kind_of(verdict: str) -> str:
    """Which of VERDICTS a verdict begins with."""
    return max((kind for kind in VERDICTS if verdict.startswith(kind)), key=len)


def _listed(numbers: list[int]) -> str:
    texts = [str(entry) for entry in numbers]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def table(study: str | Path) -> pd.DataFrame:
    """A row a claim: what was said, what was measured, the verdict; written to `records/claims.csv`.

    `study` is a study's name, or its folder.
    """
    folder = study if isinstance(study, Path) else files.study_folder(study)
    claims, found, rows = {claim.id: claim for claim in load()}, Study(folder), []
    for claim in claims.values():
        measurement = measured(claim, found, claims)
        verdict = judge(claim, measurement)
        rows.append(
            {
                "id": claim.id,
                "subject": claim.subject,
                "claim": claim.claim,
                "source": str(claim.source),
                "original": claim.said,
                "counts_as": claim.counts_as,
                "measured": measurement.text(claim.unit),
                "verdict": verdict,
                "cause": "" if verdict == HOLDS else claim.cause,
            }
        )
    frame = pd.DataFrame(rows)
    records.write_table(frame, folder / "records" / "claims.csv")
    return frame


def counts(frame: pd.DataFrame) -> pd.DataFrame:
    """How many claims of each subject got each verdict, with totals."""
    kinds = frame["verdict"].map(kind_of)
    crossed = pd.crosstab(frame["subject"], kinds).reindex(columns=list(VERDICTS), fill_value=0)
    crossed = crossed.reindex(list(dict.fromkeys(frame["subject"])))
    crossed.loc["all"] = crossed.sum()
    return crossed.rename_axis(index=None, columns=None)


def headline(frame: pd.DataFrame) -> str:
    """What the table says, in a few sentences (Markdown)."""
    kinds = frame["verdict"].map(kind_of)
    number_of = kinds.value_counts().reindex(list(VERDICTS), fill_value=0)
    own = frame["subject"] == "own figures"
    lines = [
        f"- Of {len(frame)} claims, **{number_of[HOLDS]} hold**, {number_of[HOLDS_ONLY]} hold only at some batch "
        f"sizes, **{number_of[FAILS]} do not hold**, and {number_of[UNTESTED]} cannot be tested by this study.",
        f"- Of the {own.sum()} that only compare the original's own figures with each other, "
        f"{(own & (kinds == FAILS)).sum()} do not hold.",
    ]
    if number_of[UNTESTED]:
        reasons = frame.loc[kinds == UNTESTED, "verdict"].str.removeprefix(f"{UNTESTED}: ").value_counts()
        lines.append(f"- The most frequent reason for no test ({reasons.iloc[0]} times): {reasons.index[0]}.")
    return "\n".join(lines)


_COLOURS = {HOLDS: "#1c7c4a", HOLDS_ONLY: "#8a6100", FAILS: "#b3261e", UNTESTED: "#5b6475"}
_MARKS = {HOLDS: "✓", HOLDS_ONLY: "(✓)", FAILS: "✗", UNTESTED: "·"}


def readable(frame: pd.DataFrame, *subjects: str) -> pd.io.formats.style.Styler:
    """The claims of some subjects for a report: the source under the sentence, wide columns, the verdict coloured."""
    chosen = frame[frame["subject"].isin(subjects)] if subjects else frame
    columns = ["claim", "original", "measured", "verdict", "cause"]
    shown = chosen[columns].fillna("").reset_index(drop=True)
    escaped = chosen.fillna("").map(lambda value: html.escape(str(value)))
    shown["claim"] = (escaped["claim"] + "<br><em>" + escaped["source"] + "</em>").to_numpy()
    shown["original"] = (escaped["original"] + "<br><em>holds if " + escaped["counts_as"] + "</em>").to_numpy()
    if not shown["cause"].any():
        shown = shown.drop(columns="cause")
    styled = shown.style.hide(axis="index").format(escape="html", subset=list(shown.columns[2:]))
    styled = styled.map(lambda text: f"color: {_COLOURS[kind_of(text)]}", subset="verdict")
    widths = {"claim": 18, "original": 8, "measured": 8, "verdict": 9, "cause": 12}
    for name, width in widths.items():  # rem
        if name in shown:
            sizes = {"min-width": f"{width}rem", "text-align": "left", "white-space": "normal"}
            styled = styled.set_properties(subset=[name], **sizes)
    return styled.set_table_styles([{"selector": "th", "props": "text-align: left"}])


def grid(frame: pd.DataFrame, subject: str) -> pd.io.formats.style.Styler:
    """The cells of a benchmark table, a row a column of the records: "said → measured" and a mark for the verdict.

    ✓ holds, ✗ does not hold, · cannot be tested here; `reasons` says why.
    """
    quantities = {claim.id: (claim.quantity, claim.original) for claim in load()}
    texts, colours = {}, {}
    for row in frame[frame["subject"] == subject].to_dict("records"):
        quantity, original = quantities[row["id"]]
        kind, place = kind_of(row["verdict"]), (quantity.column, quantity.variant)
        texts[place] = f"{number(original)} → {row['measured'].split()[0]} {_MARKS[kind]}"
        colours[place] = f"color: {_COLOURS[kind]}"
    shown, colour = (pd.Series(cells).unstack(sort=False).fillna("") for cells in (texts, colours))
    styled = shown.style.apply(lambda _: colour, axis=None).format(escape="html")
    return styled.set_properties(**{"white-space": "nowrap"})


def reasons(frame: pd.DataFrame, *subjects: str) -> str:
    """The verdicts of these subjects with how often each was given and why (Markdown)."""
    found = frame.loc[frame["subject"].isin(subjects), "verdict"].value_counts()
    return "\n".join(f"- {times} × {verdict}" for verdict, times in found.items())


# ----------------------------------------------------------------------------------- the original's own ablation


def reanalysis() -> pd.DataFrame:
    """The original's ablation with the uncertainty that it left out, most different first.

    Only counts of right answers are known, not which pictures: `least_p` is the smallest p that McNemar's exact test
    could give for that difference (no picture lost where some were gained), and `least_holm_p` adjusts for all
    configurations of both numbers of bits. The real p values are larger.
    """
    frame = pd.read_csv(ABLATION, keep_default_na=False).rename(columns={"kept_in_fp16": "kept"})
    count = next(name for name in frame if name.startswith("correct_of_"))
    n = int(count.removeprefix("correct_of_"))
    bounds = [stats.wilson(right, n) for right in frame[count]]
    nothing = frame[frame["kept"] == "none"].set_index("bits")[count]
    result = pd.DataFrame({"bits": frame["bits"], "kept": frame["kept"], "right": frame[count], "n": n})
    result["top1"] = result["right"] / n
    result["top1_low"], result["top1_high"] = zip(*bounds, strict=True)
    result["pictures"] = result["right"] - result["bits"].map(nothing)
    result["least_p"] = result["pictures"].abs().map(_least_p).where(result["kept"] != "none")
    result["least_holm_p"] = stats.holm(result["least_p"].to_numpy())
    return result.sort_values(["least_p", "bits"], kind="stable").reset_index(drop=True)


def readable_reanalysis(frame: pd.DataFrame) -> pd.DataFrame:
    """The table of `reanalysis` for a report: percentages with their interval in one column."""
    bounds = zip(frame["top1_low"], frame["top1_high"], strict=True)
    return pd.DataFrame(
        {
            "bits": frame["bits"],
            "kept in 16 bit": frame["kept"],
            "right of n": [f"{right} of {n}" for right, n in zip(frame["right"], frame["n"], strict=True)],
            "Top-1 (%)": [f"{100 * value:.2f}" for value in frame["top1"]],
            "95 % interval": [f"{100 * low:.1f} – {100 * high:.1f}" for low, high in bounds],
            "pictures gained": frame["pictures"],
            "smallest possible p": frame["least_p"],
            "after Holm": frame["least_holm_p"],
        }
    )


def _least_p(pictures: int) -> float:
    """McNemar's exact p if all discordant pairs go one way."""
    return stats.mcnemar(np.zeros(pictures, bool), np.ones(pictures, bool)).p


def reanalysis_headline(frame: pd.DataFrame) -> str:
    """What the reanalysis says, in a few sentences (Markdown)."""
    first, tests = frame.iloc[0], int(frame["least_p"].notna().sum())
    needed = stats.fewest_significant(tests)
    significant = int((frame["least_holm_p"] < stats.SIGNIFICANCE).sum())
    return (
        f"- The largest difference of the original's {tests} comparisons is {first['pictures']:+.0f} pictures of "
        f"{first['n']:.0f} ({first['bits']:.0f} bits, {first['kept']} kept). Its p is at least {first['least_p']:.4f}, "
        f"and after Holm's adjustment at least **{first['least_holm_p']:.2f}**.\n"
        f"- {significant} of the {tests} can be significant; that would take a difference of {needed} pictures or more."
    )
