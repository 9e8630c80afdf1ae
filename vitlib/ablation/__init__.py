"""Notebook 3: what low precision costs the network, where, and what mends it.

`exchange` runs mixtures of formats, `blocks` is the ablation of whole blocks, `linears` measures each linear,
`plans` chooses a format for each, `formats` compares 4-bit formats, and `repair` trains after quantization.
"""

from __future__ import annotations

import pandas as pd

from vitlib.ablation import blocks, formats, linears, plans, repair
from vitlib.ablation.exchange import prepare
from vitlib.report.tables import NO_BREAK, Markdown, estimate, number
from vitlib.study.study import Study

__all__ = ["blocks", "formats", "linears", "plans", "prepare", "repair"]
open = Study.open
LARGER = 2.0  # times the predicted KL on validation pictures from which training pictures are said to rank plans only


def headline(
    study: Study, sensitivity: pd.DataFrame, ranks: pd.DataFrame, prediction: plans.Prediction, front: pd.DataFrame,
    trained: pd.DataFrame,
) -> Markdown:  # fmt: skip
    """What 4 bits cost, where, what mends it, and how good the prediction is; from the records of this notebook."""
    rows, kept = front.set_index("name"), front[front["kind"] == plans.KEPT]
    names = {"NF4": "NF4", "calibrated NF4": "NF4 calibrated", "the plan": plans.searched(study.settings.plan_bits)}
    plain, calibrated, plan = (rows.loc[name] for name in names.values())
    changed = "; ".join(f"{name} {_changes(rows.loc[row])}" for name, row in names.items())
    points = f"{_signed(format(100 * plain['difference'], '+.1f'))} points" if plain["difference"] else "no points"
    sizes = [f"{rows.loc[name, 'bits']:.2f}" for name in (linears.LABELS[linears.EIGHT], plans.AS_INT8)]
    lines = [
        f"**NF4 costs a KL of {_kl(plain)} ({points} of Top-1); calibrated in the same bytes its KL is "
        f"{_kl(calibrated)}, and {_kl(plan)} with a plan of {plan['bits']:.2f} bits a weight.** KL is the divergence "
        "of the class probabilities from those of FP16 (0: the same).",
        f"Of {len(prediction.linears.subject.labels):,} validation pictures these change class: {changed}.",
        _where(sensitivity[sensitivity["format"] == "nf4"]),
        f"Calibration makes the KL of NF4 {number(plain['kl'] / calibrated['kl'])} times smaller. Of {len(kept)} plans "
        f"that keep blocks in FP16 by hand, {(kept['more_low'] > 0).sum()} have a higher KL than the searched plan of "
        f"their size, and {(kept['more_high'] < 0).sum()} a lower one (paired 95 % interval). With the predicted KL of "
        f"INT8 rows ({sizes[0]} bits a weight) a plan takes {sizes[1]} bits.",
        _prediction(prediction, ranks[ranks["format"] == "nf4c"].set_index("second"), front),
    ]
    return Markdown("\n".join(f"- {line}" for line in [*lines, repair.gain(trained)] if line))


def _kl(row: pd.Series) -> str:
    return linears.nats(row["kl"]) if row["kl"] < 1e-3 else f"{row['kl']:.2g}"


def _changes(row: pd.Series) -> str:
    """How many pictures change class, and what that does to Top-1."""
    points = [100 * row[f"difference{end}"] for end in ("", "_low", "_high")]
    change = f"Top-1 changes by {_signed(estimate(*points, form='+'))} points" if points[0] else "same Top-1"
    return f"{row['flips']}, {change}" if row["flips"] else "none"


def _signed(text: str) -> str:
    return text.replace("-", "−")


def _where(own: pd.DataFrame) -> str:
    """Which blocks and kinds of linears carry the error of linears that are quantized alone."""
    shares = own.groupby("block")["kl"].sum() / own["kl"].sum()
    kinds = own.groupby("linear")[["kl", "parameters"]].sum()
    ordered = (100 * kinds / kinds.sum()).sort_values("kl", ascending=False)
    listed = (f"{name} {row['kl']:.0f} % ({row['parameters']:.0f} %)" for name, row in ordered.iterrows())
    return (
        f"With one linear layer in NF4 at a time, block {shares.idxmax()} causes {100 * shares.max():.0f} % of the "
        f"summed KL (equal share {100 / len(shares):.0f} %). By kind of layer, with its share of the weights: "
        f"{', '.join(each.replace(' ', NO_BREAK) for each in listed)}."
    )


def _prediction(prediction: plans.Prediction, ranks: pd.DataFrame, front: pd.DataFrame) -> str:
    """How far predicted and measured KL are apart, and whether the order of the linears repeats."""
    searched = front[front["kind"] == plans.SEARCHED]
    unseen = (searched["kl"] / searched["predicted_kl"]).median()
    only = ": training pictures rank plans, and do not tell how large the error will be" if unseen > LARGER else ""
    errors = [f"{100 * error:.0f} %" for error in prediction.error]
    pairs = f", with pairs of layers in a block {errors[1]}" if len(errors) > 1 else ""
    found = (ranks.loc[name, ["correlation", "low", "high"]] for name in (linears.HALVES, linears.METHODS["fisher"]))
    repeats, proxy = (estimate(*values) for values in found)
    return (
        f"The sum of the KL of single layers predicts that of random mixtures with a mean error of {errors[0]}{pairs}, "
        f"on the training pictures. On validation pictures the KL of searched plans is {number(unseen)} times as "
        f"large{only}. "
        f"Rank correlation of calibrated layers on other pictures: {repeats}; with a gradient proxy: {proxy}."
    )
