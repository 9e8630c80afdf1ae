"""Classify a folder of pictures, however many: a row for each file, and a killed run continues."""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import get_args

import pandas as pd
import torch
from tqdm import tqdm

from vitlib.deploy import predictor
from vitlib.network import checkpoint, stream
from vitlib.network.stream import Batch
from vitlib.pictures import decoders, sources
from vitlib.pictures.sources import Labels
from vitlib.study import files, params, records

TOP = 5
ROWS, SECONDS = 1024, 1.0  # rows are written when there are so many, or after so long
LINE, LINE_SECONDS = "{n_fmt} of {total_fmt} files, {rate_fmt}, {remaining} left\n", 10.0  # without a terminal
COLUMNS = records.COLUMNS["predictions"]
PARAMETERS = ("workers", "device", "decoder", "max_megapixels", "follow_links")
EPILOG = """\
Every file below FOLDER has a row, except OUTPUT itself; rows are in natural order of the names. Columns:
  file                           name from FOLDER on
  status, reason                 ok, or skipped and why
  label, label_name              folder that the picture is in, and that class's name if the network knows it
  id_1, name_1, probability_1    most probable class; _2 to _5 are the next
In a CSV file, text that a spreadsheet would run as a formula starts with an apostrophe.

After a kill or Ctrl-C the same command continues. OUTPUT.json has what it was begun with and whether it is finished.
What was begun with a different checkpoint, variant, folder or batch size is refused.

Exit status: 0 every file was classified, 1 none was or the command failed, 2 some were skipped, 130 Ctrl-C.
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command; `PARAMETERS` have the meanings, limits and defaults that notebook 4 gives them."""
    parser.formatter_class, parser.epilog, add = argparse.RawDescriptionHelpFormatter, EPILOG, parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="pictures, flat or in folders")
    kinds = "outputs/<study>, a folder in its checkpoints/, or an unpacked archive"
    add("--checkpoint", type=Path, required=True, help=kinds)
    auto = "auto is the fastest that the study measured for this batch size within its margin of accuracy"
    add("--variant", default="auto", help=f"such as nf4-sdpa; {auto} (%(default)s)")
    output = {"metavar": "OUTPUT", "help": "a .csv or .parquet file (%(default)s)"}
    add("--output", type=Path, default=Path("predictions.csv"), **output)
    add("--batch-size", type=int, default=32, metavar="N", help="pictures in a call of the network (%(default)s)")
    for name in PARAMETERS:
        field = params.Parameters.model_fields[name]
        typed = {"type": type(field.default), "choices": get_args(field.annotation) or None, "default": field.default}
        how = {"action": "store_true"} if field.default is False else typed
        add(f"--{name.replace('_', '-')}", help=f"{field.description} (%(default)s)", **how)
    add("--overwrite", action="store_true", help="replace an output that is finished or cannot be continued")
    parser.set_defaults(workers=min(8, os.cpu_count() or 1))


def run(options: argparse.Namespace) -> int:
    """Classify the folder; the exit status of `EPILOG`."""
    given = {name: getattr(options, name) for name in ("variant", *PARAMETERS)}
    settings = params.check(given | {"eval_batch_size": options.batch_size})
    if options.output.suffix not in (".csv", ".parquet"):
        raise ValueError(f"--output {str(options.output)!r}: the name must end in .csv or .parquet")
    if options.output.suffix == ".parquet" and not importlib.util.find_spec("pyarrow"):
        raise ImportError("a .parquet output needs the package pyarrow: pip install 'vitlib[parquet]'")
    try:
        listed = _listed(options.folder, settings, options.output)
        weights, device = predictor.find(options.checkpoint), checkpoint.pick_device(settings.device)
        variant, _ = predictor.choose(weights, settings.variant, device, options.batch_size)
        about = {"checkpoint_sha256": files.checksum(weights.folder(variant)), "variant": variant.name}
        about |= {"device": device.type, "decoder": settings.decoder, "batch_size": options.batch_size}
        about |= {"max_megapixels": settings.max_megapixels, "folder_sha256": _digest([str(options.folder.resolve())])}
        about["list_of_files_sha256"] = _digest(name for name, _ in listed)
        output = Output(options.output, about, listed, options.folder)
        if not (known := output.known(options.overwrite)).get("finished"):
            chosen = predictor.load(weights, settings.variant, device=device.type, batch_size=options.batch_size)
            print(f"{variant.label} ({variant.name}) {chosen.said}", file=sys.stderr)
            known = output.complete(chosen, settings, fresh=not known)
    except FloatingPointError as error:
        raise RuntimeError(str(error)) from None
    except KeyboardInterrupt:
        print(f"\ninterrupted: the same command continues {options.output}", file=sys.stderr)
        return 130
    total, skipped = len(listed), known["skipped"]
    print(f"{options.output}: {total - skipped:,} of {total:,} files classified, {skipped:,} skipped")
    return (1 if skipped == total else 2) if skipped else 0


