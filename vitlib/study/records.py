"""Records: tidy tables and JSON files beside each report, their columns, and how they are written and read.

Every plot and every sentence with a number is made from a record. Nothing written here names the machine or a folder of
it. No torch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vitlib.study.files import atomic_path, short_path

COLUMNS: dict[str, tuple[str, ...]] = {
    "finetune": ("epoch", "train_loss", "valid_loss", "top1", "top5", "epoch_s", "images_per_s", "peak_vram_mb"),
    "recipes": (
        *(
            "recipe",
            "way",
            "learning_rate",
            "n",
            "top1",
            "top1_low",
            "top1_high",
            "train_loss",
            "trainable",
            "images_per_s",
        ),
        *("weights_mb", "gradients_mb", "optimizer_mb", "activations_mb", "peak_mb"),
    ),
    "variants": (
        *("variant", "weights", "attention", "execution", "status", "reason", "model_mb", "disk_mb", "batch"),
        *("latency_mean_ms", "latency_p50_ms", "latency_p95_ms", "latency_p99_ms", "throughput_img_s"),
        *("peak_vram_mb", "cpu_latency_ms", "top1", "top5", "f1_weighted", "agreement_with_baseline"),
        *("logit_kl", "device_time_us", "attention_device_time_us", "attention_kernel", "kernels_per_pass"),
    ),
    "accuracy": (
        *("variant", "n", "right", "top1", "top1_low", "top1_high", "top5", "f1_weighted", "agreement_with_baseline"),
        *("flips", "lost", "gained", "mcnemar_p", "holm_p", "difference", "difference_low", "difference_high"),
        *("bootstrap_low", "bootstrap_high", "logit_kl", "logit_kl_low", "logit_kl_high", "verdict"),
    ),
    "latency": ("variant", "batch", "round", "sample", "latency_ms", "device_ms"),
    "throughput": ("variant", "batch", "round", "throughput_img_s"),
    "roofline": ("variant", "part", "gflop", "mb", "device_time_us", "tflop_s", "gb_s", "floor_us", "share_of_floor"),
    "validity": ("check", "found", "required", "reached"),
    "kernels": ("variant", "batch", "part", "operation", "kernel", "calls", "device_time_us"),
    "ablation": (
        *("bits", "kept", "top1", "top5", "loss", "logit_kl", "logit_kl_low", "logit_kl_high"),
        *("flips", "discordant_pairs", "mcnemar_p", "holm_p"),
    ),
    "sensitivity": (
        *("format", "name", "bits", "block", "linear", "parameters", "kl", "kl_low", "kl_high"),
        *("fisher", "fisher_by_type", "weight_error"),
    ),
    "correlations": ("format", "name", "first", "second", "correlation", "low", "high"),
    "additivity": ("plan", "bits", "predicted", "predicted_pairs", "kl", "kl_low", "kl_high"),
    "plans": (
        *("name", "kind", "format", "bits", "megabytes", "predicted_kl", "kl", "kl_low", "kl_high"),
        *("top1", "top1_low", "top1_high", "difference", "difference_low", "difference_high"),
        *("flips", "rival", "more", "more_low", "more_high"),
    ),
    "formats": ("name", "bits", "reason", "kl", "kl_low", "kl_high", "top1", "top1_low", "top1_high", "flips"),
    "repair": (
        *("start", "method", "seed", "epochs", "bits", "train_loss", "n", "top1", "top1_low", "top1_high"),
        *("difference", "difference_low", "difference_high", "logit_kl", "logit_kl_low", "logit_kl_high", "flips"),
    ),
    "predictions": (
        *("file", "status", "reason", "label", "label_name"),
        *(f"{column}_{rank}" for rank in range(1, 6) for column in ("id", "name", "probability")),
    ),
    "claims": ("id", "subject", "claim", "source", "original", "counts_as", "measured", "verdict", "cause"),
}
"""Columns that each record has at least, in this order; units are in the names."""

NOTEBOOKS: dict[str, str] = {
    **dict.fromkeys(("finetune", "recipes", "base"), "1_finetune"),
    **dict.fromkeys(("variants", "accuracy", "latency", "throughput", "roofline", "validity"), "2_evaluate"),
    **dict.fromkeys(("kernels", "tuning", "environment"), "2_evaluate"),
    **dict.fromkeys(("ablation", "sensitivity", "correlations", "additivity"), "3_ablation"),
    **dict.fromkeys(("plans", "formats", "repair"), "3_ablation"),
    **dict.fromkeys(("predictions", "inference"), "4_inference"),
    "claims": "5_claims",
}
"""The notebook that writes a record, for the message when it is missing."""

# Columns read back as text, so that a class folder "01" or a label "1e3" does not come back as a number.
_TEXT_COLUMNS = (
    *("variant", "weights", "attention", "execution", "status", "reason", "attention_kernel"),
    *("part", "operation", "kernel", "kept", "file", "label", "label_name"),
    *("name_1", "name_2", "name_3", "name_4", "name_5"),
    *("id", "subject", "claim", "source", "original", "counts_as", "measured", "verdict", "cause"),
)

_FORMULA = re.compile(r"'*[=+\-@\t\n＝＋－＠]")  # after apostrophes too, so that they can be told from ours


class MissingRecord(FileNotFoundError):
    """A record that no notebook has written yet; the message names the notebook."""


def write_table(frame: pd.DataFrame, path: Path | str) -> Path:
    """Write a record as CSV, atomically: schema columns first and in order, then any others. Returns the path.

    The schema is COLUMNS[name of the file]; another name has none. Floats keep 9 significant digits, which brings a
    float32 back exactly and leaves counts whole; NaN is an empty field. Text that a spreadsheet would run as a formula
    starts with an apostrophe, and a carriage return is written as \\r; `read_table` undoes both. Text that is not
    Unicode (a file name may be any bytes) becomes a backslash escape.

    Raises ValueError that names the schema columns that are missing, or columns that occur twice.
    """
    path = Path(path)
    schema = COLUMNS.get(path.stem, ())
    _require(path, frame, "give NaN for what was not measured")
    if twice := sorted(set(frame.columns[frame.columns.duplicated()])):
        raise ValueError(f"{path.name} has columns twice: {', '.join(map(str, twice))}")
    ordered = frame[[*schema, *(column for column in frame.columns if column not in schema)]]
    ordered = _each_text(ordered, _guarded).infer_objects()
    with atomic_path(path) as temporary:
        ordered.to_csv(temporary, index=False, encoding="utf-8", float_format="%.9g", lineterminator="\n")
    return path


def read_table(path: Path | str) -> pd.DataFrame:
    """Read a record; an empty field is NaN, names and reasons stay text ("01", "None" and "NA" too).

    Raises MissingRecord with the notebook to run, and ValueError for a file that is empty or of another version.
    """
    path = _existing(path)
    text = dict.fromkeys(_TEXT_COLUMNS, "str")
    try:
        frame = pd.read_csv(path, keep_default_na=False, na_values=[""], dtype=text, encoding="utf-8")
    except pd.errors.EmptyDataError:
        raise ValueError(f"{short_path(path)} is empty: {_advice(path, 'again')}") from None
    _require(path, frame, _advice(path, "again"))
    return _each_text(frame, _unguarded)


def _each_text(frame: pd.DataFrame, change: Callable[[str], str]) -> pd.DataFrame:
    """`frame` with its text changed; dtypes and all other values stay."""
    columns = [name for name in frame if frame[name].dtype.kind == "O"]
    made = {name: [change(cell) if isinstance(cell, str) else cell for cell in frame[name]] for name in columns}
    return frame.assign(**{name: pd.Series(cells, frame.index, frame[name].dtype) for name, cells in made.items()})


def _guarded(cell: str) -> str:
    """Text that no program takes for a formula or for the end of a row."""
    cell = cell.encode("utf-8", "backslashreplace").decode()  # Arrow, which pandas may use, takes Unicode alone
    # The csv module leaves a carriage return unquoted, and readers end the row there.
    cell = re.sub(r"(\\*)(r|\r)", lambda found: found[1] * 2 + ("r" if found[2] == "r" else r"\r"), cell)
    return f"'{cell}" if _FORMULA.match(cell) else cell


def _unguarded(cell: str) -> str:
    """What `_guarded` was given."""
    cell = cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
    return re.sub(r"(\\+)r", lambda found: found[1][: len(found[1]) // 2] + "r\r"[len(found[1]) % 2], cell)


def _require(path: Path, frame: pd.DataFrame, advice: str) -> None:
    missing = [column for column in COLUMNS.get(path.stem, ()) if column not in frame.columns]
    if missing:
        raise ValueError(f"{short_path(path)} lacks the columns {', '.join(missing)}: {advice}")


def write_json(obj: Any, path: Path | str) -> Path:
    """Write JSON, atomically, keys in the order given and NaN or infinity as null; returns the path.

    Numpy values are written as their plain equivalents, a path as its last name only. TypeError for any other object.
    """
    strict = json.loads(json.dumps(obj, default=_plain), parse_constant=lambda _: None)
    with atomic_path(path) as temporary:
        text = json.dumps(strict, indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    return Path(path)


def _plain(value: Any) -> Any:
    """The value in JSON's own types."""
    if isinstance(value, os.PathLike):
        return Path(value).name
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"cannot write a {type(value).__name__} as JSON: convert it to text or numbers first")


def read_json(path: Path | str) -> Any:
    """Read a JSON record. Raises MissingRecord with the notebook to run, ValueError for what is not JSON."""
    path = _existing(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{short_path(path)} is not JSON ({error}): {_advice(path, 'again')}") from None


def _existing(path: Path | str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise MissingRecord(f"{short_path(path)} is missing: {_advice(path, 'first')}")
    return path


def _advice(path: Path, when: str) -> str:
    return f"run {NOTEBOOKS.get(path.stem, 'the notebook that writes it')} {when}"
