"""The sections of notebook 4: a folder of pictures in, names and probabilities out. Level 3."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from vitlib import attention, checkpoint, data, files, pipeline, records, verify
from vitlib.data import DataError, Picture
from vitlib.engine import Engine
from vitlib.params import Parameters
from vitlib.pipeline import Passed
from vitlib.variants import VARIANTS, Variant, find

TOP = 5


@dataclass
class Predictor:
    """A verified variant, ready to classify."""

    variant: Variant
    engine: Engine

    def describe(self) -> pd.DataFrame:
        """What was asked and what really is there."""
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


def load(settings: Parameters) -> Predictor:
    """The variant of the parameter set; `auto` is NF4 with the attention that the study measured to be fastest."""
    checkpoint.quiet_libraries()
    device = checkpoint.pick_device(settings.device)
    variant = automatic(settings, device) if settings.variant == "auto" else find(settings.variant)
    loaded = checkpoint.load(files.study_folder(settings.study) / "checkpoints", variant, device)
    return Predictor(variant, Engine(loaded, variant.execution, (settings.eval_batch_size,)))


def automatic(settings: Parameters, device: torch.device) -> Variant:
    """NF4 with the attention of the lowest median latency in `records/variants.csv`, among the rows that can run here.

    Compared are eager rows at the batch size nearest to `eval_batch_size`. Without such a record, with what
    `attention.best` names.
    """
    try:
        table = records.read_table(files.study_folder(settings.study) / "records" / "variants.csv")
    except (records.MissingRecord, ValueError):
        return Variant("nf4", attention.best(device))
    rows = table[(table["weights"] == "nf4") & (table["execution"] == "eager") & (table["status"] == "ok")]
    rows = rows.dropna(subset=["latency_p50_ms"])
    runs = [name in VARIANTS and not attention.not_runnable(VARIANTS[name], device) for name in rows["variant"]]
    rows = rows[np.array(runs, dtype=bool)]
    if rows.empty:
        return Variant("nf4", attention.best(device))
    distance = (rows["batch"] - settings.eval_batch_size).abs()
    nearest = rows[distance == distance.min()]
    return find(nearest.loc[nearest["latency_p50_ms"].idxmin(), "variant"])


def find_pictures(settings: Parameters) -> tuple[list[Picture], list[tuple[str, str]]]:
    """The pictures to classify, and what in their folder is none (file, reason).

    A folder may be flat, hold class folders, or both. Without `pictures` it is the data's test split, else its
    validation split.
    """
    if not settings.pictures:
        dataset = data.load(settings)
        split = "test" if dataset.splits.get("test") else "valid"
        skipped = [(file, reason) for file, where, reason in dataset.skipped if where == split]
        return dataset.splits[split], skipped
    folder = files.resolve(settings.pictures)
    if not folder.is_dir():
        raise DataError(f"there is no folder of pictures {settings.pictures!r} (looked from the project's root)")
    pictures, skipped = [], []
    for path, reason in sorted(_walk(folder)):
        if reason := reason or data.not_a_picture(path):
            skipped.append((data.shown(path, folder), reason))
        else:
            label = None if path.parent == folder else path.parent.name
            pictures.append(data.picture_of(path, folder, label, settings.max_megapixels))
    if not (pictures or skipped):
        raise DataError(f"the folder {settings.pictures!r} holds no picture")
    return pictures, skipped


def _walk(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every file below a folder with '', and every folder that is left out with the reason.

    Linked folders are followed, after all others, so that a folder that is reached twice keeps its own name.
    """
    seen, folders, links = set(), [folder], []
    while folders or links:
        here = folders.pop() if folders else links.pop(0)
        if here != folder and here.name.startswith("."):
            yield here, "hidden folder"
        elif (real := os.path.realpath(here)) in seen:  # a link upwards would never end
            yield here, "a link to a folder that is listed already"
        else:
            seen.add(real)
            try:
                entries = sorted(here.iterdir())
            except OSError as error:
                yield here, f"cannot be read: {error.strerror}"
                continue
            below = [entry for entry in entries if os.path.isdir(entry)]  # False, not an error, where it is forbidden
            folders += [entry for entry in below if not entry.is_symlink()]
            links += [entry for entry in below if entry.is_symlink()]
            yield from ((entry, "") for entry in entries if entry not in below)