def _listed(folder: Path, settings: params.Parameters, output: Path) -> list[tuple[str, str]]:
    """`sources.walk` without this command's own files, which may be below the folder. ValueError where it is empty."""
    own = re.compile(rf"(.*/)?(\.(tmp|old)-[0-9a-f]{{12}}-)?{re.escape(output.name)}(\.json|\.part)?", re.DOTALL)
    listed = sources.walk(folder, None if settings.follow_links else [folder]) if folder.is_dir() else []
    listed = [one for one in listed if not own.fullmatch(one[0])]
    if not listed:
        raise ValueError(f"there is no {'file in the ' * folder.is_dir()}folder {str(folder)!r}")
    return listed


def _digest(names: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape")).hexdigest()


@dataclass
class Output:
    """A table that grows; a JSON file beside it has `about`, which decides all rows, and whether they are complete.

    `listed` are the files of `folder` as `sources.walk` gives them.
    """

    path: Path
    about: dict[str, object]
    listed: list[tuple[str, str]]
    folder: Path

    def __post_init__(self) -> None:
        self.side = self.path.with_name(f"{self.path.name}.json")
        self.rows = self.path if self.path.suffix == ".csv" else self.path.with_name(f"{self.path.name}.part")

    def known(self, overwrite: bool) -> dict[str, object]:
        """What is known of a finished output or one to continue; {} for a new one. ValueError where another exists."""
        if not any(file.is_file() and file.stat().st_size for file in (self.path, self.rows)):
            return {}
        known = records.read_json(self.side) if self.side.is_file() else {}
        other = [name for name, value in self.about.items() if known.get(name) != value]
        if not other and not (known["finished"] and overwrite):
            if known["finished"] and self.rows != self.path:  # a kill may have left it
                self.rows.unlink(missing_ok=True)
            return known
        if overwrite:
            return {}
        other = " and ".join(name.removesuffix("_sha256").replace("_", " ") for name in other)
        why = f"was begun with a different {other}" if known else "exists, and not from this command"
        raise ValueError(f"{self.path} {why}: name another --output, or replace it with --overwrite")

    def complete(self, chosen: predictor.Predictor, settings: params.Parameters, fresh: bool) -> dict[str, object]:
        """Classify the files that have no row yet (all if `fresh`) and append theirs; returns what `known` will."""
        about = self.about | {"folder": self.folder.resolve().name, "total": len(self.listed)}
        self.path.absolute().parent.mkdir(parents=True, exist_ok=True)
        with open(self.rows, "ab", buffering=0) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the file is closed
            except BlockingIOError:
                said = f"another process writes {self.path}: wait for it, or name another --output"
                raise RuntimeError(said) from None
            if fresh:
                file.truncate(0)
                records.write_json(about | {"finished": False}, self.side)
            self._append(file, self._kept(settings.eval_batch_size), chosen, settings)
            os.fsync(file.fileno())
            about |= {"finished": True, "skipped": self._finished()}
            records.write_json(about, self.side)
            if self.rows != self.path:
                self.rows.unlink()
        return about

    def _kept(self, batch_size: int) -> int:
        """Cut what follows the last whole batch that was written; how many rows stay.

        Whole batches, because outputs may depend in their last digits on the other pictures of a batch.
        """
        kept = cut = end = number = quotes = 0
        with open(self.rows, "r+b") as file:
            for line in file:
                end, quotes = end + len(line), quotes + line.count(b'"')
                if line.endswith(b"\n") and quotes % 2 == 0:  # a name in quotes may hold a line break
                    if number % batch_size == 0:
                        kept, cut = number, end
                    number += 1  # the header is number 0
            file.truncate(cut)
        return kept

    def _append(self, file: FileIO, done: int, chosen: predictor.Predictor, settings: params.Parameters) -> None:
        """Classify the files from `done` on and append their rows, with progress, rate and time left on stderr."""
        loaded, sizes = chosen.engine.loaded, {"batch_size": settings.eval_batch_size, "workers": settings.workers}
        source = decoders.pick(settings.decoder, loaded.preprocess, loaded.device)
        pictures = sources.each(self.folder, islice(self.listed, done, None), settings.max_megapixels)
        shown = {} if sys.stderr.isatty() else {"mininterval": LINE_SECONDS, "bar_format": LINE}
        bar = tqdm(desc="files", unit=" files", initial=done, total=len(self.listed), **shown)
        with bar, closing(stream.batches(pictures, chosen.engine, source, **sizes)) as passed:
            for together in _together(passed):
                pairs = [pair for batch in together for pair in zip(batch.pictures, batch.reasons, strict=True)]
                named = [(picture.file, picture.label, reason) for picture, reason in pairs]
                frame = rows(named, torch.cat([batch.logits for batch in together]), loaded.labels)
                content = records.as_csv(frame, header=not os.fstat(file.fileno()).st_size)
                with files.naming_what_lacks_room(self.rows.absolute()):
                    while content:
                        content = content[file.write(content) :]
                bar.update(len(frame))
        print(source.note(), end="\n" * bool(source.note()), file=sys.stderr)

    def _finished(self) -> int:
        """Check that every file has its row, make a Parquet file of them, and count the skipped ones."""
        names, skipped, whole = (picture.file for picture in sources.each(self.folder, self.listed, 1.0)), 0, True
        with _parquet(self.path) if self.rows != self.path else nullcontext(lambda frame: None) as write:
            for frame in records.read_parts(self.rows):
                whole &= frame["file"].tolist() == list(islice(names, len(frame)))
                skipped += int((frame["status"] == "skipped").sum())
                write(frame)
            if not whole or next(names, None) is not None:
                raise ValueError(f"another program changed {self.rows}: remove it and run again")
        return skipped


@contextmanager
def _parquet(path: Path) -> Iterator[Callable[[pd.DataFrame], None]]:
    """Write a Parquet file, whole or not at all, in parts; text is as it was, without apostrophes before formulas."""
    import pyarrow
    from pyarrow import parquet

    kinds = {"id": pyarrow.int64(), "probability": pyarrow.float64()}
    schema = pyarrow.schema([(name, kinds.get(name.rpartition("_")[0], pyarrow.string())) for name in COLUMNS])
    with files.atomic_path(path) as target, parquet.ParquetWriter(target, schema) as writer:
        yield lambda frame: writer.write_table(pyarrow.Table.from_pandas(frame, schema, preserve_index=False))


def _together(passed: Iterable[Batch]) -> Iterator[list[Batch]]:
    """Batches in groups: a table of few rows takes nearly as long to make as one of many."""
    waiting, since = [], time.monotonic()
    for batch in passed:
        waiting.append(batch)
        if len(waiting) * len(batch.pictures) >= ROWS or time.monotonic() - since > SECONDS:
            yield waiting
            waiting, since = [], time.monotonic()
    if waiting:
        yield waiting


def rows(named: list[tuple[str, str | None, str]], logits: torch.Tensor, labels: Labels) -> pd.DataFrame:
    """The record `predictions`: a row for each file in `named` (file, class folder, reason to skip it or '').

    `logits` (n, classes) has a row for each file without a reason, in order.
    """
    frame = pd.DataFrame(named, columns=["file", "label", "reason"])
    frame["label"] = frame["label"].where(frame["reason"] == "").fillna("")
    frame["status"] = frame["reason"].map(lambda reason: "skipped" if reason else "ok")
    frame["label_name"] = frame["label"].map(dict(zip(labels.folders, labels.names, strict=True))).fillna("")
    best, read = logits.softmax(dim=1).topk(min(TOP, len(labels.names)), dim=1), frame.index[frame["reason"] == ""]
    for rank, (ids, probabilities) in enumerate(zip(best.indices.T.tolist(), best.values.T.numpy(), strict=True), 1):
        frame[f"id_{rank}"], frame[f"probability_{rank}"] = pd.Series(ids, read), pd.Series(probabilities, read)
        frame[f"name_{rank}"] = pd.Series([labels.names[number] for number in ids], read, dtype=object)
    return frame.reindex(columns=COLUMNS)
