"""Quantities that claims are about: a small class for each kind, with a method `measure(study)`. No torch.

A measurement has a figure for every case of a claim: a variant, a batch size, a block, or "" for a single figure.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import yaml
from pydantic import AfterValidator, BaseModel, Field

from vitlib.measure import benchmark, stats
from vitlib.study import records
from vitlib.study.study import Study
from vitlib.study.variants import find, label

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
    """The study cannot test a claim; the message says why."""


class Figure(NamedTuple):
    """A value with the bounds of its 95 % interval; both are the value itself where it has none."""

    value: float
    low: float
    high: float
    note: str = ""


Measurement = dict[str, Figure]  # by case


def exact(value: float, note: str = "") -> Figure:
    """A figure without an interval."""
    return Figure(float(value), float(value), float(value), note)


def bounded(value: float, low: float, high: float) -> Figure:
    """A figure with an interval; an unknown bound (NaN) is infinite."""
    return Figure(float(value), -math.inf if math.isnan(low) else low, math.inf if math.isnan(high) else high)


def require(study: Study, *, gpu: bool = False, weights: bool = False, training: bool = False) -> None:
    """Missing unless the network (without a checkpoint: the size of its weights) is the original's.

    `gpu`: and it ran on one. `weights`: with the same base and as many pictures. `training`: the baseline is good.
    """
    wanted, file = content()["network"], study.checkpoint("merged") / "config.json"
    if file.is_file():
        config = records.read_json(file)
        same = wanted["config"].items() <= config.items()
        about = f"{config['num_hidden_layers']} blocks of width {config['hidden_size']}"
    else:
        size = cell(study, "fp32-sdpa", "model_mb").value
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
        raise Missing(f"the baseline's Top-1 is only {100 * top1:.0f} %, so quantization has little to change")


def rows_of(study: Study, variant: str) -> pd.DataFrame:
    """Rows of a variant in `variants.csv`, by batch size. Missing with the reason where it did not run."""
    table = study.read("variants")
    rows = table[table["variant"] == variant].set_index("batch")
    if rows.empty:
        raise Missing(f"{label(variant)} is not among the study's variants")
    if rows["status"].iloc[0] != "ok":
        raise Missing(f"{label(variant)} did not run: {rows['reason'].iloc[0]}")
    return rows


def cell(study: Study, variant: str, column: str, batch: int = 1) -> Figure:
    """A column of `variants.csv` at one batch size; accuracies in percent."""
    rows, scale = rows_of(study, variant), 100 if column in ACCURACIES else 1
    if batch not in rows.index or pd.isna(rows.loc[batch, column]):
        raise Missing(f"{column} was not measured for {label(variant)} at batch size {batch}")
    return bounded(*(rows.loc[batch, [column, *_BOUNDS.get(column, (column, column))]].astype(float) * scale))


def _ablated(study: Study, bits: int) -> pd.DataFrame:
    """The rows of the ablation with these bits, by what is kept."""
    if (rows := study.read("ablation").query("bits == @bits")).empty:
        raise Missing(f"there is no ablation at {bits} bits")
    return rows.set_index("kept")


class _Kind(BaseModel, extra="forbid", frozen=True):
    """What all kinds share."""


class Value(_Kind):
    """A column by variant at batch size 1, as in the original's tables; with a baseline, how many times smaller."""

    kind: Literal["value"]
    column: str
    variants: Names
    baseline: Name | None = None

    def measure(self, study: Study) -> Measurement:
        accuracy = self.column in ACCURACIES
        require(study, weights=accuracy, gpu=not accuracy and self.column != "model_mb")
        found = {name: cell(study, name, self.column) for name in self.variants}
        base = cell(study, self.baseline, self.column).value if self.baseline else None
        return {name: exact(base / figure.value) for name, figure in found.items()} if base else found


