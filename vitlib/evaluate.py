"""The sections of notebook 2: every variant through one pipeline. Level 3."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from vitlib import data, engine, models, preprocess, profile, records, stats, timing
from vitlib.data import Dataset, Decoded, Labels
from vitlib.engine import Engine
from vitlib.params import Parameters
from vitlib.variants import Variant, find

ROTATING = 4  # different batches that a timed call cycles through, so that its input is not always in cache


@dataclass
class Bench:
    """The variants that run here as engines, the reasons of those that do not, and the pictures they all see."""

    variants: list[Variant]
    engines: dict[str, Engine]
    reasons: dict[str, str]
    labels: Labels
    device: torch.device
    valid: Decoded
    checkpoints: Path
    evidence: dict[str, dict] = field(default_factory=dict)

    @property
    def baseline(self) -> str:
        """The name of the first row; it must run."""
        return self.variants[0].name


def prepare(settings: Parameters, dataset: Dataset) -> Bench:
    """Load every variant of the parameter set once and decode the validation split with the checkpoint's preprocessing.

    A variant that cannot run here keeps its row with the reason. The baseline must run: its error is raised.
    """
    models.quiet_libraries()
    device = models.pick_device(settings.device)
    checkpoints = records.study_folder(settings.study) / "checkpoints"
    variants = [find(name) for name in settings.variants]
    engines: dict[str, Engine] = {}
    reasons: dict[str, str] = {}
    sizes = tuple(sorted({*settings.batch_sizes, settings.eval_batch_size, settings.profile_batch_size}))
    for variant in variants:
        try:
            engines[variant.name] = Engine(models.load(checkpoints, variant, device), variant.execution, sizes)
        except models.NotRun as reason:
            if variant is variants[0]:
                raise
            reasons[variant.name] = str(reason)
    first = engines[variants[0].name].loaded
    first.labels.check(dataset, "valid")
    _same_preprocessing(engines)
    valid = data.decode_splits(dataset, ["valid"], first.preprocess, settings.workers)["valid"]
    found = {name: models.evidence(engine_.loaded.model) for name, engine_ in engines.items()}
    return Bench(variants, engines, reasons, first.labels, device, valid, checkpoints, found)


def _same_preprocessing(engines: dict[str, Engine]) -> None:
    described = {name: engine_.loaded.preprocess.describe() for name, engine_ in engines.items()}
    first = next(iter(described))
    for name, settings in described.items():
        if settings != described[first]:
            raise models.CheckpointError(
                f"{name} and {first} were saved with different preprocessing ({settings} against {described[first]}): "
                "run 1_finetune again, so that all checkpoints come from one training"
            )


def status_table(bench: Bench) -> pd.DataFrame:
    """What really is there in each row (module classes, dtypes, attention), or why it is missing."""
    rows = []
    for variant in bench.variants:
        found = bench.evidence.get(variant.name)
        if found is None:
            rows.append((variant.name, f"not run: {bench.reasons[variant.name]}", "", "", ""))
            continue
        linears = ", ".join(f"{count} {kind}" for kind, count in found["encoder_linears"].items())
        rows.append((variant.name, "runs", linears, ", ".join(found["dtypes"]), found["attention"]))
    return pd.DataFrame(rows, columns=["variant", "status", "encoder linears", "other weights", "attention"])


def outputs(bench: Bench, settings: Parameters) -> dict[str, torch.Tensor]:
    """float32 logits (n, classes) of the validation split for each variant; kept in `records/logits.npz`."""
    found = {
        name: engine.logits(engine_, bench.valid.pixels, settings.eval_batch_size)
        for name, engine_ in bench.engines.items()
    }
    arrays = {name: values.numpy() for name, values in found.items()}
    target = records.study_folder(settings.study) / "records" / "logits.npz"
    with records.atomic_path(target) as path, open(path, "wb") as file:
        np.savez_compressed(file, labels=bench.labels.ids(bench.valid.pictures).numpy(), **arrays)
    return found


def accuracy(bench: Bench, logits: dict[str, torch.Tensor]) -> pd.DataFrame:
    """Top-1, Top-5, weighted F1, agreement with the baseline and mean KL from its probabilities, a row a variant."""
    labels = bench.labels.ids(bench.valid.pictures).numpy()
    base, rows = logits[bench.baseline].numpy(), {}
    for name, values in logits.items():
        found = values.numpy()
        predicted = found.argmax(axis=1)
        rows[name] = {
            "top1": stats.topk_accuracy(found, labels, 1),
            "top5": stats.topk_accuracy(found, labels, 5),
            "f1_weighted": stats.f1_weighted(labels, predicted),
            "agreement_with_baseline": float((predicted == base.argmax(axis=1)).mean()),
            "logit_kl": float(stats.kl_divergence(base, found).mean()),
        }
    return pd.DataFrame(rows).T


def _rotating_calls(engine_: Engine, pixels: torch.Tensor, size: int) -> Callable[[int], torch.Tensor]:
    """A call of one batch of `size` that cycles through different pictures already on the device, normalised."""
    loaded, total = engine_.loaded, len(pixels)
    batches = [
        loaded.preprocess.normalise(
            pixels[torch.arange(k * size, (k + 1) * size) % total].to(loaded.device), loaded.dtype
        )
        for k in range(ROTATING)
    ]
    return lambda number: engine_(batches[number % ROTATING])


def benchmark(bench: Bench, settings: Parameters) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Raw latency samples and throughput rounds of every variant and batch size, all shuffled together.

    Columns: variant, batch, round, sample, latency_ms; and variant, batch, round, throughput_img_s. Both are written
    to `records/latency.csv` and `records/throughput.csv`.
    """
    budget = timing.Budget(settings.rounds, settings.samples, settings.round_seconds)
    calls = {
        (name, size): _rotating_calls(engine_, bench.valid.pixels, size)
        for name, engine_ in bench.engines.items()
        for size in settings.batch_sizes
    }
    sizes = {key: key[1] for key in calls}
    folder, frames = records.study_folder(settings.study) / "records", []
    for record, frame in (
        ("latency", timing.latency(calls, bench.device, budget, settings.seed)),
        ("throughput", timing.throughput(calls, sizes, bench.device, budget, settings.seed)),
    ):
        frame.insert(0, "variant", [name for name, _ in frame["candidate"]])
        frame.insert(1, "batch", [size for _, size in frame["candidate"]])
        frames.append(frame.drop(columns="candidate"))
        records.write_table(frames[-1], folder / f"{record}.csv")
    return frames[0], frames[1]


