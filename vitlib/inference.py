"""Notebook 4: a folder of pictures in, names and probabilities out."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from vitlib import attention, checkpoint, files, records, sources, stream, variants, verify
from vitlib.decode import Picture
from vitlib.engine import Engine
from vitlib.sources import DataError, Labels
from vitlib.stream import Passed
from vitlib.study import Study
from vitlib.tables import Markdown
from vitlib.variants import Variant

TOP = 5
PREDICTIONS = {
    "file": "file",
    "status": "status",
    "label_name": "class",
    **{f"guess_{rank}": f"guess {rank}" for rank in (1, 2, 3)},
    "reason": "reason",
}


class OtherPictures(ValueError):
    """A study that has predictions of other pictures; the message says what to do."""


@dataclass
class Predictor:
    """A verified variant, ready to classify, and the reason why it was chosen."""

    variant: Variant
    engine: Engine
    why: str

    def describe(self) -> pd.DataFrame:
        """What was loaded: variant, device, classes, size of the pictures, size and classes of the weights."""
        loaded = self.engine.loaded
        found = verify.evidence(loaded.model)
        return pd.DataFrame(
            [
                {
                    "variant": self.variant.name,
                    "device": loaded.device.type,
                    "classes": len(loaded.labels.names),
                    "pixels": " × ".join(map(str, loaded.preprocess.side)),
                    "weights (MB)": loaded.weights_mb,
                    "encoder linears": ", ".join(f"{n} {kind}" for kind, n in found["encoder_linears"].items()),
                    "attention": found["attention"],
                }
            ]
        )

    def reason(self) -> Markdown:
        """Which variant is used, and why."""
        return Markdown(f"**{self.variant.label}** is used: {self.why}.")


def open(namespace: Mapping[str, Any]) -> Study:
    """The study of the notebook's parameters (call it with `globals()`).

    DataError where its pictures are missing. OtherPictures where `pictures` names a folder and the study has
    predictions of other pictures: they belong to a page that shows them.
    """
    study = Study.open(namespace)
    settings = study.settings
    if not settings.pictures:
        sources.check_source(settings)
        return study
    _folder(settings.pictures)
    if study.has("predictions"):
        known = study.read_json("inference").get("source", "") if study.has("inference.json") else ""
        if known != _source(settings.pictures):
            raise OtherPictures(
                f"study {study.name!r} has predictions of other pictures, which its page shows: set `study` to a new "
                f"name and `checkpoints_of` to {settings.checkpoints_of or study.name!r}, the study whose checkpoints "
                "are used"
            )
    return study


def _folder(pictures: str) -> Path:
    folder = files.resolve(pictures)
    if not folder.is_dir():
        raise DataError(f"there is no folder of pictures {pictures!r} (looked from the project's root)")
    return folder


def _source(pictures: str) -> str:
    """What a record may hold of the folder: a checksum of its name ('' for the study's own pictures)."""
    return hashlib.sha256(pictures.encode()).hexdigest() if pictures else ""


def load(study: Study) -> Predictor:
    """The variant of the parameter set, with the checkpoints of `checkpoints_of` or of the study itself."""
    checkpoint.quiet_libraries()
    settings = study.settings
    origin = Study.of(settings.model_copy(update={"study": settings.checkpoints_of or study.name}))
    device = checkpoint.pick_device(settings.device)
    variant, why = choose(origin, device)
    loaded = checkpoint.load(origin.checkpoints, variant, device)
    return Predictor(variant, Engine(loaded, variant.execution, (settings.eval_batch_size,)), why)


def choose(study: Study, device: torch.device) -> tuple[Variant, str]:
    """The variant to use, and why.

    `auto` is the one with the lowest median latency in `records/variants.csv`, among those that can run here, at the
    batch size nearest to `eval_batch_size`; without such a record it is FP16 with SDPA on a GPU and FP32 on a CPU.
    """
    settings = study.settings
    if settings.variant != "auto":
        return variants.find(settings.variant), "the parameter `variant` names it"
    rows = study.read("variants") if study.has("variants") else pd.DataFrame(columns=["variant", "status", "batch"])
    rows = rows[rows["status"] == "ok"].reindex(columns=["variant", "batch", "latency_p50_ms"]).dropna()
    rows = rows[[_runs(name, device) for name in rows["variant"]]]
    if rows.empty:
        default = Variant("fp16" if device.type == "cuda" else "fp32")
        return default, f"notebook 2 has measured no variant that runs here, and it is the default on {device.type}"
    distance = (rows["batch"] - settings.eval_batch_size).abs()
    nearest = rows[distance == distance.min()]
    best = nearest.loc[nearest["latency_p50_ms"].idxmin()]
    return variants.find(best["variant"]), (
        f"the fastest of {len(nearest)} variants that notebook 2 measured and that run here, with "
        f"{best['latency_p50_ms']:.3g} ms at batch size {best['batch']:.0f} (the nearest to {settings.eval_batch_size})"
    )


def _runs(name: str, device: torch.device) -> bool:
    try:
        return not attention.not_runnable(variants.find(name), device)
    except ValueError:  # a variant of another version of this project
        return False


def find_pictures(study: Study) -> tuple[list[Picture], list[tuple[str, str]]]:
    """The files to classify, and those that are skipped without opening them (file, reason).

    A folder may be flat, hold class folders, or both. Without `pictures` it is the data's test split, else its
    validation split.
    """
    settings = study.settings
    if not settings.pictures:
        dataset = sources.load(settings)
        split = "test" if dataset.splits.get("test") else "valid"
        skipped = [(file, reason) for file, where, reason in dataset.skipped if where == split]
        return dataset.splits[split], skipped
    pictures, skipped = sources.pictures_below(_folder(settings.pictures), settings.max_megapixels)
    if not (pictures or skipped):
        raise DataError(f"the folder {settings.pictures!r} holds no picture")
    return pictures, skipped


def tensor_of(predictor: Predictor, picture: Picture) -> torch.Tensor:
    """One picture as the network takes it: (1, 3, h, w), resized and normalised, on its device."""
    loaded = predictor.engine.loaded
    pixels = loaded.preprocess.resize(picture.open())[None].to(loaded.device)
    return loaded.preprocess.normalise(pixels, loaded.dtype)


def predict(
    study: Study, predictor: Predictor, pictures: list[Picture], skipped: list[tuple[str, str]]
) -> tuple[pd.DataFrame, Passed, float]:
    """Classify every picture: `records/predictions.csv` (a row a file), what was read, and images per second.

    Decoding and the network run at the same time (`stream.classify`). The rate covers decoding, resizing, the network
    and its results, and is in `records/inference.json` with its conditions; it is NaN where no picture can be read, and
    the network is not called then. A label that the checkpoint does not know is in the table and does not count for
    accuracy.
    """
    settings, start = study.settings, time.perf_counter()
    passed = stream.classify(
        pictures,
        predictor.engine,
        batch_size=settings.eval_batch_size,
        workers=settings.workers,
        decoder=settings.decoder,
    )
    rate = len(passed.pictures) / (time.perf_counter() - start) or np.nan
    frame = _rows(passed, predictor.engine.loaded.labels)
    lost = [(file, reason) for file, reason in (*skipped, *passed.skipped)]
    faults = pd.DataFrame(lost, columns=["file", "reason"]).assign(status="skipped", label="", label_name="")
    filled = [part for part in (frame, faults) if len(part)] or [frame]
    frame = pd.concat(filled, ignore_index=True).reindex(columns=records.COLUMNS["predictions"])
    about = {
        "variant": predictor.variant.name,
        "device": predictor.engine.loaded.device.type,
        "decoder": passed.decoder,
        "decoded_on_device": passed.on_device,
        "batch": settings.eval_batch_size,
        "workers": settings.workers,
        "pictures": len(passed.pictures),
        "images_per_s": rate,
        "source": _source(settings.pictures),
    }
    study.write_json("inference", about)
    return study.write("predictions", frame), passed, rate


def _rows(passed: Passed, labels: Labels) -> pd.DataFrame:
    best = passed.logits.softmax(dim=1).topk(min(TOP, passed.logits.shape[1]), dim=1)
    names = dict(zip(labels.folders, labels.names, strict=True))
    rows = []
    for picture, ids, probabilities in zip(passed.pictures, best.indices.tolist(), best.values.tolist(), strict=True):
        row = {"file": picture.file, "status": "ok", "reason": "", "label": picture.label or ""}
        row["label_name"] = names.get(picture.label, "")
        for rank in range(TOP):
            number = ids[rank] if rank < len(ids) else None
            row[f"id_{rank + 1}"] = number
            row[f"name_{rank + 1}"] = "" if number is None else labels.names[number]
            row[f"probability_{rank + 1}"] = np.nan if number is None else probabilities[rank]
        rows.append(row)
    return pd.DataFrame(rows, columns=records.COLUMNS["predictions"])


def accuracy(frame: pd.DataFrame, predictor: Predictor) -> pd.Series:
    """Pictures, labelled ones, Top-1 and Top-5 over those whose label the checkpoint knows (missing without any)."""
    labels = predictor.engine.loaded.labels
    ids = {folder: number for number, folder in enumerate(labels.folders)}
    known = frame[(frame["status"] == "ok") & frame["label"].isin(ids)]
    truth = known["label"].map(ids)
    hits = known[[f"id_{rank}" for rank in range(1, TOP + 1)]].eq(truth, axis=0)
    return pd.Series(
        {
            "pictures": int((frame["status"] == "ok").sum()),
            "skipped": int((frame["status"] != "ok").sum()),
            "labelled": len(known),
            "top1": hits["id_1"].mean() if len(known) else np.nan,
            "top5": hits.any(axis=1).mean() if len(known) else np.nan,
        },
        name=predictor.variant.name,
    )


def sample(frame: pd.DataFrame, rows: int = 12) -> pd.DataFrame:
    """Rows spread over the files, with the three best names and their probabilities as `guess_1` … `guess_3`."""
    shown = frame.iloc[_chosen(len(frame), rows)].copy()
    for rank in (1, 2, 3):
        pairs = zip(shown[f"name_{rank}"], shown[f"probability_{rank}"], strict=True)
        shown[f"guess_{rank}"] = ["" if pd.isna(p) else f"{name} ({100 * p:.1f} %)" for name, p in pairs]
    return shown


def examples(frame: pd.DataFrame, passed: Passed, count: int) -> tuple[list[np.ndarray], list[str]]:
    """Pictures (h, w, 3) spread evenly over the files, as the network sees them, and titles with the best name.

    They are read again, as no pixels are kept. Where none could be read, one empty picture says so: a figure needs
    something to show.
    """
    if not passed.pictures:
        return [np.full((*passed.preprocess.side, 3), 255, dtype=np.uint8)], ["no picture could be read"]
    chosen = _chosen(len(passed.pictures), count)
    titles = []
    for position in chosen:
        guess, right = frame["name_1"][position], frame["label_name"][position]
        text = f"{guess}\n{100 * frame['probability_1'][position]:.0f} %"
        titles.append(text if right in ("", guess) else f"{text}, is {right}")
    return [passed.look(position) for position in chosen], titles


def marks(frame: pd.DataFrame, count: int) -> list[bool | None]:
    """Whether the best name of each of `examples` is right; None where the right name is not known."""
    usable = frame[frame["status"] == "ok"]
    chosen = usable.iloc[_chosen(len(usable), count)]
    pairs = zip(chosen["label_name"], chosen["name_1"], strict=True)
    return [None if not name else name == guess for name, guess in pairs]


def _chosen(total: int, count: int) -> list[int]:
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist()


def headline(frame: pd.DataFrame, predictor: Predictor, rate: float, note: str = "") -> Markdown:
    """What the record says, in a few sentences; `note` is what the decoder says about its pixels."""
    found = accuracy(frame, predictor)
    skipped = f" {found['skipped']:.0f} files were skipped, each with its reason." if found["skipped"] else ""
    if not found["pictures"]:
        return Markdown(f"- No picture could be read.{skipped}")
    lines = [
        f"- {found['pictures']:.0f} pictures were classified by **{predictor.variant.label}** on "
        f"{predictor.engine.loaded.device.type}, {rate:,.0f} images/s from file to answer.{skipped}"
    ]
    if found["labelled"]:
        lines.append(
            f"- {found['labelled']:.0f} of them have a known class: Top-1 **{100 * found['top1']:.2f} %**, "
            f"Top-5 {100 * found['top5']:.2f} %."
        )
    else:
        lines.append("- None of them has a known class, so there is no accuracy to report.")
    return Markdown("\n".join([*lines, f"- {note}"] if note else lines))
