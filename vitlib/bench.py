"""What every step towards speed brings, measured in one run: `records/bench.csv` and `records/targets.csv`. Level 3.

`python -m vitlib.bench` measures random weights, which is enough for speed and memory; with `--study` it takes the
checkpoints of a study that has run its first notebook, and agreement means what it means there. Rows compare with each
other only within one run.
"""

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from transformers import set_seed

from vitlib import (
    ablation,
    benchmark,
    checkpoint,
    engine,
    files,
    linears,
    origin,
    params,
    preprocess,
    provenance,
    quantize,
    records,
    stats,
    timing,
    trainspeed,
    tuning,
    verify,
)
from vitlib import (
    sources as data,
)
from vitlib import (
    stream as pipeline,
)
from vitlib.checkpoint import CheckpointError, NotRun
from vitlib.engine import Engine
from vitlib.params import Parameters
from vitlib.preprocess import PreprocessError
from vitlib.variants import FUSED_ONLY, Variant

PARTS = ("engine", "training", "ablation", "pipeline")
COLUMNS = records.COLUMNS["bench"]


@dataclass(frozen=True)
class Step:
    """A row a batch size: a variant, and the form of its GELU where it is fused."""

    variant: Variant
    gelu: str = "checkpoint"

    @property
    def name(self) -> str:
        return self.variant.name + ("" if self.gelu == "checkpoint" else f", {self.gelu} GELU")

    @property
    def reference(self) -> str:
        """The plain eager network that this one is compared with, a key of `_REFERENCES` or a variant's name."""
        return _REFERENCES.get(self.variant.weights, f"{self.variant.weights}-sdpa")


_DEQUANTIZED = "int8 rows, dequantized"
_REFERENCES = {"w8a16": _DEQUANTIZED, "w8a8": "int8-sdpa", "fp8": "fp16-sdpa"}


def steps(device: torch.device) -> list[Step]:
    """What is compared on `device`, each format's way from the libraries' own form to the fastest; fp32 first."""
    plain = [Step(Variant(weights)) for weights in ("fp32", "fp16", "nf4", "int8")]
    formats = ("fp16", "nf4", *FUSED_ONLY)
    if device.type == "cpu":
        return [*plain, *(Step(Variant(weights, "direct", "fused")) for weights in ("fp32", "nf4", "w8a16", "w8a8"))]
    graphs = [Step(Variant(weights, "sdpa", "graph")) for weights in ("fp16", "nf4")]
    fused = [Step(Variant(weights, "direct", "fused-graph"), gelu) for weights in formats for gelu in GELUS]
    kernels = ("direct_cudnn", "direct_fa", "direct_efficient", "direct_fa2")
    others = [Step(Variant("fp16", name, "fused-graph"), "tanh") for name in kernels]
    compiled = [Step(Variant("fp16", "direct", "fused-compile-graph"), gelu) for gelu in GELUS]
    return [*plain, *graphs, *fused, *others, *compiled]


GELUS = ("checkpoint", "tanh")
BATCHES = 12  # that the input pipeline is measured with at least: the first is decoded while the network waits
# Ratios within one run need fewer rounds than a study's tables, and there are more rows here.
BUDGET = {"rounds": 8, "samples": 40, "round_seconds": 0.1}


# ------------------------------------------------------------------------------------------------------------ engine