def speed(samples: pd.DataFrame, rounds: pd.DataFrame) -> pd.DataFrame:
    """Latency percentiles and median throughput, a row a variant and batch size.

    A percentile stands only where there are samples enough for it (see `stats.percentile`).
    """
    latency = samples.groupby(["variant", "batch"])["latency_ms"].agg(
        latency_mean_ms="mean",
        latency_p50_ms=lambda values: stats.percentile(values, 50),
        latency_p95_ms=lambda values: stats.percentile(values, 95),
        latency_p99_ms=lambda values: stats.percentile(values, 99),
    )
    measured = rounds.groupby(["variant", "batch"])["throughput_img_s"].median()
    return latency.join(measured).reset_index()


def memory(bench: Bench, settings: Parameters) -> pd.DataFrame:
    """Weights in memory and on disk, and the peak of a forward pass, a row a variant and batch size.

    `peak_memory_mb` is weights plus what the pass allocates at its peak, on the device that ran it; `peak_vram_mb`
    is the same number where that device is a GPU, and missing elsewhere.
    """
    rows = []
    for variant in bench.variants:
        if variant.name not in bench.engines:
            continue
        engine_ = bench.engines[variant.name]
        weights = engine_.loaded.weights_mb
        for size in settings.batch_sizes:
            call = _rotating_calls(engine_, bench.valid.pixels, size)
            peak = weights + timing.peak_memory_mb(call, bench.device)
            vram = peak if bench.device.type == "cuda" else np.nan
            disk = models.disk_mb(engine_.loaded.folder)
            rows.append((variant.name, size, weights, disk, peak, vram))
    return pd.DataFrame(rows, columns=["variant", "batch", "model_mb", "disk_mb", "peak_memory_mb", "peak_vram_mb"])


