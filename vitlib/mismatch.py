"""The original study's preprocessing mistake, made again on a checkpoint of this study. Level 3.

The original trained with a plain resize and the checkpoint's normalisation, and evaluated with a centre crop from a
larger picture and ImageNet's. Nothing else in this project can do that: everywhere else preprocessing comes with the
checkpoint.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from vitlib import claims, engine, files, models, preprocess, records, sources, stats
from vitlib.params import Parameters
from vitlib.preprocess import Preprocess
from vitlib.sources import Dataset
from vitlib.variants import Variant

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
OWN, ORIGINAL = "its own", "the original's"
WEIGHTS = ("fp32", "nf4", "int8")  # the first is what the others are compared with
BAD_RESIZE = 256 / 224  # the shorter side goes to this many times the crop's side


def _crops(own: Preprocess) -> Preprocess:
    """The checkpoint's preprocessing but for the shape: shorter side to 256/224 of the crop's, centre crop."""
    height, width = own.side
    changed = {
        "size": {"shortest_edge": round(min(height, width) * BAD_RESIZE)},
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
    }
    return Preprocess(type(own.processor)(**own.describe() | changed))


def _normalises(own: Preprocess) -> Preprocess:
    """The checkpoint's preprocessing but for mean and standard deviation, which are those of ImageNet's pictures."""
    return Preprocess(type(own.processor)(**own.describe() | {"do_normalize": True} | IMAGENET))


def preprocessings(own: Preprocess) -> dict[str, Preprocess]:
    """The checkpoint's own, the original's mismatched one, and the two halves of that mistake."""
    return {
        OWN: own,
        ORIGINAL: _normalises(_crops(own)),
        "only the crop": _crops(own),
        "only the normalisation": _normalises(own),
    }


def mismatched(settings: Parameters, dataset: Dataset) -> pd.DataFrame:
    """The merged checkpoint in fp32 on the validation split, prepared rightly and wrongly, a row each.

    The quantized checkpoints that run here follow, with their own preprocessing and the original's. Columns:
    preprocessing, weights, n, right, top1 with its Wilson bounds, top5; agreement with the same weights' own
    preprocessing and the paired difference of top1 to it with its bounds; and `from_fp32`, the paired difference to
    fp32 weights with the same preprocessing. Written to `records/preprocessing.csv`.
    """
    models.quiet_libraries()
    checkpoints, device = files.study_folder(settings.study) / "checkpoints", models.pick_device(settings.device)
    decoded, found, rows = {}, {}, []
    for weights in WEIGHTS:
        loaded = _loaded(checkpoints, weights, device)
        if loaded is None:
            continue
        loaded.labels.check(dataset, "valid")
        for name, pre in preprocessings(loaded.preprocess).items():
            if weights != WEIGHTS[0] and name not in (OWN, ORIGINAL):
                continue
            shape = str(pre.describe()["size"])
            if shape not in decoded:  # normalising comes after decoding, so two of the four share their pictures
                decoded[shape] = sources.decode_splits(dataset, ["valid"], pre, settings.workers)["valid"]
            runner = engine.Engine(models.Loaded(**{**vars(loaded), "preprocess": pre}))
            found[weights, name] = engine.logits(runner, decoded[shape].pixels, settings.eval_batch_size).numpy()
            labels = loaded.labels.ids(decoded[shape].pictures).numpy()
            rows.append(_preprocessing_row(weights, name, labels, found))
    frame = pd.DataFrame(rows)
    records.write_table(frame, files.study_folder(settings.study) / "records" / "preprocessing.csv")
    return frame


def _loaded(checkpoints: Path, weights: str, device: torch.device) -> models.Loaded | None:
    """The checkpoint with these weights; None where a quantized one is missing or cannot run here. fp32 must run."""
    variant = Variant(weights)
    if variant.quantized and not (checkpoints / variant.checkpoint).is_dir():
        return None
    try:
        return models.load(checkpoints, variant, device)
    except models.NotRun:
        if not variant.quantized:
            raise
        return None


def readable(costs: pd.DataFrame) -> pd.DataFrame:
    """The table of `mismatched` for a report: percentages, and the differences in points with their bounds."""

    def bounds(column: str) -> list[str]:
        pairs = zip(costs[f"{column}_low"], costs[f"{column}_high"], strict=True)
        return [f"{100 * low:+.1f} … {100 * high:+.1f}" for low, high in pairs]

    return pd.DataFrame(
        {
            "preprocessing": costs["preprocessing"],
            "weights": costs["weights"],
            "right": costs["right"],
            "of": costs["n"],
            "Top-1 (%)": 100 * costs["top1"],
            "Top-5 (%)": 100 * costs["top5"],
            "same answer (%)": 100 * costs["agreement"],
            "from its own (points)": 100 * costs["difference"],
            "its bounds": bounds("difference"),
            "from fp32 (points)": 100 * costs["from_fp32"],
            "bounds of that": bounds("from_fp32"),
        }
    )


def _preprocessing_row(
    weights: str, name: str, labels: np.ndarray, found: dict[tuple[str, str], np.ndarray]
) -> dict[str, Any]:
    """The row of the outputs `found[weights, name]`, compared with those of its own preprocessing and of fp32."""
    logits, own = found[weights, name], found[weights, OWN]
    right, right_own, right_fp32 = (
        stats.topk_right(values, labels) for values in (logits, own, found[WEIGHTS[0], name])
    )
    difference, quantized = stats.paired_difference(right_own, right), stats.paired_difference(right_fp32, right)
    low, high = stats.wilson(int(right.sum()), len(right))
    return {
        "preprocessing": name,
        "weights": weights,
        "n": len(right),
        "right": int(right.sum()),
        "top1": right.mean(),
        "top1_low": low,
        "top1_high": high,
        "top5": stats.topk_accuracy(logits, labels, 5),
        "agreement": (logits.argmax(axis=1) == own.argmax(axis=1)).mean(),
        "difference": difference.estimate,
        "difference_low": difference.low,
        "difference_high": difference.high,
        "from_fp32": quantized.estimate,
        "from_fp32_low": quantized.low,
        "from_fp32_high": quantized.high,
    }


def looks(settings: Parameters, dataset: Dataset, count: int = 1) -> tuple[list[np.ndarray], list[str]]:
    """Validation pictures as the network takes them: read with the normalisation that it was trained with.

    uint8 pictures (h, w, 3), a row for each of `count` pictures, and their titles.
    """
    own = preprocess.load(files.study_folder(settings.study) / "checkpoints" / "merged")
    images, titles = [], []
    for picture in sources.evenly(dataset.splits["valid"], count):
        for name, pre in preprocessings(own).items():
            images.append(_as_read(pre.normalise(pre.resize(picture.open())[None])[0], own))
            titles.append(name)
    return images, titles


def _as_read(pixel_values: torch.Tensor, own: Preprocess) -> np.ndarray:
    """Normalised values (3, h, w) turned back into a picture by undoing `own`'s normalisation."""
    mean, std = (np.array(getattr(own.processor, name)).reshape(3, 1, 1) for name in ("image_mean", "image_std"))
    values = pixel_values.numpy() * std + mean
    return (255 * values.clip(0, 1)).round().astype(np.uint8).transpose(1, 2, 0)


