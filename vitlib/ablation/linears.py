"""How much of the error each linear layer causes in low precision, measured on training pictures.

All products are in FP32 with the weights that the study's checkpoints store, so that only the formats differ.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import bitsandbytes as bnb
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn

from vitlib.ablation.exchange import FULL, LINEARS, Configuration, Exchange, Subject
from vitlib.measure import stats
from vitlib.network import checkpoint, plan, quantize
from vitlib.report.tables import Column
from vitlib.study.study import Study
from vitlib.study.variants import FORMATS, Variant

OPTIONS = (FULL, "int8", "nf4c", "nf4")  # formats of a linear; plans choose between the first three
EIGHT, FOUR, PLAIN = 1, 2, 3  # their numbers
LABELS = ("FP16", "INT8 rows", "NF4 calibrated", "NF4")
METHODS = {"fisher": "Fisher proxy", "fisher_by_type": "Fisher proxy by module type", "weight_error": "weight error"}
HALVES = "KL on other pictures"
FISHER_BATCH = 8  # pictures in a backward pass


def nats(value: float) -> str:
    """A KL divergence in two digits, as one word."""
    return f"{value:.1e}".replace("-", "\u2011") if value else "0"


SENSITIVITY = {
    **{"name": "format", "block": "block", "linear": "linear", "parameters": Column("weights", ",.0f")},
    **{"kl": Column("KL (nats)", nats, bar=True), ("kl_low", "kl_high"): Column("95 % interval", nats)},
    **{"fisher": Column("Fisher proxy (nats)", nats), "fisher_by_type": Column("of its type's mean", ".2f")},
    "weight_error": Column("weight error (%)", ".2f", 100),
}
CORRELATIONS = {
    **{"name": "format", "second": "rank correlation of KL with"},
    ("correlation", "low", "high"): Column("Spearman (95 % interval)", ","),
}

Mixture = NDArray[np.intp]  # (n,): for each linear the number of its format in OPTIONS


@dataclass
class Linears:
    """The n linears of the encoder in FP32 and in low precision: their names, the numbers of weights `counts` (n,),
    and what they take in each format, `bits` (n, options) a weight with its scales."""

    subject: Subject
    exchange: Exchange
    names: list[str]
    counts: NDArray[np.float64]
    bits: NDArray[np.float64]
    batch_size: int

    def logits(self, pixels: torch.Tensor, mixtures: Mapping[str, Mixture], what: str) -> dict[str, np.ndarray]:
        """Logits (n, classes) of uint8 `pixels` (n, 3, h, w) by mixture."""
        wanted = []
        for name, mixture in mixtures.items():
            formats = [OPTIONS[option] for option in mixture]
            blocks = zip(*[iter(formats)] * len(LINEARS), strict=True)
            wanted.append(Configuration(name, tuple(blocks)))
        found = self.exchange.outputs(pixels, wanted, self.subject.loaded, self.batch_size, what)
        return {name: values.numpy() for name, values in found.items()}

    def kl(self, mixtures: Mapping[str, Mixture], what: str) -> dict[str, np.ndarray]:
        """KL divergence (m,) of each calibration picture's class probabilities from FP16's, by mixture."""
        found = self.logits(self.subject.calibration, {FULL: self.uniform(), **mixtures}, what)
        return {name: stats.kl_divergence(found[FULL], found[name]) for name in mixtures}

    def uniform(self, option: int = 0) -> Mixture:
        """The same format in all linears."""
        return np.full(len(self.names), option)

    def only(self, option: int, *positions: int) -> Mixture:
        """A format in the linears at these positions, FP16 in all others."""
        return np.where(np.isin(np.arange(len(self.names)), positions), option, 0)


def load(study: Study, subject: Subject) -> Linears:
    """The encoder's linears, with their weights in each of the study's checkpoints of low precision."""
    model = copy.deepcopy(subject.loaded.model).float()
    names = [f"layers.{block}.{path}" for block in range(len(subject.blocks)) for path in LINEARS.values()]
    counts = np.array([model.vit.get_submodule(name).weight.numel() for name in names], dtype=np.float64)
    twins, bits = {}, [np.full(len(names), 16.0)]
    for kind in OPTIONS[1:]:
        stored = plan.linears(checkpoint.load(study.checkpoints, Variant(kind), subject.loaded.device).model)
        own = {name: quantize.dequantized(stored[name]) for name in names}
        twins[kind] = lambda name, linear, own=own: _dense(linear, own[name])
        bits.append(np.array([_bits(stored[name]) for name in names]))
    exchange = Exchange(model, twins)
    return Linears(subject, exchange, names, counts, np.stack(bits, axis=1), study.settings.eval_batch_size)


def _bits(layer: nn.Linear) -> float:
    """Bits a weight: code, scale of its group or row, and of NF4 the scale of the scales."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return 4 + (8 + 32 / 256 if layer.weight.quant_state.nested else 32) / 64
    return 8 + 32 / layer.in_features


