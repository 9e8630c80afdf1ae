"""A format for each linear layer, chosen on training pictures and judged on validation pictures.

The loss of a mixture is predicted as the sum of what its linears cost alone; where that fails, with what pairs of
linears in a block cost in excess. An integer programme finds the mixture of least predicted loss for a size.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from vitlib.ablation.exchange import FULL, LINEARS
from vitlib.ablation.linears import EIGHT, FOUR, KINDS, Linears
from vitlib.measure import search, stats
from vitlib.network import checkpoint
from vitlib.report.tables import Column
from vitlib.study.study import Study

RANDOM = 12  # random mixtures in which the prediction is compared with the measurement
ADDITIVE = 0.2  # mean error of the prediction (log ratio) above which pairs are measured
BUDGETS = (4.25, 4.5, 5, 5.5, 6, 7, 8, 10, 12)  # bits a weight
FIXED, KEPT, SEARCHED = "one format", "kept by hand", "searched"
OPTIONS = (FULL, EIGHT, FOUR)
PLANS = {
    **{"name": "plan", "bits": Column("bits a weight", ".2f"), "megabytes": Column("MB", ".2f")},
    "predicted_kl": Column("predicted KL (nats)", ".1e"),
    "kl": Column("KL (nats)", ".1e"),
    ("kl_low", "kl_high"): Column("95 % interval", ".1e"),
    ("top1", "top1_low", "top1_high"): Column("Top-1 (%)", ",", 100),
    "flips": Column("class changed", ",.0f"),
    "rival": "searched plan of this size",
    ("more_low", "more_high"): Column("its KL is lower by (95 % interval)", ".1e"),
}

Mixture = dict[str, str]  # formats by linear; those that it does not name are in FP16


@dataclass
class Prediction:
    """The KL of a mixture on the calibration pictures, predicted from what its linears cost alone.

    `cost[format]` (n,) is the mean KL of each linear, `excess` that of pairs of linears in 4 bits beyond their sum, and
    `error` the mean |log(measured / predicted)| without pairs, and with them if they were measured.
    """

    linears: Linears
    cost: dict[str, np.ndarray]
    excess: dict[tuple[int, int], float] = field(default_factory=dict)
    error: tuple[float, ...] = ()

    @property
    def paired(self) -> bool:
        """Whether pairs make the prediction better."""
        return len(self.error) > 1 and self.error[1] < self.error[0]

    def kl(self, mixture: Mixture, paired: bool | None = None) -> float:
        """The predicted KL in nats, with pairs or without; by default as in the search."""
        names = self.linears.names
        found = sum(self.cost[mixture[name]][at] for at, name in enumerate(names) if mixture.get(name, FULL) != FULL)
        pairs = self.excess if (self.paired if paired is None else paired) else {}
        found += sum(extra for pair, extra in pairs.items() if all(mixture.get(names[at]) == FOUR for at in pair))
        return max(float(found), 0.0)

    def bits(self, mixture: Mixture) -> float:
        """Bits a weight over all linears of the encoder, scales included."""
        kinds = [mixture.get(name, FULL) for name in self.linears.names]
        bits = [self.linears.bits[kind][at] for at, kind in enumerate(kinds)]
        return float(np.average(bits, weights=self.linears.counts))

    def best(self, bits: float) -> Mixture:
        """The mixture of FP16, INT8 rows and 4 bits of least predicted KL with at most so many bits a weight.

        ValueError where 4 bits in all linears take more.
        """
        own = self.linears
        cost = np.stack([np.zeros(len(own.names)), self.cost[EIGHT], self.cost[FOUR]], axis=1)
        size = np.stack([own.bits[kind] * own.counts / own.counts.sum() for kind in OPTIONS], axis=1)
        pairs = [(*pair, 2, 2, extra) for pair, extra in self.excess.items()] if self.paired else []
        found = search.choose(cost, size, bits, pairs)
        return {name: OPTIONS[option] for name, option in zip(own.names, found, strict=True)}


def predict(study: Study, linears: Linears, kl: Mapping[str, np.ndarray]) -> tuple[Prediction, pd.DataFrame]:
    """A prediction from the measured KL of single linears, and a row a random mixture; `records/additivity.csv`.

    `predicted` is the sum, `predicted_pairs` has the excess of pairs too, measured only if the sum is off by more than
    ADDITIVE; `kl` is measured on the same pictures, with a bootstrap interval over these.
    """
    rng, names, found = np.random.default_rng(study.settings.seed), linears.names, {}
    prediction = Prediction(linears, {kind: values.mean(axis=1) for kind, values in kl.items()})
    for number in range(RANDOM):
        shares = rng.dirichlet(np.ones(3))
        kinds = rng.choice(OPTIONS, len(names), p=shares)
        found[f"random {number + 1}"] = dict(zip(names, map(str, kinds), strict=True))
    measured = linears.kl(found, "random mixtures")
    frame = pd.DataFrame({"plan": list(found), "bits": [prediction.bits(one) for one in found.values()]})
    frame["predicted"] = [prediction.kl(one, paired=False) for one in found.values()]
    each = [stats.paired_bootstrap(values, seed=study.settings.seed) for values in measured.values()]
    frame[["kl", "kl_low", "kl_high"]] = np.array(each)
    frame["predicted_pairs"] = np.nan
    prediction.error = (_log_error(frame["kl"], frame["predicted"]),)
    if prediction.error[0] > ADDITIVE:
        prediction.excess = _pairs(linears, prediction.cost[FOUR])
        frame["predicted_pairs"] = [prediction.kl(one, paired=True) for one in found.values()]
        prediction.error += (_log_error(frame["kl"], frame["predicted_pairs"]),)
    return prediction, study.write("additivity", frame)


def _log_error(measured: pd.Series, predicted: pd.Series) -> float:
    return float(np.abs(np.log(measured / predicted)).mean())


def _pairs(linears: Linears, cost: np.ndarray) -> dict[tuple[int, int], float]:
    """KL of two linears of a block in 4 bits beyond the sum of both, by their positions."""
    width, names = len(LINEARS), linears.names
    found = [
        (start + i, start + j)
        for start in range(0, len(names), width)
        for i, j in itertools.combinations(range(width), 2)
    ]
    mixtures = {f"{i} {j}": {names[i]: FOUR, names[j]: FOUR} for i, j in found}
    measured = linears.kl(mixtures, "pairs of linears in 4 bits")
    return {(i, j): float(measured[f"{i} {j}"].mean() - cost[i] - cost[j]) for i, j in found}


def name_of(bits: float) -> str:
    """The name of the searched plan with at most so many bits a weight."""
    return f"searched, at most {bits:.2f} bits"


def candidates(prediction: Prediction, plan_bits: float) -> tuple[dict[str, tuple[str, Mixture]], dict[str, str]]:
    """Kind and mixture of each plan by name, and of each that is kept by hand the searched plan of its size.

    Those kept by hand have 4 bits elsewhere, as searched plans do, so that only the choice of linears differs.
    """
    own, blocks = prediction.linears, len(prediction.linears.subject.blocks)
    found = {"FP16": (FIXED, {})}
    found |= {label: (FIXED, dict.fromkeys(own.names, kind)) for kind, label in KINDS.items()}
    last = max(1, blocks // 8)  # of 24 blocks the last three, which the original study recommends
    eighth = f"blocks {blocks - last}–{blocks - 1}" if last > 1 else f"block {blocks - 1}"
    kept = {f"{eighth} in FP16": set(range(blocks - last, blocks)), "first and last block in FP16": {0, blocks - 1}}
    kept |= {f"block {k} in FP16": {k} for k in range(blocks)}
    budgets = {bits: name_of(bits) for bits in sorted({*BUDGETS, plan_bits})}
    rivals, width = {}, len(LINEARS)
    for name, blocks_kept in kept.items():
        mixture = {linear: FOUR for at, linear in enumerate(own.names) if at // width not in blocks_kept}
        found[name] = (KEPT, mixture)
        bits = prediction.bits(mixture)
        rivals[name] = budgets.setdefault(bits, name_of(bits))
    least = prediction.bits(dict.fromkeys(own.names, FOUR))
    for bits, name in sorted(budgets.items()):
        if bits >= least:
            found[name] = (SEARCHED, prediction.best(bits))
    return found, rivals


def front(study: Study, prediction: Prediction) -> pd.DataFrame:
    """A row a plan, measured on validation pictures, which the search has never seen; `records/plans.csv`.

    `kl` has a bootstrap interval over pictures, `top1` Wilson's, `difference` (of Top-1 to FP16) the paired score
    interval. `more` is by how much the KL of a plan kept by hand exceeds that of the searched plan `rival`, which is
    not larger, with a paired bootstrap interval.
    """
    linears, subject = prediction.linears, prediction.linears.subject
    plans, rivals = candidates(prediction, study.settings.plan_bits)
    logits = linears.logits(subject.pixels, {name: plan for name, (_, plan) in plans.items()}, "plans")
    labels, rows, seed = subject.labels.numpy(), [], study.settings.seed
    kl = {name: stats.kl_divergence(logits[FULL], logits[name]) for name in plans}
    right = {name: stats.topk_right(logits[name], labels) for name in plans}
    for name, (kind, mixture) in plans.items():
        bits, formats = prediction.bits(mixture), {mixture.get(linear, FULL) for linear in linears.names}
        row = {"name": name, "kind": kind, "format": "mixed" if len(formats) > 1 else formats.pop(), "bits": bits}
        row |= {"megabytes": bits * linears.counts.sum() / 8 / 2**20, "predicted_kl": prediction.kl(mixture)}
        row |= _named("kl", stats.paired_bootstrap(kl[name], seed=seed))
        top1 = stats.wilson(int(right[name].sum()), len(labels))
        row |= _named("top1", stats.Interval(float(right[name].mean()), *top1))
        row |= _named("difference", stats.paired_difference(right["FP16"], right[name]))
        row |= {"flips": stats.flips(logits[FULL].argmax(1), logits[name].argmax(1)), "rival": rivals.get(name, "")}
        excess = stats.paired_bootstrap(kl[name] - kl[rivals[name]], seed=seed) if name in rivals else (np.nan,) * 3
        rows.append(row | _named("more", stats.Interval(*excess)))
    return study.write("plans", pd.DataFrame(rows))


def _named(name: str, interval: stats.Interval) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), interval, strict=True))


def save(study: Study, prediction: Prediction) -> dict[str, str]:
    """Write the checkpoint `mixed` of at most `plan_bits` bits a weight; by linear "fp16", "int8" or "nf4".

    The last means calibrated NF4, see `network.plan`. ValueError where no plan is so small.
    """
    mixture, subject = prediction.best(study.settings.plan_bits), prediction.linears.subject
    chosen = {name: "nf4" if kind == FOUR else kind for name, kind in mixture.items()}
    note = {"study": study.name, "bits_per_weight": prediction.bits(mixture), "predicted_kl": prediction.kl(mixture)}
    checkpoint.save_mixed(study.checkpoints, chosen, subject.loaded.device, note)
    return chosen
