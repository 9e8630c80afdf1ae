"""What a claim is about: one small class a kind, with the fields that it needs and a method `measure(study)`. No torch.

A measurement has a figure for every case that the claim covers: a variant, a batch size, a block, or "" for a single
one. Missing says why a study is no test of the claim.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from vitlib import records
from vitlib.study import Study
from vitlib.variants import find, label

CLAIMS = Path(__file__).with_name("claims.yaml")
OTHER_NETWORK = "the network is not ViT-L/16"
KNOWING = 0.5  # Top-1 of the baseline below which quantization has little to lose
ACCURACIES = ("top1", "top5", "f1_weighted")  # fractions in the records, percentages in the claims
_BOUNDS = {"latency_p50_ms": ("latency_low_ms", "latency_high_ms"), "logit_kl": ("logit_kl_low", "logit_kl_high")}

Name = Annotated[str, AfterValidator(lambda name: find(name).name)]
Names = Annotated[list[Name], Field(min_length=1)]


@cache
def content() -> dict[str, Any]:
    """`claims.yaml`: the original's network and its claims."""
    return yaml.safe_load(CLAIMS.read_text(encoding="utf-8"))


class Missing(LookupError):
    """The study is no test of a claim; the message says why."""


class Figure(NamedTuple):
    """A value with the bounds of its 95 % interval, both the value itself where it has none."""

    value: float
    low: float
    high: float
    note: str = ""


Measurement = dict[str, Figure]
"""Figures by case."""


def exact(value: float, note: str = "") -> Figure:
    """A figure without an interval."""
    return Figure(float(value), float(value), float(value), note)


def require(study: Study, *, gpu: bool = False, weights: bool = False, training: bool = False) -> None:
    """Missing unless the network is the original's and, if asked for, what is compared can be.

    `gpu`: the study ran on one. `weights`: the same base was fine-tuned and as many pictures evaluated. `training`: the
    baseline is good enough for quantization to cost something. Without a checkpoint the size of the fp32 weights
    identifies the network.
    """
    wanted, file = content()["network"], study.checkpoint("merged") / "config.json"
    if file.is_file():
        config = records.read_json(file)
        same = all(config[key] == value for key, value in wanted["config"].items())
        about = f"{config['num_hidden_layers']} blocks of width {config['hidden_size']}"
    else:
        size = cell(study.read("variants"), "fp32-sdpa", "model_mb").value
        same, about = math.isclose(size, wanted["fp32_mb"], rel_tol=0.005), f"{size:,.0f} MB in fp32"
    if not same:
        raise Missing(f"{OTHER_NETWORK} ({about})")
    if gpu:
        found = study.read_json("environment")
        if not found["hardware"].get("gpus") or found["parameters"].get("device") == "cpu":
            raise Missing("the claim is about a GPU, and this study ran on a CPU")
    if weights and (base := study.read_json("base"))["base"] != wanted["base"]:
        raise Missing(f"the accuracies are those of another base ({base['kind']}, not {wanted['base']})")
    if weights and (count := int(study.read("accuracy")["n"].iloc[0])) != wanted["valid"]:
        raise Missing(f"{count} pictures were evaluated, not the original's {wanted['valid']}")
    if training and (top1 := float(study.read("accuracy")["top1"].iloc[0])) < KNOWING:
        raise Missing(f"the baseline is right on only {100 * top1:.0f} % of the pictures and has little to lose")


def rows_of(table: pd.DataFrame, variant: str) -> pd.DataFrame:
    """Rows of a variant in `variants.csv`, by batch size. Missing with the reason where it did not run."""
    rows = table[table["variant"] == variant].set_index("batch")
    if rows.empty:
        raise Missing(f"{variant} is not among the study's variants")
    if rows["status"].iloc[0] != "ok":
        raise Missing(f"{variant} did not run: {rows['reason'].iloc[0]}")
    return rows


