"""The original study's preprocessing mistake, made again on a checkpoint of this study. Level 3.

The original trained with a plain resize and the checkpoint's normalisation, and evaluated with a centre crop from a
larger picture and ImageNet's. Nothing else in this project can do that: everywhere else preprocessing comes with the
checkpoint.
"""

from typing import Any

import numpy as np
import pandas as pd
import torch

from vitlib import data, engine, models, preprocess, records, stats
from vitlib.data import Dataset
from vitlib.params import Parameters
from vitlib.preprocess import Preprocess
from vitlib.variants import Variant

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
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
        "its own": own,
        "the original's": _normalises(_crops(own)),
        "only the crop": _crops(own),
        "only the normalisation": _normalises(own),
    }


def mismatched(settings: Parameters, dataset: Dataset) -> pd.DataFrame:
    """The merged checkpoint in fp32 on the validation split, prepared rightly and wrongly, a row each.

    Columns: preprocessing, n, right, top1 with its Wilson bounds, top5, agreement with its own preprocessing, and the
    paired difference of top1 to it with its bounds. Written to `records/preprocessing.csv`.
    """
    models.quiet_libraries()
    checkpoints = records.study_folder(settings.study) / "checkpoints"
    loaded = models.load(checkpoints, Variant("fp32"), models.pick_device(settings.device))
    loaded.labels.check(dataset, "valid")
    rows, own, decoded = [], None, {}
    for name, pre in preprocessings(loaded.preprocess).items():
        shape = str(pre.describe()["size"])
        if shape not in decoded:  # normalising comes after decoding, so two of the four share their pictures
            decoded[shape] = data.decode_splits(dataset, ["valid"], pre, settings.workers)["valid"]
        valid = decoded[shape]
        runner = engine.Engine(models.Loaded(**{**vars(loaded), "preprocess": pre}))
        logits = engine.logits(runner, valid.pixels, settings.eval_batch_size).numpy()
        own = logits if own is None else own
        labels = loaded.labels.ids(valid.pictures).numpy()
        rows.append(_preprocessing_row(name, logits, labels, own))
    frame = pd.DataFrame(rows)
    records.write_table(frame, records.study_folder(settings.study) / "records" / "preprocessing.csv")
    return frame


def readable(costs: pd.DataFrame) -> pd.DataFrame:
    """The table of `mismatched` for a report: percentages, and the difference in points with its bounds."""
    bounds = zip(costs["difference_low"], costs["difference_high"], strict=True)
    return pd.DataFrame(
        {
            "preprocessing": costs["preprocessing"],
            "right": costs["right"],
            "of": costs["n"],
            "Top-1 (%)": 100 * costs["top1"],
            "Top-5 (%)": 100 * costs["top5"],
            "same answer (%)": 100 * costs["agreement"],
            "difference (points)": 100 * costs["difference"],
            "its bounds": [f"{100 * low:+.1f} … {100 * high:+.1f}" for low, high in bounds],
        }
    )


def _preprocessing_row(name: str, logits: np.ndarray, labels: np.ndarray, own: np.ndarray) -> dict[str, Any]:
    right = stats.topk_right(logits, labels)
    difference = stats.paired_difference(stats.topk_right(own, labels), right)
    low, high = stats.wilson(int(right.sum()), len(right))
    return {
        "preprocessing": name,
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
    }


def looks(settings: Parameters, dataset: Dataset, count: int = 1) -> tuple[list[np.ndarray], list[str]]:
    """Validation pictures as the network takes them: read with the normalisation that it was trained with.

    uint8 pictures (h, w, 3), a row for each of `count` pictures, and their titles.
    """
    own = preprocess.load(records.study_folder(settings.study) / "checkpoints" / "merged")
    images, titles = [], []
    for picture in data.evenly(dataset.splits["valid"], count):
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
    """What wrong preprocessing costs this checkpoint, in a sentence (Markdown)."""
    rows = frame.set_index("preprocessing")
    own, lines = rows.iloc[0], []
    for name, row in rows.iloc[1:].iterrows():
        low, points, high = (100 * row[key] for key in ("difference_low", "difference", "difference_high"))
        lines.append(
            f"- **{name}**: Top-1 {100 * row['top1']:.2f} % instead of {100 * own['top1']:.2f} %, {points:+.2f} points "
            f"({low:+.2f} … {high:+.2f}); {100 * row['agreement']:.1f} % of the answers stay."
        )
    return "\n".join(lines)
