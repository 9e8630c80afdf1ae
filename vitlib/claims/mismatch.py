"""The original study's preprocessing mistake, repeated on a checkpoint of this study.

The original trained with a plain resize and the checkpoint's normalisation, and evaluated with a centre crop from a
larger picture and ImageNet's normalisation. Everywhere else in this project preprocessing comes with the checkpoint.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from vitlib.claims.claim import load
from vitlib.measure import stats
from vitlib.network import checkpoint, engine
from vitlib.pictures import preprocess, sources
from vitlib.pictures.preprocess import IMAGENET, Preprocess
from vitlib.pictures.sources import Dataset
from vitlib.report.tables import Column, Markdown
from vitlib.study.study import Study
from vitlib.study.variants import Variant

OWN, ORIGINAL = "its own", "the original's"
WEIGHTS = ("fp32", "nf4", "int8")  # the first is what the others are compared with
BAD_RESIZE = 256 / 224  # length of the shorter side, as a multiple of the crop's side
MISTAKE = {
    **{"preprocessing": "preprocessing", "weights": "weights", "right": "right", "n": "of"},
    "top1": Column("Top-1 (%)", ".1f", 100),
    ("top1_low", "top1_high"): Column("95 % interval", ".1f", 100),
    "agreement": Column("same class as with its own (%)", ".0f", 100),
    "difference": Column("Top-1 against its own (points)", "+.1f", 100),
    ("difference_low", "difference_high"): Column("95 % interval of that", "+.1f", 100),
    "from_fp32": Column("Top-1 against FP32 (points)", "+.1f", 100),
}


def preprocessings(own: Preprocess) -> dict[str, Preprocess]:
    """The checkpoint's own preprocessing, the original's mismatched one, and the two halves of that mistake."""
    height, width = own.side
    crop = {"size": {"shortest_edge": round(min(height, width) * BAD_RESIZE)}, "do_center_crop": True}
    crop["crop_size"] = {"height": height, "width": width}
    normalisation = {"do_normalize": True, **IMAGENET}
    changes = {ORIGINAL: crop | normalisation, "only the crop": crop, "only the normalisation": normalisation}
    made = {name: Preprocess(type(own.processor)(**own.describe() | change)) for name, change in changes.items()}
    return {OWN: own, **made}


def mistake(study: Study, dataset: Dataset) -> pd.DataFrame:
    """The merged checkpoint in fp32 on the validation split, with the right and the wrong preprocessing, a row each.

    The quantized checkpoints that run here follow, with their own preprocessing and the original's. Columns:
    preprocessing, weights, n, right, top1 with its Wilson interval, top5; agreement and the paired difference of top1
    with its interval, both against the same weights' own preprocessing; and `from_fp32`, the paired difference to fp32
    weights with the same preprocessing. Written to `records/preprocessing.csv`.
    """
    checkpoint.quiet_libraries()
    decoded, found, rows, settings = {}, {}, [], study.settings
    for weights in WEIGHTS:
        loaded = _loaded(study, weights)
        if loaded is None:
            continue
        loaded.labels.check(dataset, "valid")
        for name, pre in preprocessings(loaded.preprocess).items():
            if weights != WEIGHTS[0] and name not in (OWN, ORIGINAL):
                continue
            shape = str(pre.describe()["size"])
            if shape not in decoded:  # decoding does not normalise, so two of the four share their pictures
                decoded[shape] = sources.decode_splits(dataset, ["valid"], pre, settings.workers)["valid"]
            runner, valid = engine.Engine(replace(loaded, preprocess=pre)), decoded[shape]
            found[weights, name] = engine.logits(runner, valid.pixels, settings.eval_batch_size).numpy()
            rows.append(_row(weights, name, loaded.labels.ids(valid.pictures).numpy(), found))
    return study.write("preprocessing", pd.DataFrame(rows))


def _loaded(study: Study, weights: str) -> checkpoint.Loaded | None:
    """The checkpoint with these weights; None where a quantized one is missing or cannot run here. fp32 must run."""
    variant = Variant(weights)
    if variant.quantized and not study.checkpoint(variant.checkpoint).is_dir():
        return None
    try:
        return checkpoint.load(study.checkpoints, variant, checkpoint.pick_device(study.settings.device))
    except checkpoint.NotRun:
        if not variant.quantized:
            raise
        return None


def _row(weights: str, name: str, labels: np.ndarray, found: dict[tuple[str, str], np.ndarray]) -> dict[str, Any]:
    """The row of the outputs `found[weights, name]`, compared with those of its own preprocessing and of fp32."""
    logits, own = found[weights, name], found[weights, OWN]
    right, right_own, right_fp32 = (stats.topk_right(v, labels) for v in (logits, own, found[WEIGHTS[0], name]))
    difference, quantized = stats.paired_difference(right_own, right), stats.paired_difference(right_fp32, right)
    row = {"preprocessing": name, "weights": weights, "n": len(right), "right": int(right.sum())}
    row |= stats.columns("top1", stats.proportion(right)) | {"top5": stats.topk_right(logits, labels, 5).mean()}
    row["agreement"] = (logits.argmax(axis=1) == own.argmax(axis=1)).mean()
    return row | stats.columns("difference", difference) | stats.columns("from_fp32", quantized)


def looks(study: Study, dataset: Dataset, count: int = 1) -> tuple[list[np.ndarray], list[str]]:
    """Validation pictures as the network sees them: values read with the normalisation that it was trained with.

    uint8 pictures (h, w, 3), a row for each of `count` pictures, and their titles.
    """
    own = preprocess.load(study.checkpoint("merged"))
    mean, std = (np.array(getattr(own.processor, name)).reshape(3, 1, 1) for name in ("image_mean", "image_std"))
    images, titles = [], []
    for picture in sources.evenly(dataset.splits["valid"], count):
        for name, pre in preprocessings(own).items():
            values = pre.normalise(pre.resize(picture.open())[None])[0].numpy() * std + mean
            images.append((255 * values.clip(0, 1)).round().astype(np.uint8).transpose(1, 2, 0))
            titles.append({OWN: "prepared as in training", ORIGINAL: "as the original did"}.get(name, name))
    return images, titles


def baselines(frame: pd.DataFrame) -> Markdown:
    """The difference between the original's two baselines, and what the mistake costs the network of this study."""
    claims = load()
    readme, slides = (claims[f"{where}-top1"].original["fp32-sdpa"] for where in ("readme", "slides"))
    change = frame[frame["weights"] == WEIGHTS[0]].set_index("preprocessing").loc[ORIGINAL]
    low, points, high = (100 * change[f"difference{end}"] for end in ("_low", "", "_high"))
    cost = f"changes this network's by {points:+.1f} points ({low:+.1f} … {high:+.1f}): **no significant loss**"
    if high < 0:
        cost = f"costs this network **{-points:.1f} points** ({-high:.1f} … {-low:.1f})"
    return Markdown(
        f"The original's README and its slides give Top-1 of {readme:.1f} % and {slides:.1f} % for the same FP32 "
        f"network: **{readme - slides:.0f} points apart**. The slides' pictures were not prepared as in training; the "
        f"same mistake {cost}."
    )
