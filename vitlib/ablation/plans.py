"""A format for each linear layer, chosen on training pictures and judged on validation pictures.

The loss of a mixture is predicted as the sum of what its linears cost alone; where that fails, with what pairs of
linears in a block cost in excess. An integer programme finds the mixture of least predicted loss for a size.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from vitlib.ablation.exchange import LINEARS
from vitlib.ablation.linears import EIGHT, FOUR, LABELS, OPTIONS, Linears, Mixture, nats
from vitlib.measure import search, stats
from vitlib.network import checkpoint, plan
from vitlib.report.tables import Column
from vitlib.study.study import Study

RANDOM = 12  # random mixtures in which the prediction is compared with the measurement
ADDITIVE = 0.2  # mean error of the prediction (log ratio) above which pairs are measured
BUDGETS = (4.25, 4.5, 5, 5.5, 6, 7, 8, 10, 12)  # bits a weight
FIXED, KEPT, SEARCHED = "one format", "kept by hand", "searched"
AS_INT8 = "searched, predicted KL ≤ INT8 rows"
PLANS = {
    **{"name": "plan", "bits": Column("bits a weight", ".2f"), "megabytes": Column("MB", ".2f")},
    **{"kl": Column("KL (nats)", nats), ("kl_low", "kl_high"): Column("95 % interval", nats)},
    **{"top1": Column("Top-1 (%)", ".1f", 100), "flips": Column("class changed", ".0f")},
    ("more_low", "more_high"): Column("KL above that of the searched plan", nats),
}


@dataclass
class Prediction:
    """The KL of a mixture on the calibration pictures, predicted from what its linears cost alone.

    `cost` (n, options) is the mean KL of each linear, `size` (n, options) its share of the bits a weight. `pairs` is
    what linears of a block in 4 bits cost beyond their sum. `error` is the mean |log(measured / predicted)| of random
    mixtures, without pairs and, if they were measured, with them.
    """

    linears: Linears
    cost: np.ndarray
    size: np.ndarray
    pairs: list[search.Pair] = field(default_factory=list)
    error: tuple[float, ...] = ()

    @property
    def excess(self) -> list[search.Pair]:
        """The pairs, if they make the prediction better."""
        return self.pairs if len(self.error) > 1 and self.error[1] < self.error[0] else []

    def kl(self, mixture: Mixture) -> float:
        """The predicted KL in nats."""
        return max(search.total(self.cost, mixture, self.excess), 0.0)

    def bits(self, mixture: Mixture) -> float:
        """Bits a weight over all linears of the encoder, scales included."""
        return search.total(self.size, mixture)

    def best(self, bits: float) -> Mixture:
        """The mixture of FP16, INT8 rows and calibrated NF4 of least predicted KL with at most so many bits a weight.

        ValueError where NF4 in all linears takes more.
        """
        return search.choose(self.cost[:, : FOUR + 1], self.size[:, : FOUR + 1], bits, goal_pairs=self.excess)

    def smallest(self, kl: float) -> Mixture:
        """The smallest such mixture whose predicted KL is at most `kl`."""
        return search.choose(self.size[:, : FOUR + 1], self.cost[:, : FOUR + 1], kl, use_pairs=self.excess)


def predict(study: Study, linears: Linears, kl: np.ndarray) -> tuple[Prediction, pd.DataFrame]:
    """A prediction from the KL of single linears (options, n, pictures), and a row a random mixture.

    In `records/additivity.csv`, `predicted` is the sum, `predicted_pairs` has the excess of pairs too, measured only if
    the sum is off by more than ADDITIVE; `kl` is measured on the same pictures, with a bootstrap interval over these.
    """
    rng, size = np.random.default_rng(study.settings.seed), linears.bits * linears.counts[:, None]
    prediction = Prediction(linears, kl.mean(axis=2).T, size / linears.counts.sum())
    mixtures = [rng.choice(FOUR + 1, len(linears.names), p=rng.dirichlet(np.ones(FOUR + 1))) for _ in range(RANDOM)]
    for mixture in mixtures:
        mixture[rng.integers(len(mixture))] = FOUR  # none is the network itself, whose KL is 0
    measured = linears.kl({f"random {number}": one for number, one in enumerate(mixtures)}, "random mixtures")
    rows = [
        {"plan": name, "bits": prediction.bits(mixture), "predicted": search.total(prediction.cost, mixture)}
        | stats.columns("kl", stats.paired_bootstrap(values, seed=study.settings.seed))
        for (name, values), mixture in zip(measured.items(), mixtures, strict=True)
    ]
    frame = pd.DataFrame(rows).assign(predicted_pairs=np.nan)
    prediction.error = (_log_error(frame["kl"], frame["predicted"]),)
    if prediction.error[0] > ADDITIVE:
        prediction.pairs = _pairs(linears, prediction.cost[:, FOUR])
        frame["predicted_pairs"] = [search.total(prediction.cost, one, prediction.pairs) for one in mixtures]
        prediction.error += (_log_error(frame["kl"], frame["predicted_pairs"]),)
    return prediction, study.write("additivity", frame)


def _log_error(measured: pd.Series, predicted: pd.Series) -> float:
    return float(np.abs(np.log(measured / predicted.clip(lower=1e-12))).mean())  # pairs may cost less than nothing


def _pairs(linears: Linears, cost: np.ndarray) -> list[search.Pair]:
    """What two linears of a block in 4 bits cost beyond the sum of both."""
    starts = range(0, len(linears.names), len(LINEARS))
    both = [(first + i, first + j) for first in starts for i, j in itertools.combinations(range(len(LINEARS)), 2)]
    measured = linears.kl({f"{i} {j}": linears.only(FOUR, i, j) for i, j in both}, "pairs of linears in 4 bits")
    return [(i, j, FOUR, FOUR, float(measured[f"{i} {j}"].mean() - cost[i] - cost[j])) for i, j in both]


def searched(bits: float) -> str:
    """The name of the searched plan with at most so many bits a weight."""
    return f"searched, ≤ {bits:.2f} bits"


def candidates(prediction: Prediction, plan_bits: float) -> dict[str, tuple[str, Mixture, str]]:
    """Plans by name: kind, mixture, and for those kept by hand the searched plan of their size.

    Those kept by hand have calibrated NF4 elsewhere, so that only the choice of linears differs.
    """
    own, blocks = prediction.linears, len(prediction.linears.subject.blocks)
    last = range(blocks - max(1, blocks // 8), blocks)  # of 24 blocks the last three, as the original study recommends
    name = f"blocks {last[0]}–{last[-1]}" if len(last) > 1 else f"block {last[0]}"
    kept = {name: set(last), "first and last block": {0, blocks - 1}} | {f"block {k}": {k} for k in range(blocks)}
    found = {LABELS[option]: (FIXED, own.uniform(option), "") for option in range(len(OPTIONS))}
    for name, numbers in kept.items():
        in_block = np.isin(np.arange(len(own.names)) // len(LINEARS), list(numbers))
        mixture = np.where(in_block, 0, FOUR)
        found[f"{name} in FP16"] = (KEPT, mixture, searched(prediction.bits(mixture)))
    budgets = {searched(bits): bits for bits in (*BUDGETS, plan_bits) if bits >= prediction.bits(own.uniform(FOUR))}
    budgets |= {rival: prediction.bits(mixture) for _, mixture, rival in found.values() if rival}
    for name, bits in sorted(budgets.items(), key=lambda pair: pair[1]):
        found[name] = (SEARCHED, prediction.best(bits), "")
    found[AS_INT8] = (SEARCHED, prediction.smallest(prediction.kl(own.uniform(EIGHT))), "")
    return found


def front(study: Study, prediction: Prediction) -> pd.DataFrame:
    """A row a plan, measured on validation pictures, which the search has never seen; `records/plans.csv`.

    `kl` has a bootstrap interval over pictures, `top1` Wilson's, `difference` (of Top-1 to FP16) the paired score
    interval. `more` is by how much the KL of a plan kept by hand exceeds that of the searched plan `rival`, which is
    not larger, with a paired bootstrap interval.
    """
    linears, labels, seed = prediction.linears, prediction.linears.subject.labels.numpy(), study.settings.seed
    plans, rows = candidates(prediction, study.settings.plan_bits), []
    logits = linears.logits(linears.subject.pixels, {name: plan for name, (_, plan, _) in plans.items()}, "plans")
    full = logits[LABELS[0]]
    kl = {name: stats.kl_divergence(full, logits[name]) for name in plans}
    right = {name: stats.topk_right(logits[name], labels) for name in plans}
    for name, (kind, mixture, rival) in plans.items():
        bits = prediction.bits(mixture)
        row = {"name": name, "kind": kind, "format": OPTIONS[mixture[0]] if kind == FIXED else "mixed", "bits": bits}
        row |= {"megabytes": bits * linears.counts.sum() / 8 / 2**20, "predicted_kl": prediction.kl(mixture)}
        row |= stats.columns("kl", stats.paired_bootstrap(kl[name], seed=seed))
        row |= stats.columns("top1", stats.proportion(right[name]))
        row |= stats.columns("difference", stats.paired_difference(right[LABELS[0]], right[name]))
        row |= {"flips": stats.flips(full.argmax(1), logits[name].argmax(1)), "rival": rival}
        more = kl[name] - kl[rival] if rival else np.full(len(labels), np.nan)
        rows.append(row | stats.columns("more", stats.paired_bootstrap(more, seed=seed)))
    return study.write("plans", pd.DataFrame(rows))


def save(study: Study, prediction: Prediction) -> dict[str, str]:
    """Write the checkpoint `mixed` of at most `plan_bits` bits a weight; by linear "fp16", "int8" or "nf4".

    The last means calibrated NF4, see `network.plan`. ValueError where no plan is so small.
    """
    mixture, linears, formats = prediction.best(study.settings.plan_bits), prediction.linears, tuple(plan.CHECKPOINTS)
    chosen = {name: formats[option] for name, option in zip(linears.names, mixture, strict=True)}
    note = {"study": study.name, "bits_per_weight": prediction.bits(mixture), "predicted_kl": prediction.kl(mixture)}
    checkpoint.save_mixed(study.checkpoints, chosen, linears.subject.loaded.device, note)
    return chosen
