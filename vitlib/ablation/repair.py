"""What training gives back after quantization, beside what it costs in bytes; see `training.repair`."""

from __future__ import annotations

import pandas as pd

from vitlib.ablation.exchange import Subject
from vitlib.pictures import sources
from vitlib.report.tables import Column
from vitlib.study.records import COLUMNS
from vitlib.study.study import Study
from vitlib.study.variants import FORMATS
from vitlib.training import repair
from vitlib.training.trainer import Examples

NOT_TRAINED = "not at all"
STARTS = {"nf4": tuple(repair.METHODS), "nf4c": ("biases",)}  # what is repaired, and by which methods
REPAIRS = {
    **{
        "start": "quantized as",
        "method": "then trained",
        "seeds": "seeds",
        "bits": Column("bits a weight, tables included", ".2f"),
    },
    "kl": Column("KL (nats), mean of the seeds", ".2g", best="low"),
    ("kl_least", "kl_most"): Column("least and most", ".2g"),
    "top1": Column("Top-1 (%), mean", ".2f", 100, best="high"),
    ("difference_low", "difference_high"): Column("gain in Top-1 over no training, 95 % interval", "+.2f", 100),
}


def repaired(study: Study, subject: Subject) -> pd.DataFrame:
    """A row a quantized checkpoint, method and seed, written to `records/repair.csv`; empty without `repair_epochs`.

    Columns: see `training.repair`. All training pictures are used, for a fixed number of epochs; validation pictures
    only measure.
    """
    settings, loaded = study.settings, subject.loaded
    if not settings.repair_epochs:
        return study.write("repair", pd.DataFrame(columns=COLUMNS["repair"]))
    train = sources.decode_splits(sources.load(settings), ["train"], loaded.preprocess, settings.workers)["train"]
    examples = {"train": Examples.of(train, loaded.labels), "valid": Examples(subject.pixels, subject.labels)}
    found = [repair.repair(study, loaded, start, examples, methods=own) for start, own in STARTS.items()]
    return study.write("repair", pd.concat(found, ignore_index=True))


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a checkpoint and method: means over the seeds, their range, and the widest interval of the gain."""
    names = {"none": NOT_TRAINED} | {method: words for method, (words, *_) in repair.METHODS.items()}
    found = frame.groupby(["start", "method"], sort=False).agg(
        seeds=("seed", "size"), bits=("bits", "first"), kl=("logit_kl", "mean"), kl_least=("logit_kl", "min"),
        kl_most=("logit_kl", "max"), top1=("top1", "mean"), difference_low=("difference_low", "min"),
        difference_high=("difference_high", "max"),
    )  # fmt: skip
    found = found.reset_index().assign(method=lambda rows: rows["method"].map(names))
    found["start"] = [FORMATS[start].label for start in found["start"]]
    found.loc[found["method"] == NOT_TRAINED, ["difference_low", "difference_high"]] = float("nan")
    found.attrs["record"] = "records/repair.csv"
    return found


def gain(frame: pd.DataFrame) -> str:
    """What training gives NF4, beside what calibration gives it without; '' where nothing was trained."""
    if frame.empty:
        return ""
    rows = summary(frame).set_index("start")
    own, calibrated = (rows.loc[[FORMATS[start].label]].set_index("method") for start in STARTS)
    best, name = own["kl"].drop(NOT_TRAINED).min(), own["kl"].drop(NOT_TRAINED).idxmin()
    also = calibrated.drop(NOT_TRAINED).iloc[0]
    return (
        f"Training after quantization brings the KL of NF4 from {own.loc[NOT_TRAINED, 'kl']:.2g} to {best:.2g} at best "
        f"({name}: mean of {own.loc[name, 'seeds']} seeds, {own.loc[name, 'bits']:.2f} bits a weight); calibration, "
        f"which trains nothing, to {calibrated.loc[NOT_TRAINED, 'kl']:.2g}. Calibrated NF4 with {also.name} has "
        f"{also['kl_least']:.2g} to {also['kl_most']:.2g}."
    )