def measure_engines(
    settings: Parameters, checkpoints: Path, pixels: torch.Tensor, wanted: list[Step] | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of `bench.csv` for the engine, and the tuning table of the fused networks (`records/bench_tuning.csv`).

    Columns used: step, batch, gelu, ms (median latency), times_baseline (of the first step's latency) and of_best_fp16
    (share of the fastest fp16 latency with the same GELU) with their bounds, images_per_s (queued calls),
    relative_error and agreement of outputs for `pixels` against `reference`, model_mb (weights), held_mb (and the
    buffers of weights dequantized ahead), prepare_s, note. The reference of a row is the plain eager network with the
    same weights at the largest batch size; every other row is compared at its own batch size, as that has a graph and
    kernels of its own. w8a8 is compared with LLM.int8, which keeps outliers in 16 bit, and fp8
    with fp16: their differences are those of the formats.
    """
    device = checkpoint.pick_device(settings.device)
    wanted = wanted or steps(device)
    engines, reasons = _prepared(wanted, settings, checkpoints, device)
    plain = {name: engines[name] for name in {step.reference for step in wanted} & engines.keys()}
    if any(step.variant.weights == "w8a16" for step in wanted):
        loaded = checkpoint.load(checkpoints, Variant("int8"), device)
        plain[_DEQUANTIZED] = Engine(replace(loaded, model=quantize.dequantize_int8(loaded.model), variant=None))
    batch = max(settings.batch_sizes)
    references = {name: engine.logits(runner, pixels, batch) for name, runner in plain.items()}
    ran = [step for step in wanted if step.name in engines]
    rounds, rates = _timed(engines, pixels, settings, device)
    about = pd.DataFrame([{"step": step.name, "gelu": step.gelu, "reference": step.reference} for step in ran])
    about["model_mb"] = [engines[step.name].loaded.weights_mb for step in ran]
    about["held_mb"] = about["model_mb"] + [engines[step.name].buffers_mb for step in ran]
    about["prepare_s"] = [_prepare_s(engines[step.name]) for step in ran]
    quality = _quality(ran, engines, references, pixels, settings.batch_sizes)
    frame = _compared(rounds, ran).merge(rates, on=["step", "batch"]).merge(about, on="step")
    frame = frame.merge(quality, on=["step", "batch"], how="left")
    frame = pd.concat([frame, pd.DataFrame(reasons, columns=["step", "note"])], ignore_index=True)
    return frame.assign(part="engine"), engine.tunings(engines, "step")


def _prepared(
    wanted: list[Step], settings: Parameters, checkpoints: Path, device: torch.device
) -> tuple[dict[str, Engine], list[tuple[str, str]]]:
    """The engines that run here, and of the others the reason."""
    checkpoint.quiet_libraries()
    engines, reasons = {}, []
    for step in wanted:
        try:
            loaded = checkpoint.load(checkpoints, step.variant, device)
            engines[step.name] = Engine(loaded, step.variant.execution, tuple(settings.batch_sizes), gelu=step.gelu)
        except verify.EvidenceError:  # not what it is called: nothing here can be believed
            raise
        except linears.FAILURES as reason:  # a kernel that a card lacks: the row says so, the others go on
            if step is wanted[0]:
                raise
            reasons.append((step.name, f"not run: {files.first_line(reason)}"))
            if device.type == "cuda":
                torch.cuda.empty_cache()
        else:
            print(f"ready: {step.name} ({engines[step.name].prepare_s:.1f} s)", flush=True)
    return engines, reasons


Rounds = dict[tuple[str, int], np.ndarray]  # median latency in ms of each round, by step and batch size


def _timed(
    engines: Mapping[str, Engine], pixels: torch.Tensor, settings: Parameters, device: torch.device
) -> tuple[Rounds, pd.DataFrame]:
    """Latencies, and throughput in images/s, of every engine and batch size, in rounds of shuffled order."""
    calls = benchmark.every_call(engines, pixels, settings.batch_sizes)
    budget = timing.Budget(settings.rounds, settings.samples, settings.round_seconds)
    latencies = timing.latency(calls, device, budget, settings.seed)
    rates = timing.throughput(calls, {key: key[1] for key in calls}, device, budget, settings.seed)
    medians = latencies.groupby(["candidate", "round"])["latency_ms"].median()
    rates = rates.groupby("candidate")["throughput_img_s"].median()
    table = [{"step": name, "batch": size, "images_per_s": rates[name, size]} for name, size in calls]
    return {key: medians[key].to_numpy() for key in calls}, pd.DataFrame(table)


def _prepare_s(runner: Engine) -> float:
    """Seconds until it runs at full speed; captured code is compiled while it is prepared."""
    return runner.prepare_s + (0.0 if runner.execution.endswith("graph") else sum(runner.compile_s.values()))


def _quality(
    ran: list[Step],
    engines: Mapping[str, Engine],
    references: Mapping[str, torch.Tensor],
    pixels: torch.Tensor,
    sizes: list[int],
) -> pd.DataFrame:
    """Relative error and Top-1 agreement of each step that has a reference, at each batch size.

    A reference is not compared with itself. An error that is no number is infinite here.
    """
    rows = []
    for step in ran:
        expected = references.get(step.reference)
        if step.name == step.reference or expected is None:
            continue
        for size in sizes:
            found = engine.logits(engines[step.name], pixels, size)
            error = tuning.relative_error(found, expected)
            same = (found.argmax(1) == expected.argmax(1)).double().mean().item()
            error = np.inf if np.isnan(error) else error  # else it would be missing, as what was not measured is
            rows.append({"step": step.name, "batch": size, "relative_error": error, "agreement": same})
    return pd.DataFrame(rows, columns=["step", "batch", "relative_error", "agreement"])


def _compared(rounds: Rounds, ran: list[Step]) -> pd.DataFrame:
    """Latency of each step and batch size, against the first step, and against the best fp16 with the same GELU.

    Ratios are medians over rounds of the rounds' ratios, each with its bootstrap interval.
    """
    rows = []
    for name, batch in rounds:
        step, own = next(step for step in ran if step.name == name), rounds[name, batch]
        equals = [rounds[s.name, batch] for s in ran if s.variant.weights == "fp16" and s.gelu == step.gelu]
        row = {"step": name, "batch": batch, **_interval("ms", own)}
        row |= _interval("times_baseline", rounds[ran[0].name, batch] / own)
        row |= _interval("of_best_fp16", own / min(equals, key=np.median)) if equals else {}
        rows.append(row)
    return pd.DataFrame(rows)


def _interval(name: str, values: np.ndarray) -> dict[str, float]:
    found = stats.median_interval(list(values))
    return {name: found.estimate, f"{name}_low": found.low, f"{name}_high": found.high}


# --------------------------------------------------------------------------------- training, ablation, input pipeline


def measure_training(settings: Parameters, checkpoints: Path) -> pd.DataFrame:
    """Images per second of a training step, from PEFT as it comes to everything that `training` switches on.

    On a CPU without compilation, which takes minutes there.
    """
    device = checkpoint.pick_device(settings.device)
    loaded = checkpoint.load(checkpoints, Variant("fp32"), torch.device("cpu"))
    chosen = tuple(step for step in trainspeed.STEPS if device.type == "cuda" or not step.compiled)
    batch = settings.train_batch_size if device.type == "cuda" else min(settings.train_batch_size, 8)
    found = trainspeed.step_speed(
        loaded.model,
        batch,
        pre=loaded.preprocess,
        device=device,
        rank=settings.lora_rank,
        alpha=settings.lora_alpha,
        dropout=settings.lora_dropout or 0.1,
        steps=chosen,
    )
    # PEFT as it comes, with the same dropout; where that did not run there is no factor.
    first = found.groupby("dropout")["images_per_s"].transform(lambda own: own.iloc[0])
    found = found.rename(columns={"compile_s": "prepare_s", "peak_vram_mb": "peak_mb", "reason": "note"})
    return found.assign(part="training", batch=batch, times_baseline=found["images_per_s"] / first)


def measure_ablation(settings: Parameters, subject: ablation.Subject, sample: int = 4) -> pd.DataFrame:
    """Wall time of the whole ablation, and of reloading the checkpoint for each configuration, from a sample."""
    found = ablation.speed(subject, settings, sample)
    note = [
        f"{row.configurations} configurations ({row.timed} run), {row.loads} load{'s' * (row.loads > 1)}, "
        f"{row.block_evaluations:,.0f} block "
        f"evaluations in {row.block_calls:,.0f} calls"
        for row in found.itertuples()
    ]
    found = found.rename(columns={"way": "step", "wall_s": "seconds", "times_faster": "times_baseline"})
    return found.assign(part="ablation", batch=settings.eval_batch_size, note=note)


def measure_pipeline(
    settings: Parameters, checkpoints: Path, pictures: list[data.Picture], device: torch.device
) -> pd.DataFrame:
    """Files to predictions: decoder alone, network alone, both at once; with Pillow, and with nvJPEG where it is.

    Few pictures are taken several times, so that there are batches enough for decoder and network to overlap. `share`
    has bounds over rounds.
    """
    rounds = 6 if device.type == "cuda" else 3
    variant = Variant("fp16", "direct", "fused-graph") if device.type == "cuda" else Variant("fp32", "direct", "fused")
    batch, parts = settings.eval_batch_size, []
    runner = Engine(checkpoint.load(checkpoints, variant, device), variant.execution, (batch,))
    repeated = pictures * -(-BATCHES * batch // len(pictures))
    kinds = ", ".join(f"{count} × {kind}" for kind, count in Counter(map(_kind, pictures)).most_common())
    for decoder in ("pil", "nvjpeg"):
        try:
            shared = {"batch_size": batch, "workers": settings.workers, "rounds": rounds}
            found = pipeline.speed(repeated, runner, decoder=decoder, **shared)
        except NotRun as reason:
            parts.append(pd.DataFrame([{"step": f"overlapped, {decoder}", "note": f"not run: {reason}"}]))
        else:
            note = f"{settings.workers} threads, {len(repeated):,} pictures of {kinds}. " + found["note"]
            named = found["stage"] + f", {decoder}"
            found = found.rename(columns=lambda name: name.replace("ratio", "share"))
            parts.append(found.assign(step=named, note=note.str.rstrip(". ")))
    return pd.concat(parts, ignore_index=True).assign(part="pipeline", batch=batch)


def _kind(picture: data.Picture) -> str:
    """What a picture's file is called; those of the generator and of data sets have none."""
    return Path(picture.file).suffix.lower().lstrip(".") or "picture"


# ----------------------------------------------------------------------------------------------------------- targets


class Found(NamedTuple):
    """A figure of the table with its bounds (equal to it where it was counted or timed once), and the step it is of."""

    estimate: float
    low: float
    high: float
    step: str


Finder = Callable[[pd.DataFrame], Found | None]


@dataclass(frozen=True)
class Target:
    """What was to be reached: a limit for what `find` takes from the table; `anywhere` also on a CPU."""

    name: str
    limit: float
    find: Finder
    at_most: bool = True
    anywhere: bool = False

    def row(self, frame: pd.DataFrame) -> tuple[str, str, str, str, str]:
        """Name, requirement, what was found, whether that reaches it (undecided: the bounds hold both), which step."""
        required, found = f"{'≤' if self.at_most else '≥'} {self.limit:g}", self.find(frame)
        if found is None:
            return self.name, required, "–", "–", ""
        worst, best = (found.high, found.low) if self.at_most else (-found.low, -found.high)
        limit = self.limit if self.at_most else -self.limit
        reached = "yes" if worst <= limit else "no" if best > limit else "undecided"
        bounds = "" if found.low == found.high else f" ({found.low:.4g} … {found.high:.4g})"
        return self.name, required, f"{found.estimate:.4g}{bounds}", reached, found.step


def targets(frame: pd.DataFrame, cuda: bool) -> pd.DataFrame:
    """What was to be reached, what was found and whether it was; '–' where this run has no such row.

    Set for ViT-L/16 at 224 px on one H200. On a CPU only what does not depend on the machine's speed.
    """
    rows = [target.row(frame) for target in _TARGETS if cuda or target.anywhere]
    return pd.DataFrame(rows, columns=["target", "required", "found", "reached", "step"])


def _engine(weights: tuple[str, ...], batch: int, gelu: str, column: str, least: bool = True) -> Finder:
    """The best `column` among fused rows of these weights, this batch size and this GELU, with its interval."""

    def find(frame: pd.DataFrame) -> Found | None:
        names = tuple(f"{name}-direct" for name in weights)
        own = frame[(frame["part"] == "engine") & frame["step"].astype(str).str.startswith(names)]
        own = own[(own["batch"] == batch) & (own["gelu"] == gelu)].dropna(subset=[column])
        if own.empty:
            return None
        row = own.loc[own[column].idxmin() if least else own[column].idxmax()]
        return Found(row[column], row[f"{column}_low"], row[f"{column}_high"], row["step"])

    return find


def _exactly(value: float, step: str) -> Found:
    return Found(value, value, value, step)


def _value(part: str, column: str, step: str = "", by: str = "") -> Finder:
    """`column` of the row of a part whose step begins with `step`: the one with the largest `by`, else the first.

    With its bounds where the table has them.
    """

    def find(frame: pd.DataFrame) -> Found | None:
        own = frame[(frame["part"] == part) & frame["step"].astype(str).str.startswith(step)].dropna(subset=[column])
        if own.empty:
            return None
        row = own.loc[own[by].idxmax() if by else own.index[0]]
        bounds = [row.get(f"{column}_{side}", np.nan) for side in ("low", "high")]
        if np.isnan(bounds).any():
            return _exactly(float(row[column]), row["step"])
        return Found(float(row[column]), *map(float, bounds), row["step"])

    return find


def _bytes(weights: str, plain: str) -> Finder:
    """What a fused format holds on the device, buffers included, over what the libraries' own form weighs."""

    def find(frame: pd.DataFrame) -> Found | None:
        held = frame[frame["step"].astype(str).str.startswith(f"{weights}-direct")].dropna(subset=["held_mb"])
        own = frame.loc[frame["step"] == plain, "model_mb"].dropna()
        if held.empty or own.empty:
            return None
        row = held.loc[held["held_mb"].idxmax()]
        return _exactly(float(row["held_mb"] / own.iloc[0]), row["step"])

    return find


def _worst(column: str, largest: bool) -> Finder:
    """The worst value of `column` among 16-bit engine rows that compute the same function as their reference."""

    def find(frame: pd.DataFrame) -> Found | None:
        others = frame["step"].astype(str).str.startswith(("w8a8", "fp8", "fp32"))
        own = frame[(frame["part"] == "engine") & ~others & (frame["gelu"] == "checkpoint")].dropna(subset=[column])
        if own.empty:
            return None
        row = own.loc[own[column].idxmax() if largest else own[column].idxmin()]
        return _exactly(float(row[column]), row["step"])

    return find


def _by_gelu(name: str, limit: float, weights: tuple[str, ...], batch: int, column: str, at_most: bool = True) -> list:
    """A target for the checkpoint's GELU, which is the same function, and for its tanh form."""
    return [
        Target(f"{name}, batch {batch}{words}", limit, _engine(weights, batch, gelu, column, at_most), at_most)
        for gelu, words in (("checkpoint", ""), ("tanh", ", tanh GELU"))
    ]


_TARGETS = [
    *_by_gelu("fp16 (ms)", 1.15, ("fp16",), 1, "ms"),
    *_by_gelu("fp16 (ms)", 8.5, ("fp16",), 32, "ms"),
    *_by_gelu("NF4 against fp32", 6, ("nf4",), 1, "times_baseline", at_most=False),
    *_by_gelu("NF4 of fp16's time", 1.25, ("nf4",), 1, "of_best_fp16"),
    *_by_gelu("NF4 against fp32", 11, ("nf4",), 32, "times_baseline", at_most=False),
    *_by_gelu("NF4 of fp16's time", 1.05, ("nf4",), 32, "of_best_fp16"),
    *_by_gelu("int8 (w8a16) of fp16's time", 1.25, ("w8a16",), 1, "of_best_fp16"),
    *_by_gelu("int8 (w8a8) of fp16's time", 1.25, ("w8a8",), 1, "of_best_fp16"),
    *_by_gelu("int8 (w8a16) of fp16's time", 1.05, ("w8a16",), 32, "of_best_fp16"),
    *_by_gelu("int8 (w8a8) of fp16's time", 1.05, ("w8a8",), 32, "of_best_fp16"),
    Target("NF4: bytes held, of the libraries' own", 1.0, _bytes("nf4", "nf4-sdpa")),
    Target("int8 (w8a8): bytes held, of the libraries' own", 1.0, _bytes("w8a8", "int8-sdpa")),
    Target("int8 (w8a16): bytes held, of the libraries' own", 1.0, _bytes("w8a16", "int8-sdpa")),
    Target("LoRA training step (images/s)", 1300, _value("training", "images_per_s", by="images_per_s"), at_most=False),
    Target("ablation: share of block evaluations", 0.55, _value("ablation", "share", "shared"), anywhere=True),
    Target("ablation: times faster than reloading", 10, _value("ablation", "times_baseline", "shared"), at_most=False),
    Target(
        "pipeline with Pillow: share of its slower half", 0.8, _value("pipeline", "share", "overlapped, pil"), False
    ),
    Target("pipeline with nvJPEG: the same", 0.8, _value("pipeline", "share", "overlapped, nvjpeg"), False),
    Target(
        "16 bit, same function: largest relative error",
        0.01,
        _worst("relative_error", True),
        anywhere=True,
    ),
    Target(
        "16 bit, same function: least Top-1 agreement",
        0.995,
        _worst("agreement", False),
        at_most=False,
        anywhere=True,
    ),
]


# --------------------------------------------------------------------------------------------------------- the command


def random_study(settings: Parameters, folder: Path, dataset: data.Dataset) -> Path:
    """Checkpoints of a network with random weights in `folder`: merged, nf4 and int8, as notebook 1 leaves them."""
    labels, device = data.new_labels(dataset), checkpoint.pick_device(settings.device)
    set_seed(settings.seed)
    shared = {"pre": preprocess.new(settings.image_size), "labels": labels, "provenance": {"weights are": "random"}}
    merged = checkpoint.new(settings.architecture, image_size=settings.image_size, labels=labels).half().eval()
    with torch.no_grad():  # logits of random weights are nearly alike; so they differ as those of a trained network
        merged.classifier.weight.mul_(20)
    checkpoint.save(merged, folder / "merged", **shared)
    for weights in ("nf4", "int8"):
        checkpoint.save(checkpoint.quantize_checkpoint(folder / "merged", weights, device), folder / weights, **shared)
    return folder


def default_settings(device: torch.device) -> Parameters:
    """What `make bench` measures without a study: ViT-L/16 on a GPU, a small network on a CPU."""
    flowers = files.resolve("data/flowers102")
    common = {"study": "bench", "data_source": "data/flowers102" if flowers.is_dir() else "synthetic", **BUDGET}
    if device.type == "cpu":
        small = {"architecture": "vit-mini", "image_size": 96, "batch_sizes": [1, 8]}
        return params.check({**common, **small, "limit": 96, "ablation_pictures": 32, "eval_batch_size": 8})
    large = {"architecture": "vit-large", "image_size": 224, "batch_sizes": [1, 8, 32, 128]}
    workers = min(provenance.usable_cores() or 2, 64)  # as far as the parameter goes
    sizes = {"train_batch_size": 128, "eval_batch_size": 128, "workers": workers}
    return params.check({**common, **large, **sizes, "ablation_pictures": 0})


def run(
    settings: Parameters, parts: tuple[str, ...], checkpoints: Path | None, folder_of_pictures: Path | None = None
) -> pd.DataFrame:
    """Measure `parts` and write `bench.csv`, `targets.csv`, `bench_tuning.csv` and `bench.json`, the environment.

    The input pipeline reads the pictures below `folder_of_pictures`, by default those of the validation split.
    """
    dataset, device = data.load(settings), checkpoint.pick_device(settings.device)
    pictures = pipeline.pictures_in(folder_of_pictures) if folder_of_pictures else dataset.splits["valid"]
    folder = files.study_folder(settings.study) / "records"
    with tempfile.TemporaryDirectory() as scratch:
        weights, base = ("trained", origin.of_study(folder.parent)) if checkpoints else ("random", {})
        checkpoints = checkpoints or random_study(settings, Path(scratch), dataset)
        frames = []
        for found, tuning in _measured(settings, parts, checkpoints, dataset, pictures, device):
            frames.append(found)
            if tuning is not None:
                records.write_table(tuning, folder / "bench_tuning.csv")
            elif len(frames) == 1:  # that of an earlier run does not belong to what is measured now
                (folder / "bench_tuning.csv").unlink(missing_ok=True)
            frame = pd.concat(frames, ignore_index=True).reindex(columns=COLUMNS)
            # After each part: what has been measured is kept where a later part fails.
            records.write_table(frame.assign(weights=weights), folder / "bench.csv")
            records.write_table(targets(frame, device.type == "cuda"), folder / "targets.csv")
            environment = provenance.environment(parameters=settings.model_dump())
            records.write_json({**environment, "base": base}, folder / "bench.json")
    return frame


def _measured(
    settings: Parameters,
    parts: tuple[str, ...],
    checkpoints: Path,
    dataset: data.Dataset,
    pictures: list[data.Picture],
    device: torch.device,
) -> Iterator[tuple[pd.DataFrame, pd.DataFrame | None]]:
    """The rows of each part as soon as it is measured, those of the engine with their tuning table."""
    loaded = checkpoint.load(checkpoints, Variant("fp16"), device)
    valid = data.decode_splits(dataset, ["valid"], loaded.preprocess, settings.workers)["valid"]
    if "engine" in parts:
        found, tuning = measure_engines(settings, checkpoints, valid.pixels)
        yield found, tuning if len(tuning) else None
    if "pipeline" in parts:
        yield measure_pipeline(settings, checkpoints, pictures, device), None
    if "ablation" in parts:
        count = settings.ablation_pictures or len(valid.pixels)
        labels = loaded.labels.ids(valid.pictures)
        yield measure_ablation(settings, ablation.Subject(loaded, valid.pixels[:count], labels[:count])), None
    if "training" in parts:
        yield measure_training(settings, checkpoints), None


def _chosen(options: argparse.Namespace) -> tuple[Parameters, Path | None]:
    """The settings, and the checkpoints of the study that is asked for."""
    checkpoints = None
    if not options.study:
        settings = default_settings(checkpoint.pick_device("auto"))
    else:
        values = params.load(files.project_root() / "params" / f"{options.study}.yaml")
        settings = params.check({**values, **BUDGET, "study": options.study})
        checkpoints = files.study_folder(settings.study) / "checkpoints"
        checkpoint.checkpoint_folder(checkpoints, Variant("fp16"))  # its error says to run notebook 1
    if options.batch_sizes:
        settings = params.check({**settings.model_dump(), "batch_sizes": options.batch_sizes})
    return settings, checkpoints


def main() -> None:
    """Measure what the command line asks for, and print both tables."""
    parser = argparse.ArgumentParser(prog="python -m vitlib.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--study", help="take the checkpoints and parameters of this study (params/<study>.yaml)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--batch-sizes", nargs="+", type=int, help="instead of the study's")
    parser.add_argument("--pictures", type=Path, help="folder for the input pipeline, instead of the validation split")
    options = parser.parse_args()
    try:
        settings, checkpoints = _chosen(options)
        frame = run(settings, tuple(options.parts), checkpoints, options.pictures)
    except (params.ParameterError, data.DataError, CheckpointError, PreprocessError, NotRun, OSError) as error:
        sys.exit(f"error: {error}")
    with pd.option_context("display.width", 200, "display.max_columns", 20, "display.max_colwidth", 60):
        print(
            frame.drop(columns=[name for name in frame if name.endswith(("_low", "_high"))])
            .round(3)
            .to_string(index=False)
        )
        print(targets(frame, checkpoint.pick_device(settings.device).type == "cuda").to_string(index=False))


if __name__ == "__main__":
    main()