def _dense(linear: nn.Linear, weight: torch.Tensor) -> nn.Linear:
    """`linear` with another weight."""
    made = nn.Linear(linear.in_features, linear.out_features, device="meta")
    made.weight, made.bias = nn.Parameter(weight, requires_grad=False), linear.bias
    return made


def fisher(linears: Linears, seed: int = 0) -> dict[str, torch.Tensor]:
    """The diagonal of the Fisher matrix of each weight (out, in), averaged over the calibration pictures.

    The expectation is over the network's own predictions, not over labels (Kunstner et al. 2019). Of logits with the
    probabilities p the matrix is L L' with L z = √p z - p (√p · z), so for random signs z the squared gradient of
    logits · L z has the diagonal as its expectation (Bekas et al. 2007), for the sum over a batch too.
    """
    model, subject, generator = linears.exchange.model, linears.subject, torch.Generator().manual_seed(seed)
    weights = [model.vit.get_submodule(name).weight for name in linears.names]
    squares = [torch.zeros_like(weight) for weight in weights]
    for batch in subject.calibration.split(FISHER_BATCH):
        logits = model(pixel_values=subject.loaded.preprocess.normalise(batch.to(subject.loaded.device))).logits
        p = logits.detach().softmax(1)
        rooted = p.sqrt() * (2 * torch.randint(2, p.shape, generator=generator) - 1).to(p)
        along = rooted - p * rooted.sum(1, keepdim=True)
        for square, gradient in zip(squares, torch.autograd.grad((logits * along).sum(), weights), strict=True):
            square.addcmul_(gradient, gradient, value=1 / len(subject.calibration))
    return dict(zip(linears.names, squares, strict=True))


def sensitivity(study: Study, linears: Linears) -> tuple[pd.DataFrame, np.ndarray]:
    """A row a format and linear, written to `records/sensitivity.csv`, and the KL (options, linears, pictures).

    `kl` is measured with this linear alone in low precision, with a bootstrap interval over pictures. `fisher` is its
    estimate ½ Σ F Δw² from the diagonal of the Fisher matrix F; `fisher_by_type` divides it by the mean over attention
    or MLP linears, whose magnitudes differ (after LampQ, Kim et al. 2026). `weight_error` is ‖ΔW‖ / ‖W‖.
    """
    low, every = range(1, len(OPTIONS)), range(len(linears.names))  # neighbours share most: all of a linear, then on
    singles = {f"{at} {option}": linears.only(option, at) for at in every for option in low}
    found, squares, rows = linears.kl(singles, "one linear in low precision"), fisher(linears, study.settings.seed), []
    for option, (at, name) in ((option, one) for option in low for one in enumerate(linears.names)):
        own, twin = (linears.exchange.linear(name, kind).weight.detach() for kind in (FULL, OPTIONS[option]))
        kl = stats.paired_bootstrap(found[f"{at} {option}"], seed=study.settings.seed)
        row = {"format": OPTIONS[option], "name": LABELS[option], "bits": FORMATS[OPTIONS[option]].bits}
        row |= {"block": at // len(LINEARS), "linear": list(LINEARS)[at % len(LINEARS)], "parameters": own.numel()}
        row |= stats.columns("kl", kl) | {"fisher": (squares[name] * (twin - own).square()).sum().item() / 2}
        rows.append(row | {"weight_error": ((twin - own).norm() / own.norm()).item()})
    frame = pd.DataFrame(rows)
    by_type = frame.groupby([frame["format"], frame["linear"].str.startswith("fc")])["fisher"]
    frame["fisher_by_type"] = frame["fisher"] / by_type.transform("mean")
    kl = np.array([[found[f"{at} {option}"] for at in every] for option in low])
    return study.write("sensitivity", frame), np.concatenate([np.zeros_like(kl[:1]), kl])


def correlations(study: Study, frame: pd.DataFrame, kl: np.ndarray) -> pd.DataFrame:
    """Whether other methods and other pictures rank the linears as the measured KL does; `records/correlations.csv`.

    Spearman's correlation with a bootstrap interval over linears. That of random halves of the pictures is the mean
    over the splits, and each resample of linears takes one split.
    """
    rows = []
    for (kind, name), own in frame.groupby(["format", "name"], sort=False):
        compared = {label: (own["kl"], own[column]) for column, label in METHODS.items()}
        compared[HALVES] = stats.random_halves(kl[OPTIONS.index(kind)], seed=study.settings.seed)
        for label, both in compared.items():
            found = stats.rank_correlation(*both, seed=study.settings.seed)
            row = {"format": kind, "name": name, "first": "KL", "second": label}
            rows.append(row | dict(zip(("correlation", "low", "high"), found, strict=True)))
    return study.write("correlations", pd.DataFrame(rows))