class Faster(_Kind):
    """How many times faster than its baseline a variant is, by batch size; several variants at one `batch`."""

    kind: Literal["times faster"]
    variants: Names
    baseline: Name
    batch: int = 0  # 0: every batch size that was measured

    def measure(self, study: Study) -> Measurement:
        """Factors by batch size, or by variant at the batch size that the claim names."""
        require(study, gpu=True)
        latencies, found = study.read("latency"), {}
        for name in self.variants:
            measured = rows_of(study, name).index.intersection(rows_of(study, self.baseline).index)
            if self.batch and self.batch not in measured:
                raise Missing(f"{label(name)} was not measured at batch size {self.batch}")
            for batch in [self.batch] if self.batch else measured:
                rounds = (benchmark.rounds_of(latencies, each, batch) for each in (self.baseline, name))
                found[name if self.batch else f"batch {batch}"] = bounded(*stats.times_faster(*rounds))
        return found


class Points(_Kind):
    """Change of Top-1 against the fp32 baseline in points, with its paired interval."""

    kind: Literal["points"]
    variants: Names

    def measure(self, study: Study) -> Measurement:
        """Points by variant."""
        require(study, training=True)
        rows = study.read("accuracy").set_index("variant")
        if absent := {"fp32-sdpa", *self.variants} - set(rows.index[rows["top1"].notna()]):
            raise Missing(f"the accuracy of {' and '.join(map(label, sorted(absent)))} was not measured")
        if rows.loc["fp32-sdpa", "verdict"] != "baseline":
            raise Missing("the study's baseline is not fp32 with SDPA")
        columns = ["difference", "difference_low", "difference_high"]
        return {name: Figure(*(100 * rows.loc[name, columns].astype(float))) for name in self.variants}


class Best(_Kind):
    """Worst column of the closest rival, divided by the variant's (lower is better): above 1, no rival is better."""

    kind: Literal["best"]
    variant: Name
    columns: Annotated[list[str], Field(min_length=1)]
    rivals: Names

    def measure(self, study: Study) -> Measurement:
        timed = "latency_p50_ms" in self.columns
        require(study, gpu=timed, training="logit_kl" in self.columns)
        batches = rows_of(study, self.variant).index
        return {f"batch {b}" if timed else "": self._margin(study, b) for b in (batches if timed else batches[:1])}

    def _margin(self, study: Study, batch: int) -> Figure:
        own, margins = [cell(study, self.variant, column, batch) for column in self.columns], {}
        for name in self.rivals:
            pairs = zip((cell(study, name, column, batch) for column in self.columns), own, strict=True)
            ratios = [(rival.value / mine.value, rival.low / mine.high, rival.high / mine.low) for rival, mine in pairs]
            margins[name] = np.max(ratios, axis=0)
        closest = label(min(margins, key=lambda name: margins[name][0]))
        return Figure(*map(float, np.min(list(margins.values()), axis=0)), f"closest: {closest}")


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
    """KL of blocks quantized alone (only there no other errors cancel), by the mean of all or the largest other."""

    kind: Literal["sensitivity"]
    bits: int
    blocks: list[int]
    against: Literal["mean", "others"] = "mean"

    def measure(self, study: Study) -> Measurement:
        """The KL of the blocks that the claim names, against the others."""
        require(study, training=True)
        kl = _ablated(study, self.bits)["logit_kl"].filter(like="all but block ")
        if kl.empty:
            raise Missing("no block was quantized alone")
        kl.index = kl.index.str.removeprefix("all but block ").astype(int)
        if self.against == "mean":
            return {f"block {block}": exact(kl[block] / kl.mean()) for block in self.blocks}
        first = ", ".join(map(str, kl.nlargest(len(self.blocks)).index))
        return {"": exact(kl[self.blocks].min() / kl.drop(self.blocks).max(), f"most sensitive: {first}")}


class Own(_Kind):
    """Pairs of the original's figures, compared: the first divided by the second, or minus it."""

    kind: Literal["own"]
    compared: Literal["ratio", "difference"]
    pairs: dict[str, tuple[float, float]]

    def measure(self, study: Study) -> Measurement:
        compare, sign = (float.__truediv__, "/") if self.compared == "ratio" else (float.__sub__, "−")
        return {case: exact(compare(*two), f"{two[0]:,.7g} {sign} {two[1]:,.7g}") for case, two in self.pairs.items()}


Quantity = Annotated[Value | Faster | Points | Best | Gain | Sensitivity | Own, Field(discriminator="kind")]