def headline(frame: pd.DataFrame) -> str:
    """What wrong preprocessing costs this checkpoint, and how much of the original's difference that is (Markdown)."""
    rows = frame[frame["weights"] == WEIGHTS[0]].set_index("preprocessing")
    own, lines = rows.loc[OWN], []
    for name, row in rows.drop(index=OWN).iterrows():
        lines.append(
            f"- **{name}**: Top-1 {100 * row['top1']:.2f} % instead of {100 * own['top1']:.2f} %, "
            f"{_points(row, 'difference')}; {100 * row['agreement']:.1f} % of the answers stay."
        )
    lines.append(_reproduced(100 * rows.loc[ORIGINAL, "difference"]))
    lines += [_quantized(frame, weights) for weights in WEIGHTS[1:]]
    return "\n".join(lines)


def _points(row: pd.Series, column: str) -> str:
    low, points, high = (100 * row[f"{column}{end}"] for end in ("_low", "", "_high"))
    return f"{points:+.2f} points ({low:+.2f} … {high:+.2f})"


def _reproduced(points: float) -> str:
    """How much of the difference between the original's two baselines the same mistake makes here."""
    apart = claims.own("own-baseline")
    share = "none of that" if points >= 0 else f"{100 * points / apart:.0f} % of that"
    return (
        f"- The original's two baselines lie {apart:+.2f} points apart. The same mistake moves this checkpoint by "
        f"{points:+.2f} points, **{share}**: other weights may lose more by it, and what else separates the two texts "
        "is not known."
    )


def _quantized(frame: pd.DataFrame, weights: str) -> str:
    """What these weights cost against fp32, prepared rightly and wrongly, beside the original's figure."""
    rows = frame[frame["weights"] == weights].set_index("preprocessing")
    known = {claim.id: claim.original for claim in claims.load()}
    said = known[f"slides-{weights}-sdpa-top1"] - known["slides-fp32-sdpa-top1"]
    if rows.empty:
        return f"- **{weights}** with the wrong preprocessing is not tested here (the slides: {said:+.2f} points)."
    return (
        f"- **{weights}** against fp32: {_points(rows.loc[OWN], 'from_fp32')} with its own preprocessing, "
        f"{_points(rows.loc[ORIGINAL], 'from_fp32')} with the original's. The slides, with the wrong one: {said:+.2f}."
    )
