"""Notebook 4: classify a folder of pictures."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from vitlib.network import attention, checkpoint, stream, verify
from vitlib.network.engine import Engine
from vitlib.pictures import sources
from vitlib.pictures.decode import Picture
from vitlib.report.tables import Markdown
from vitlib.study import files, records, variants
from vitlib.study.study import Study
from vitlib.study.variants import Variant

TOP = 5
PREDICTIONS = {"file": "file", "status": "status", "label_name": "class"}
PREDICTIONS |= {f"guess_{rank}": f"prediction {rank}" for rank in (1, 2, 3)} | {"reason": "reason"}


class OtherPictures(ValueError):
    """A study that has predictions of other pictures; the message says what to do."""


@dataclass
class Predictor:
    """A verified variant, ready to classify, and the reason why it was chosen."""

    variant: Variant
    engine: Engine
    why: str

    def describe(self) -> pd.DataFrame:
        """What was loaded: variant, device, classes, size of the pictures, and the weights."""
        loaded = self.engine.loaded
        found = verify.evidence(loaded.model)
        row = {"variant": self.variant.name, "device": loaded.device.type, "classes": len(loaded.labels.names)}
        row |= {"pixels": " × ".join(map(str, loaded.preprocess.side)), "weights (MB)": loaded.weights_mb}
        row["encoder linears"] = ", ".join(f"{count} {kind}" for kind, count in found["encoder_linears"].items())
        return pd.DataFrame([row | {"attention": found["attention"]}])

    def reason(self) -> Markdown:
        """Which variant is used, and why."""
        return Markdown(f"**{self.variant.label}** is used: {self.why}.")


def open(namespace: dict[str, object]) -> Study:
    """The study of the notebook's parameters (call it with `globals()`). ParameterError where pictures are missing.

    OtherPictures where `pictures` names a folder and the study has predictions of other pictures, which its page shows.
    """
    study = Study.open(namespace)
    settings = study.settings
    if not settings.pictures:
        return study
    known = study.read_json("inference").get("source") if study.has("inference.json") else None
    if study.has("predictions") and known != _source(settings.pictures):
        raise OtherPictures(
            f"study {study.name!r} has predictions of other pictures, which its page shows: set `study` to a new name "
            f"and `checkpoints_of` to {settings.checkpoints_of or study.name!r}, the study whose checkpoints are used"
        )
    return study


def _source(pictures: str) -> str:
    """What a record may say of the folder: a checksum of its name ('' for the study's own pictures)."""
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

    `auto` is the one with the lowest median latency in `records/variants.csv` of those that run here, at the batch size
    nearest to `eval_batch_size`; without such a record it is FP16 with SDPA on a GPU and FP32 with SDPA on a CPU.
    """
    settings = study.settings
    if settings.variant != "auto":
        return variants.find(settings.variant), "the parameter `variant` names it"
    rows = study.read("variants") if study.has("variants") else pd.DataFrame(columns=["variant", "status"])
    rows = rows[rows["status"] == "ok"].reindex(columns=["variant", "batch", "latency_p50_ms"]).dropna()
    rows = rows[[_runs(name, device) for name in rows["variant"]]]
    if rows.empty:
        default = Variant("fp16" if device.type == "cuda" else "fp32")
        return default, f"notebook 2 has measured no variant that runs here, and it is the default on {device.type}"
    distance = (rows["batch"] - settings.eval_batch_size).abs()
    nearest = rows[distance == distance.min()]
    best = nearest.loc[nearest["latency_p50_ms"].idxmin()]
    return variants.find(best["variant"]), (
        f"it is the fastest of {len(nearest)} variants that notebook 2 measured and that run here, with "
        f"{best['latency_p50_ms']:.3g} ms at batch size {best['batch']:.0f} (the nearest to {settings.eval_batch_size})"
    )


def _runs(name: str, device: torch.device) -> bool:
    try:
        return not attention.not_runnable(variants.find(name), device)
    except ValueError:  # a variant of another version of this project
        return False


def find_pictures(study: Study) -> tuple[list[Picture], list[tuple[str, str]]]:
    """The files to classify, and those that are skipped without opening them (file, reason).

    `pictures` may be flat, hold class folders, or both. Without it they are the data's test split, else its validation
    split.
    """
    settings = study.settings
    if settings.pictures:
        found, skipped = sources.pictures_below(files.resolve(settings.pictures), settings.max_megapixels)
        if not (found or skipped):
            raise sources.DataError(f"the folder {settings.pictures!r} holds no picture")
        return found, skipped
    dataset = sources.load(settings)
    split = "test" if dataset.splits.get("test") else "valid"
    return dataset.splits[split], [(file, reason) for file, where, reason in dataset.skipped if where == split]


def predict(
    study: Study, predictor: Predictor, pictures: list[Picture], skipped: list[tuple[str, str]]
) -> tuple[pd.DataFrame, stream.Passed, float]:
    """Classify every picture: `records/predictions.csv` (a row a file), what was read, and images per second.

    Decoding and the network run at the same time (`stream.classify`). The rate covers decoding, resizing, the network
    and copying its results; `records/inference.json` has it with its conditions. It is NaN where no picture can be
    read; the network is not called then.
    """
    settings, start = study.settings, time.perf_counter()
    options = {"batch_size": settings.eval_batch_size, "workers": settings.workers, "decoder": settings.decoder}
    passed = stream.classify(pictures, predictor.engine, **options)
    rate = len(passed.pictures) / (time.perf_counter() - start) or np.nan
    faults = pd.DataFrame([*skipped, *passed.skipped], columns=["file", "reason"]).assign(status="skipped")
    frame = pd.concat([_rows(passed, predictor.engine.loaded.labels), faults], ignore_index=True)
    frame = frame.fillna({"label": "", "label_name": "", "reason": ""}).reindex(columns=records.COLUMNS["predictions"])
    about = {"variant": predictor.variant.name, "device": predictor.engine.loaded.device.type}
    about |= {"decoder": passed.decoder, "decoded_on_device": passed.on_device, "batch": settings.eval_batch_size}
    about |= {"workers": settings.workers, "pictures": len(passed.pictures), "images_per_s": rate}
    study.write_json("inference", about | {"source": _source(settings.pictures)})
    return study.write("predictions", frame), passed, rate


def _rows(passed: stream.Passed, labels: sources.Labels) -> pd.DataFrame:
    best = passed.logits.softmax(dim=1).topk(min(TOP, len(labels.names)), dim=1)
    frame = pd.DataFrame({"file": [one.file for one in passed.pictures], "status": "ok"})
    frame["label"] = pd.Series([one.label for one in passed.pictures], dtype=object)
    frame["label_name"] = frame["label"].map(dict(zip(labels.folders, labels.names, strict=True)))
    for rank, (ids, probabilities) in enumerate(zip(best.indices.T.tolist(), best.values.T.numpy(), strict=True), 1):
        frame[f"id_{rank}"], frame[f"name_{rank}"] = ids, [labels.names[number] for number in ids]
        frame[f"probability_{rank}"] = probabilities
    return frame


def sample(frame: pd.DataFrame, rows: int = 12) -> pd.DataFrame:
    """Rows spread over the files, with the three best names and their probabilities as `guess_1` … `guess_3`."""
    shown = frame.iloc[_chosen(len(frame), rows)].copy()
    for rank in (1, 2, 3):
        pairs = zip(shown[f"name_{rank}"], shown[f"probability_{rank}"], strict=True)
        shown[f"guess_{rank}"] = ["" if pd.isna(p) else f"{name} ({100 * p:.1f} %)" for name, p in pairs]
    return shown


def grid(frame: pd.DataFrame, passed: stream.Passed, count: int) -> dict[str, list]:
    """Pictures spread over the files, for `plots.picture_grid`: uint8 images (h, w, 3), titles, and which are right.

    They are read again, as no pixels are kept.
    """
    chosen = _chosen(len(passed.pictures), count)
    rows = frame.iloc[chosen]  # the readable pictures come first
    found = {"images": [passed.look(position) for position in chosen], "titles": [], "right": []}
    for name, guess, probability in zip(rows["label_name"], rows["name_1"], rows["probability_1"], strict=True):
        right = None if not name else name == guess
        found["titles"].append(f"{guess}\n{100 * probability:.0f} %{f', is {name}' if right is False else ''}")
        found["right"].append(right)
    return found


def _chosen(total: int, count: int) -> list[int]:
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist()


def headline(frame: pd.DataFrame, predictor: Predictor, rate: float, note: str = "") -> Markdown:
    """What the record says, in a few sentences; `note` is what the decoder says about its pixels."""
    loaded, read = predictor.engine.loaded, frame[frame["status"] == "ok"]
    skipped = f" Files skipped, each with its reason: {len(frame) - len(read)}." if len(read) < len(frame) else ""
    if read.empty:
        return Markdown(f"- No picture could be read.{skipped}")
    lines = [
        f"- **{predictor.variant.label}** classified {len(read):,} pictures at {rate:,.0f} images/s on the "
        f"{'GPU' if loaded.device.type == 'cuda' else 'CPU'}, from file to prediction.{skipped}"
    ]
    known = read[read["label"].isin(loaded.labels.folders)]
    if len(known):
        hits = known.filter(regex=r"^id_").eq(known["label"].map(loaded.labels.folders.index), axis=0)
        top1, top5 = 100 * hits["id_1"].mean(), 100 * hits.any(axis=1).mean()
        lines.append(f"- The class of {len(known)} is known: Top-1 **{top1:.2f} %**, Top-5 {top5:.2f} %.")
    return Markdown("\n".join([*lines, f"- {note}"] if note else lines))