def cell(table: pd.DataFrame, variant: str, column: str, batch: int = 1) -> Figure:
    """A column of `variants.csv` at one batch size; accuracies in percent. An unknown bound is infinite."""
    rows, scale = rows_of(table, variant), 100 if column in ACCURACIES else 1
    if batch not in rows.index or pd.isna(rows.loc[batch, column]):
        raise Missing(f"{column} was not measured for {variant} at batch {batch}")
    value, low, high = rows.loc[batch, [column, *_BOUNDS.get(column, (column, column))]].astype(float) * scale
    return Figure(value, -math.inf if math.isnan(low) else low, math.inf if math.isnan(high) else high)


def _ablated(study: Study, bits: int) -> pd.DataFrame:
    """The rows of the ablation with these bits, by what is kept."""
    rows = study.read("ablation").set_index("kept")
    if not (rows["bits"] == bits).any():
        raise Missing(f"{bits} bits were not ablated")
    return rows[rows["bits"] == bits]


def times_faster(baseline: pd.DataFrame, variant: pd.DataFrame) -> Figure:
    """Ratio of the medians over rounds of `latency_ms`, with a bootstrap interval over rounds."""
    before, after = (calls.groupby("round")["latency_ms"].median().to_numpy() for calls in (baseline, variant))
    ratio, rounds = float(np.median(before) / np.median(after)), len(before)
    if rounds < 2:
        return Figure(ratio, -math.inf, math.inf)
    drawn = np.random.default_rng(0).integers(rounds, size=(2000, rounds))
    ratios = np.median(before[drawn], axis=1) / np.median(after[drawn], axis=1)
    return Figure(ratio, *map(float, np.quantile(ratios, [0.025, 0.975])))


