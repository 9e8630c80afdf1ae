"""Notebook 3: what low precision costs the network, where, and what mends it.

`exchange` runs mixtures of formats, `blocks` is the ablation of whole blocks, `linears` measures each linear, and
`plans` chooses a format for each.
"""

from __future__ import annotations

import pandas as pd

from vitlib.ablation import blocks, linears, plans
from vitlib.ablation.subject import prepare
from vitlib.report.tables import Markdown, estimate
from vitlib.study import origin
from vitlib.study.study import Study

__all__ = ["blocks", "linears", "plans", "prepare"]
open = Study.open


def introduce(study: Study) -> Markdown:
    """What the base is, and what follows for the accuracies of this page."""
    return Markdown(origin.sentence(study.folder))


def headline(
    study: Study, sensitivity: pd.DataFrame, ranks: pd.DataFrame, prediction: plans.Prediction, front: pd.DataFrame
) -> Markdown:
    """What 4 bits cost, where, what mends it, and how good the prediction is; from the records of this notebook."""
    rows, pictures = front.set_index("name"), len(prediction.linears.subject.labels)
    plain, calibrated = (rows.loc[linears.KINDS[kind]] for kind in (linears.PLAIN, linears.FOUR))
    plan = rows.loc[plans.name_of(study.settings.plan_bits)]
    change = "leaves Top-1 unchanged" if not plain["difference"] else f"changes Top-1 by {_points(plain)} points"
    lines = [
        f"**NF4 {change} (KL {plain['kl']:.2g}); calibrated in the same bytes its KL is {calibrated['kl']:.2g}, and "
        f"{plan['kl']:.2g} with a searched plan of {plan['bits']:.2f} bits a weight.** KL is how far the class "
        f"probabilities are from those of FP16 (0: the same), on {pictures:,} validation pictures.",
        f"Of these pictures NF4 gives {plain['flips']} another class ({_change(plain)}), calibrated NF4 "
        f"{calibrated['flips']} ({_change(calibrated)}), the plan {plan['flips']} ({_change(plan)}).",
        _where(sensitivity[sensitivity["format"] == linears.PLAIN]),
        f"Calibration makes the KL of NF4 {plain['kl'] / calibrated['kl']:.2g} times smaller. {_against_hand(front)}",
        _prediction(prediction, ranks[ranks["format"] == linears.FOUR].set_index("second")),
    ]
    return Markdown("\n".join(f"- {line}" for line in lines))


def _points(row: pd.Series) -> str:
    return estimate(*(100 * row[f"difference{end}"] for end in ("", "_low", "_high")), form="+").replace("-", "−")


def _change(row: pd.Series) -> str:
    return f"Top-1 {_points(row)} points" if row["difference"] else "same Top-1"


def _where(own: pd.DataFrame) -> str:
    """Which blocks and kinds of linears carry the error of NF4 linears, each alone."""
    blocks_kl, kinds = own.groupby("block")["kl"].sum(), own.groupby("linear", sort=False)[["kl", "weights"]].sum()
    block, shares = blocks_kl.idxmax(), (100 * kinds / kinds.sum()).sort_values("kl", ascending=False)
    listed = ", ".join(f"{name} {row['kl']:.0f} % ({row['weights']:.0f} %)" for name, row in shares.iterrows())
    share, equal = 100 * blocks_kl[block] / blocks_kl.sum(), 100 / len(blocks_kl)
    return (
        f"With one linear layer in NF4 at a time, block {block} causes {share:.0f} % of the summed KL (equal share "
        f"{equal:.0f} %). By kind, with its share of the weights: {listed}."
    )


def _against_hand(front: pd.DataFrame) -> str:
    """In how many sizes the searched plan is better than the plan that keeps blocks by hand."""
    kept = front[front["kind"] == plans.KEPT]
    better, worse = (kept["more_low"] > 0).sum(), (kept["more_high"] < 0).sum()
    return (
        f"At equal size the searched plan has a lower KL than {better} of the {len(kept)} plans that keep blocks in "
        f"FP16 by hand and a higher one than {worse} (paired 95 % interval of the difference)."
    )


def _prediction(prediction: plans.Prediction, ranks: pd.DataFrame) -> str:
    """How far predicted and measured KL are apart, and whether the order of the linears repeats."""
    errors = [f"{100 * error:.0f} %" for error in prediction.error]
    pairs = f", with pairs of linears in a block by {errors[1]}" if len(errors) > 1 else ""
    found = [ranks.loc[name, ["correlation", "low", "high"]] for name in (linears.HALVES, linears.METHODS["fisher"])]
    repeats, proxy = (estimate(*values) for values in found)
    return (
        f"The sum of the KL of single linears predicts that of random mixtures with an error of {errors[0]}{pairs}. "
        f"Rank correlation of calibrated linears on other pictures: {repeats}; with a gradient proxy: {proxy}."
    )