def predict(
    predictor: Predictor, pictures: list[Picture], skipped: list[tuple[str, str]], settings: Parameters
) -> tuple[pd.DataFrame, Passed, float]:
    """Classify every picture: `records/predictions.csv` (a row a file), what was passed, and images per second.

    Decoding and the network run at the same time (`pipeline.classify`). The rate covers decoding, resizing, the network
    and its results; it is NaN where no picture can be read, and the network is not called then. A label that the
    checkpoint does not know stands in the table and does not count for accuracy.
    """
    start = time.perf_counter()
    passed = pipeline.classify(
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
    records.write_table(frame, files.study_folder(settings.study) / "records" / "predictions.csv")
    return frame, passed, rate


def _rows(passed: Passed, labels: data.Labels) -> pd.DataFrame:
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


def readable(frame: pd.DataFrame, rows: int = 12) -> pd.DataFrame:
    """Rows spread over the files: file, status, right name, the three best names with their probabilities."""
    frame = frame.iloc[_chosen(len(frame), rows)]
    shown = frame[["file", "status", "label_name"]].copy()
    for rank in (1, 2, 3):
        pairs = zip(frame[f"name_{rank}"], frame[f"probability_{rank}"], strict=True)
        shown[f"guess {rank}"] = ["" if pd.isna(p) else f"{name} ({100 * p:.1f} %)" for name, p in pairs]
    shown["reason"] = frame["reason"]
    return shown


def caption(frame: pd.DataFrame, rows: int = 12) -> str:
    """How much of the predictions `readable` shows, and where the rest is (Markdown)."""
    return (
        f"*{min(rows, len(frame)):,} of {len(frame):,} rows, with the three best names; all rows, with {TOP}, are in "
        "`records/predictions.csv`.*"
    )


def examples(frame: pd.DataFrame, passed: Passed, count: int) -> tuple[list[np.ndarray], list[str]]:
    """Pictures (h, w, 3) spread evenly over the files, as the network sees them, and titles with the best name.

    They are read anew, as a pass keeps no pixels. One empty picture that says so where none could be read: a figure
    needs something to show.
    """
    if not passed.pictures:
        return [np.full((*passed.preprocess.side, 3), 255, dtype=np.uint8)], ["no picture could be read"]
    chosen = _chosen(len(passed.pictures), count)
    titles = [f"{frame['name_1'][i]}\n{100 * frame['probability_1'][i]:.0f} %" for i in chosen]
    return [passed.look(i) for i in chosen], titles


def marks(frame: pd.DataFrame, count: int) -> list[bool | None]:
    """Whether the best name of each of `examples` is right; None where the right name is not known."""
    usable = frame[frame["status"] == "ok"]
    chosen = usable.iloc[_chosen(len(usable), count)]
    pairs = zip(chosen["label_name"], chosen["name_1"], strict=True)
    return [None if not name else name == guess for name, guess in pairs]


def _chosen(total: int, count: int) -> list[int]:
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist()


def headline(frame: pd.DataFrame, predictor: Predictor, rate: float, note: str = "") -> str:
    """What the record says, in a few sentences (Markdown); `note` is what the pass says about its pixels."""
    found = accuracy(frame, predictor)
    if not found["pictures"]:
        return f"- No picture could be read; {found['skipped']:.0f} files were skipped, each with its reason."
    lines = [
        f"- {found['pictures']:.0f} pictures were classified by **{predictor.variant.name}** on "
        f"{predictor.engine.loaded.device.type}, {rate:,.0f} images per second from file to answer."
        + (f" {found['skipped']:.0f} files were skipped, each with its reason." if found["skipped"] else "")
    ]
    if found["labelled"]:
        lines.append(
            f"- {found['labelled']:.0f} of them have a known class: Top-1 **{100 * found['top1']:.2f} %**, "
            f"Top-5 {100 * found['top5']:.2f} %."
        )
    else:
        lines.append("- None of them has a known class, so there is no accuracy to report.")
    if note:
        lines.append(f"- {note}")
    return "\n".join(lines)