class _Kind(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Value(_Kind):
    """A column by variant at batch 1, as in the original's tables; with a baseline, how many times less than that."""

    kind: Literal["value"]
    column: str
    variants: Names
    baseline: Name | None = None

    def measure(self, study: Study) -> Measurement:
        accuracy = self.column in ACCURACIES
        require(study, weights=accuracy, gpu=not accuracy and self.column != "model_mb")
        table = study.read("variants")
        found = {name: cell(table, name, self.column) for name in self.variants}
        if self.baseline is None:
            return found
        base = cell(table, self.baseline, self.column).value
        return {name: exact(base / figure.value) for name, figure in found.items()}


class Faster(_Kind):
    """How many times faster than its baseline a variant is, by batch size; several variants at one `batch`."""

    kind: Literal["times faster"]
    variants: Names
    baseline: Name
    batch: int = 0  # 0: every batch size that was measured

    def measure(self, study: Study) -> Measurement:
        require(study, gpu=True)
        table, calls = study.read("variants"), study.read("latency").set_index(["variant", "batch"]).sort_index()
        found = {}
        for name in self.variants:
            measured = rows_of(table, name).index.intersection(rows_of(table, self.baseline).index)
            for batch in [self.batch] if self.batch else measured:
                ratio = times_faster(calls.loc[(self.baseline, batch)], calls.loc[(name, batch)])
                found[name if self.batch else f"batch {batch}"] = ratio
        return found


class Points(_Kind):
    """Change of Top-1 against the fp32 baseline in points, with its paired interval."""

    kind: Literal["points"]
    variants: Names

    def measure(self, study: Study) -> Measurement:
        require(study, training=True)
        rows = study.read("accuracy").set_index("variant")
        if absent := {"fp32-sdpa", *self.variants} - set(rows.index[rows["top1"].notna()]):
            raise Missing(f"the accuracy of {' and '.join(sorted(absent))} was not measured")
        if rows.loc["fp32-sdpa", "verdict"] != "baseline":
            raise Missing("the study's baseline is not fp32 with SDPA")
        columns = ["difference", "difference_low", "difference_high"]
        return {name: Figure(*(100 * rows.loc[name, columns].astype(float))) for name in self.variants}


class Best(_Kind):
    """By how much the nearest rival is worse in its worst column (lower is better): above 1, no rival is better."""

    kind: Literal["best"]
    variant: Name
    columns: Annotated[list[str], Field(min_length=1)]
    rivals: Names

    def measure(self, study: Study) -> Measurement:
        timed = "latency_p50_ms" in self.columns
        require(study, gpu=timed, training="logit_kl" in self.columns)
        table = study.read("variants")
        batches = rows_of(table, self.variant).index
        return {f"batch {b}" if timed else "": self._margin(table, b) for b in (batches if timed else batches[:1])}

    def _margin(self, table: pd.DataFrame, batch: int) -> Figure:
        own = [cell(table, self.variant, column, batch) for column in self.columns]
        margins = {}
        for name in self.rivals:
            pairs = zip((cell(table, name, column, batch) for column in self.columns), own, strict=True)
            ratios = [(rival.value / mine.value, rival.low / mine.high, rival.high / mine.low) for rival, mine in pairs]
            margins[name] = [max(part) for part in zip(*ratios, strict=True)]
        value, low, high = (min(part) for part in zip(*margins.values(), strict=True))
        return Figure(value, low, high, f"rival: {label(min(margins, key=lambda name: margins[name][0]))}")


class Gain(_Kind):
    """Smallest Holm-adjusted p of the parts that gain Top-1 when kept in FP16; 1 where none gains."""

    kind: Literal["gain"]
    bits: int
    kept: list[str]

    def measure(self, study: Study) -> Measurement:
        require(study, training=True)
        rows = _ablated(study, self.bits)
        gained = rows.loc[self.kept][rows.loc[self.kept, "top1"] > rows.loc["none", "top1"]]
        return {"": exact(gained["holm_p"].min() if len(gained) else 1)}


class Sensitivity(_Kind):
    """KL of blocks that are quantized alone, divided by the mean over all blocks or by the largest of the others.

    Not the KL that keeping a block removes: there the errors of the other blocks remain and may cancel.
    """

    kind: Literal["sensitivity"]
    bits: int
    blocks: list[int]
    against: Literal["mean", "others"] = "mean"

    def measure(self, study: Study) -> Measurement:
        require(study, training=True)
        alone = _ablated(study, self.bits)["logit_kl"].filter(regex=r"^all but block \d+$")
        alone = alone.rename(lambda name: int(name.rpartition(" ")[2]))
        if alone.empty:
            raise Missing("no block was quantized alone")
        if self.against == "mean":
            return {f"block {block}": exact(alone[block] / alone.mean()) for block in self.blocks}
        first = ", ".join(map(str, sorted(alone.nlargest(len(self.blocks)).index)))
        return {"": exact(alone[self.blocks].min() / alone.drop(self.blocks).max(), f"most sensitive: {first}")}


class Floor(_Kind):
    """Microseconds that the arithmetic takes at the highest rate of a GPU: a calculated bound, no measurement."""

    kind: Literal["floor"]
    gflop: float
    card: str
    tflop_s: dict[Name, float]

    def measure(self, study: Study) -> Measurement:
        note = f"calculated, not measured: {self.gflop:g} GFLOP at the peak rate of the {self.card}"
        floors = {name: 1000 * self.gflop / rate for name, rate in self.tflop_s.items()}
        return {name: Figure(floor, floor, math.inf, note) for name, floor in floors.items()}


class Own(_Kind):
    """Pairs of the original's figures, compared: the first divided by the second, or minus it."""

    kind: Literal["own"]
    compared: Literal["ratio", "difference"]
    pairs: dict[str, tuple[float, float]]

    def measure(self, study: Study) -> Measurement:
        compared = float.__truediv__ if self.compared == "ratio" else float.__sub__
        return {case: exact(compared(*pair)) for case, pair in self.pairs.items()}


Quantity = Annotated[Value | Faster | Points | Best | Gain | Sensitivity | Floor | Own, Field(discriminator="kind")]
