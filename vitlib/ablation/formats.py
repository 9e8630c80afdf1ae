"""4-bit formats at equal size: what each costs the network, with one recipe for all."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from vitlib.ablation.exchange import Subject
from vitlib.measure import stats
from vitlib.network import calibrate, engine, grids, plan
from vitlib.pictures import decode, sources
from vitlib.report.tables import Column, Markdown
from vitlib.study.study import Study

SEEDS = 3  # draws of calibration pictures
FORMATS = {
    **{"name": "format", "bits": Column("bits a weight", ".2f"), "pictures": "calibrated on"},
    ("kl", "kl_low", "kl_high"): Column("KL (nats)", ","),
    ("top1", "top1_low", "top1_high"): Column("Top-1 (%)", ",", 100),
    **{"flips": Column("class changed", ",.0f"), "reason": "not run because"},
}


def equal_size(study: Study, subject: Subject) -> pd.DataFrame:
    """A row a format of `grids.ROWS`, and one a draw of training pictures where these calibrate; `records/formats.csv`.

    All linears of the encoder are in the format, products are in FP32. `kl` from the network without quantization, on
    the validation pictures, has a bootstrap interval over pictures, `top1` Wilson's. A format whose package is missing
    has a `reason`.
    """
    full = copy.deepcopy(subject.loaded.model).float()
    expected, draws, rows = _logits(full, subject), _draws(study, subject), []
    for name, row in tqdm(grids.ROWS.items(), "4-bit formats", unit="format"):
        about = {"name": name, "bits": row.bits, "reason": row.missing}
        if row.missing:
            rows.append(about)
            continue
        for seed, pixel_values in enumerate(draws if row.compensates else [None]):
            found = _logits(_rounded(copy.deepcopy(full), row, pixel_values), subject)
            own = about | ({"seed": seed, "pictures": len(pixel_values)} if row.compensates else {})
            rows.append(own | _judged(found, expected, subject.labels.numpy(), study.settings.seed))
    return study.write("formats", pd.DataFrame(rows))


def _draws(study: Study, subject: Subject) -> list[torch.Tensor]:
    """SEEDS random draws of training pictures, normalised (m, 3, h, w); they may overlap."""
    settings, train = study.settings, sources.load(study.settings).splits["train"]
    count, found = min(settings.calibration_pictures, len(train)), []
    for seed in range(SEEDS):
        chosen = np.random.default_rng([settings.seed, seed]).choice(len(train), count, replace=False)
        read = decode.decode([train[at] for at in chosen], subject.loaded.preprocess, workers=settings.workers)
        found.append(subject.loaded.preprocess.normalise(read.pixels))
    return found


@torch.no_grad()
def _rounded(model: nn.Module, row: grids.Row, pixel_values: torch.Tensor | None) -> nn.Module:
    """`model` in FP32 with the linears of its encoder rounded, in place."""
    if row.compensates:
        calibrate.in_sequence(model, pixel_values, lambda names, weight, gram: row.round(weight, gram))
    for linear in plan.linears(model).values() if not row.compensates else ():
        linear.weight.copy_(row.round(linear.weight, None))
    return model


def _logits(model: nn.Module, subject: Subject) -> np.ndarray:
    loaded = replace(subject.loaded, model=model, dtype=torch.float32)
    return engine.logits(engine.Engine(loaded), subject.pixels, 64).numpy()


def _judged(found: np.ndarray, expected: np.ndarray, labels: np.ndarray, seed: int) -> dict[str, float]:
    kl = stats.paired_bootstrap(stats.kl_divergence(expected, found), seed=seed)
    row = stats.columns("kl", kl) | stats.columns("top1", stats.proportion(stats.topk_right(found, labels)))
    return row | {"flips": stats.flips(expected.argmax(1), found.argmax(1))}


def compared(frame: pd.DataFrame) -> Markdown:
    """Which formats have the lowest and the highest KL, and what calibration of NF4 gains over all draws."""
    ran = frame[frame["reason"] == ""]
    best, worst = ran.loc[ran["kl"].idxmin()], ran.loc[ran["kl"].idxmax()]
    least = " and ".join(dict.fromkeys(ran.loc[ran["kl_low"] <= best["kl_high"], "name"]))
    overlap = " (their intervals overlap)" if least != best["name"] else ""
    plain, own = (ran[ran["name"] == name]["kl"] for name in ("NF4, double quantization", "NF4 calibrated"))
    low, high = (f"{100 * value / plain.iloc[0]:.2g}" for value in (own.min(), own.max()))
    share = f"{low} %" if low == high else f"{low} to {high} %"
    return Markdown(
        f"**Lowest KL: {least}**{overlap}; highest: {worst['name']}. Calibrated NF4 has {share} of the KL of "
        f"plain NF4 in the same bytes, over {len(own)} draws of training pictures."
    )
