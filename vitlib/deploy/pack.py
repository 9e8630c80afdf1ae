"""One archive of a checkpoint, for download or for the Hub: its files, what was measured of it, and a model card.

Unpacked it is a folder that every command takes as a checkpoint, and the content of a repository on the Hub.
"""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from vitlib.deploy import predictor
from vitlib.network import checkpoint, plan
from vitlib.pictures import preprocess
from vitlib.report import tables
from vitlib.report.tables import Column
from vitlib.study import files, origin, records, variants
from vitlib.study.variants import FORMATS, VARIANTS

TEMPLATE = Path(__file__).with_name("card.md")
UNKNOWN = "unknown: nobody has stated one"
HOW = {  # by the name of the checkpoint
    "merged": "Its weights are in FP16, not quantized.",
    "nf4": "The encoder's linear layers are in NF4 with double quantization (bitsandbytes), all else is in FP16.",
    "nf4-calibrated": "The encoder's linear layers are in NF4 with double quantization (bitsandbytes), all else is in "
    "FP16; {pictures} unlabelled training pictures chose the codes by error compensation (GPTQ).",
    "int8": "The encoder's linear layers are in INT8 (LLM.int8() of bitsandbytes), all else is in FP16.",
    "mixed": "A searched plan chose the format of each of the encoder's linear layers ({plan}); all else is in FP16.",
}
MEASURED = {
    "variant": "variant",
    ("top1", "top1_low", "top1_high"): Column("Top-1 (%), 95 % interval", scale=100),
    "n": "pictures",
    "model_mb": Column("weights (MB)", tables.number),
    ("latency_p50_ms", "latency_low_ms", "latency_high_ms"): Column("ms, 95 % interval"),
    "batch": Column("batch size", ".0f"),
    "hardware": "on",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, such as outputs/demo/checkpoints/nf4")
    parser.add_argument("--output", type=Path, metavar="FILE.zip", help="default: <study>-<checkpoint>.zip")
    parser.add_argument("--licence", default="", help="of the weights, such as cc-by-4.0 (default: other, unknown)")
    parser.add_argument("--overwrite", action="store_true", help="replace an archive that exists")


def run(options: argparse.Namespace) -> int:
    checkpoint.quiet_libraries()
    weights = predictor.find(options.checkpoint)
    (kind, folder), *others = weights.folders.items()
    if others:
        raise ValueError(f"{options.checkpoint} has several checkpoints: name one, such as {folder}")
    about = checkpoint.whole(folder)
    if "files" not in about:
        raise checkpoint.CheckpointError(f"{folder.name!r} has no checksums, so nobody knows whether it is whole")
    output = options.output or Path(Path(f"{about.get('study', 'vitlib')}-{kind}.zip").name)
    if output.suffix != ".zip" or not re.fullmatch(files.STUDY_NAME, output.stem):
        raise ValueError(f"{output.name!r} cannot name the archive: use letters, digits, '.', '_' or '-', and .zip")
    if not re.fullmatch(r"[a-z0-9.+-]*", options.licence):
        raise ValueError(f"{options.licence!r} is no licence identifier: use one such as mit or cc-by-4.0")
    if output.exists() and not options.overwrite:
        raise FileExistsError(f"{output} exists: name another --output, or replace it with --overwrite")
    with tempfile.TemporaryDirectory() as place, files.atomic_path(output) as target:
        paths = [folder / name for name in (checkpoint.PROVENANCE, *about["files"])] + [Path(place, "README.md")]
        card(output.stem, kind, folder, about, weights.measured, options.licence).save(paths[-1])
        if len(weights.measured):
            paths.append(records.write_table(weights.measured, Path(place, predictor.MEASURED)))
        _zip(target, output.stem, paths)
    with files.atomic_path(f"{output}.sha256") as target:
        target.write_text(f"{files.checksum(output)}  {output.name}\n", encoding="utf-8")
    print(f"wrote {output} ({output.stat().st_size / 2**20:,.1f} MB) and {output.name}.sha256")
    return 0


def _zip(target: Path, root: str, paths: list[Path]) -> None:
    """Store the files below `root`, sorted, with one date: the same content makes the same archive."""
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(paths, key=lambda path: path.name):
            info = zipfile.ZipInfo(f"{root}/{path.name}")
            info.external_attr, info.create_system, info.file_size = 0o644 << 16, 3, path.stat().st_size
            with path.open("rb") as source, archive.open(info, "w") as entry:
                shutil.copyfileobj(source, entry, 2**20)


def card(
    title: str, kind: str, folder: Path, about: Mapping[str, Any], measured: pd.DataFrame, licence: str
) -> ModelCard:
    """The model card, of `card.md`; what the checkpoint does not say is called unknown."""
    base, source = about.get("origin", {}), about.get("parameters", {}).get("data_source", "")
    hub = source.removeprefix("hub:") if source.startswith("hub:") else None
    data = "drawn flowers" if source == "synthetic" else re.sub(r"[^\w ./-]", "", hub or Path(source).name) or "unknown"
    ran = measured[measured["status"] == "ok"] if len(measured) else measured
    ran = ran[ran["batch"] == ran["batch"].min()] if len(ran) else ran
    header = ModelCardData(
        license=licence or "other",  # of which the Hub wants the name
        license_name=None if licence else "unknown",
        library_name="transformers",
        pipeline_tag="image-classification",
        base_model=base["base"] if base.get("kind") == "hub" else None,
        datasets=hub,
        metrics=["accuracy"],
        model_name=title,
        eval_results=[_result(row, hub or "imagefolder", data) for row in ran.head(1).itertuples()] or None,
    )
    chosen = records.read_json(folder / plan.FILE).values() if kind == "mixed" else ()
    counts = ", ".join(f"{count} in {FORMATS[name].label}" for name, count in sorted(Counter(chosen).items()))
    made = "made by this code" if base.get("kind") in ("generator", "random") else UNKNOWN
    body = TEMPLATE.read_text(encoding="utf-8").format(
        title=title,
        classes=len(checkpoint.read_labels(folder).names),
        how=HOW[kind].format(pictures=len(about.get("calibrated_on", ())), plan=counts),
        preprocessing=preprocess.load(folder).in_words(),
        fused=next(name for name, one in VARIANTS.items() if one.checkpoint == kind and one.execution == "fused"),
        measured=_markdown(tables.table(ran, MEASURED).text) if len(ran) else "Nothing was measured.",
        origin=origin.sentence(base) or "Its base network is not recorded.",
        data=data,
        licence=licence or UNKNOWN,
        base_licence=tables.text(base["licence"]) if base.get("licence") else made,
        pictures_licence="drawn by this code" if source == "synthetic" else UNKNOWN,
    )
    return ModelCard(f"---\n{header.to_yaml()}\n---\n\n{body}")


def _result(row: tuple, kind: str, data: str) -> EvalResult:
    """Top-1 of a row of the record `variants`, for the Hub."""
    interval = f"95 % interval {row.top1_low:.4f} … {row.top1_high:.4f} of {row.n:.0f} pictures"
    metric = {"metric_type": "accuracy", "metric_value": round(row.top1, 4)}
    metric["metric_name"] = f"Top-1 of {variants.label(row.variant)}, {interval}"
    return EvalResult("image-classification", kind, data, dataset_split="validation", **metric)


def _markdown(table: pd.DataFrame) -> str:
    rows = [list(table), ["---"] * table.shape[1], *table.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