def cpu_latency(bench: Bench, settings: Parameters) -> pd.Series:
    """Median latency in ms of one picture on this machine's CPU, for the eager variants that run there."""
    cpu, calls = torch.device("cpu"), {}
    for variant in bench.variants:
        if variant.name not in bench.engines or variant.execution != "eager" or not settings.cpu_samples:
            continue
        try:
            loaded = models.load(bench.checkpoints, variant, cpu)
        except models.NotRun:  # FlashAttention-2: the row has no CPU latency
            continue
        calls[variant.name] = _rotating_calls(Engine(loaded), bench.valid.pixels, 1)
    samples = timing.latency(calls, cpu, timing.Budget(2, settings.cpu_samples, 5.0), settings.seed)
    return samples.groupby("candidate")["latency_ms"].median().rename("cpu_latency_ms")


def device_time(bench: Bench, settings: Parameters) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Kernels of one pass by part of the model (written to `records/kernels.csv`), and totals a variant.

    Variants that replay a CUDA graph or compiled code have no module ranges; their passes are profiled eagerly.
    """
    size, frames, rows = settings.profile_batch_size, [], []
    for name, engine_ in bench.engines.items():
        eager = Engine(engine_.loaded)
        call = _rotating_calls(eager, bench.valid.pixels, size)
        frame = profile.profile(lambda call=call: call(0), engine_.loaded.model, bench.device)
        rows.append(
            {
                "variant": name,
                "profiled_batch": size,
                "device_time_us": frame.attrs["total_us"],
                "attention_device_time_us": profile.attention_time_us(frame),
                "attention_kernel": profile.attention_kernel(frame),
                "kernels_per_pass": frame["calls"].sum(),
                "unattributed_share": frame.attrs["unattributed_share"],
            }
        )
        frames.append(frame.assign(variant=name, batch=size))
    kernels = pd.concat(frames, ignore_index=True)
    records.write_table(kernels, records.study_folder(settings.study) / "records" / "kernels.csv")
    return kernels, pd.DataFrame(rows)


def variants_table(
    bench: Bench,
    settings: Parameters,
    *,
    quality: pd.DataFrame,
    speeds: pd.DataFrame,
    memories: pd.DataFrame,
    cpu: pd.Series,
    device_times: pd.DataFrame,
) -> pd.DataFrame:
    """All measurements joined, a row a variant and batch size, written to `records/variants.csv`.

    Accuracy, device time (of `profiled_batch` pictures) and CPU latency (of one picture) do not depend on the row's
    batch size and repeat. A variant that did not run has one row with its reason.
    """
    measured = speeds.merge(memories, on=["variant", "batch"], validate="one_to_one")
    measured = measured.merge(quality, left_on="variant", right_index=True)
    measured = measured.merge(device_times, on="variant").merge(cpu, left_on="variant", right_index=True, how="left")
    facts = pd.DataFrame(
        {
            "variant": variant.name,
            "weights": variant.weights,
            "attention": variant.attention,
            "execution": variant.execution,
            "status": "ok" if variant.name in bench.engines else "not run",
            "reason": bench.reasons.get(variant.name, ""),
        }
        for variant in bench.variants
    )
    table = facts.merge(measured, on="variant", how="left")
    folder = records.study_folder(settings.study) / "records"
    records.write_table(table, folder / "variants.csv")
    environment = records.environment(
        parameters=settings.model_dump(),
        seeds={"study": settings.seed},
        checksums={"weights": records.checksum(bench.checkpoints / "merged"), "data": data_checksum(bench)},
    )
    records.write_json(environment, folder / "environment.json")
    return table


def data_checksum(bench: Bench) -> str:
    """sha256 of the decoded validation pictures with their names and labels: the same pictures give the same sum."""
    digest = hashlib.sha256(bench.valid.pixels.numpy().tobytes())
    for picture in bench.valid.pictures:
        digest.update(f"{picture.file}\0{picture.label}\n".encode())
    return digest.hexdigest()


def compare(table: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """How many times smaller and faster than the baseline each variant is, and what it costs in Top-1 points."""
    ran = table[table["status"] == "ok"]
    base = ran[ran["variant"] == baseline].set_index("batch")
    rows = []
    for (variant, batch), row in ran.set_index(["variant", "batch"]).iterrows():
        rows.append(
            {
                "variant": variant,
                "batch": int(batch),
                "times smaller": base.loc[batch, "model_mb"] / row["model_mb"],
                "times lower latency": base.loc[batch, "latency_p50_ms"] / row["latency_p50_ms"],
                "times the throughput": row["throughput_img_s"] / base.loc[batch, "throughput_img_s"],
                "Top-1 points": 100 * (row["top1"] - base.loc[batch, "top1"]),
            }
        )
    return pd.DataFrame(rows).set_index(["variant", "batch"])


def pixels_seen(picture: data.Picture, pre: preprocess.Preprocess) -> torch.Tensor:
    """The normalised tensor (3, h, w) the network gets for one picture, for looking at."""
    return pre.normalise(pre.resize(picture.open())[None])[0]


def readable_device_times(device_times: pd.DataFrame) -> pd.DataFrame:
    """The totals of `device_time` for a report: milliseconds, and kernel names cut to what tells them apart."""
    return pd.DataFrame(
        {
            "variant": device_times["variant"],
            "batch": device_times["profiled_batch"],
            "kernels a pass": device_times["kernels_per_pass"],
            "device time (ms)": device_times["device_time_us"] / 1000,
            "attention (ms)": device_times["attention_device_time_us"] / 1000,
            "not attributed (%)": 100 * device_times["unattributed_share"],
            "attention kernel": device_times["attention_kernel"].str.removeprefix("void ").str.slice(0, 55),
        }
    )


def readable(table: pd.DataFrame) -> "pd.io.formats.style.Styler":
    """The table of variants for a report: the columns one compares, rounded, with the reason of a missing row."""
    columns = {
        "variant": "variant",
        "batch": "batch",
        "model_mb": "weights (MB)",
        "peak_memory_mb": "peak (MB)",
        "latency_p50_ms": "P50 (ms)",
        "throughput_img_s": "images/s",
        "top1": "Top-1 (%)",
        "top5": "Top-5 (%)",
        "agreement_with_baseline": "agrees (%)",
        "logit_kl": "KL (nats)",
        "reason": "not run because",
    }
    shown = table.assign(**{key: 100 * table[key] for key in ("top1", "top5", "agreement_with_baseline")})
    shown = shown[list(columns)].rename(columns=columns)
    formats = {
        name: "{:.2f}" for name in ("peak (MB)", "weights (MB)", "P50 (ms)", "Top-1 (%)", "Top-5 (%)", "agrees (%)")
    }
    formats |= {"batch": "{:.0f}", "images/s": "{:,.0f}", "KL (nats)": "{:.1e}"}
    return shown.style.format(formats, na_rep="–").hide(axis="index")


def headline(table: pd.DataFrame, ratios: pd.DataFrame, bench: Bench) -> str:
    """What the records say, in a few sentences (Markdown)."""
    lines = []
    for name in bench.engines:
        if name == bench.baseline:
            continue
        rows = ratios.loc[name]
        small, large = rows.iloc[0], rows.iloc[-1]
        agreement = table.loc[table["variant"] == name, "agreement_with_baseline"].iloc[0]
        lines.append(
            f"- **{name}** is {small['times smaller']:.1f} times smaller than {bench.baseline}; its latency is "
            f"{_faster(small['times lower latency'])} at batch {rows.index[0]:.0f} and "
            f"{_faster(large['times lower latency'])} at batch {rows.index[-1]:.0f}. It agrees on "
            f"{100 * agreement:.1f} % of the pictures, and Top-1 moves by {small['Top-1 points']:+.2f} points."
        )
    lines += [f"- **{name}** did not run: {reason}." for name, reason in bench.reasons.items()]
    return "\n".join(lines)


def _faster(ratio: float) -> str:
    return f"{ratio:.2f} times lower" if ratio >= 1 else f"{1 / ratio:.2f} times higher"
