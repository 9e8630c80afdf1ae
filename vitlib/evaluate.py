"""The sections of notebook 2: every variant through one pipeline. Level 3."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from vitlib import checkpoint, engine, files, provenance, records, sources, stats, verify
from vitlib.engine import Engine
from vitlib.params import Parameters, used_by
from vitlib.records import NO_BREAK
from vitlib.sources import Dataset, Decoded, Labels
from vitlib.variants import Variant, find


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
    checkpoint.quiet_libraries()
    device = checkpoint.pick_device(settings.device)
    checkpoints = files.study_folder(settings.study) / "checkpoints"
    variants = [find(name) for name in settings.variants]
    engines: dict[str, Engine] = {}
    reasons: dict[str, str] = {}
    sizes = tuple(sorted({*settings.batch_sizes, settings.eval_batch_size, settings.profile_batch_size}))
    for variant in variants:
        try:
            engines[variant.name] = Engine(checkpoint.load(checkpoints, variant, device), variant.execution, sizes)
        except (checkpoint.NotRun, torch.OutOfMemoryError) as reason:
            if variant is variants[0]:
                raise
            reasons[variant.name] = files.first_line(reason)
    first = engines[variants[0].name].loaded
    first.labels.check(dataset, "valid")
    _same_preprocessing(engines)
    _one_training(engines, checkpoints)
    valid = sources.decode_splits(dataset, ["valid"], first.preprocess, settings.workers)["valid"]
    found = {name: verify.evidence(engine_.loaded.model) for name, engine_ in engines.items()}
    return Bench(variants, engines, reasons, first.labels, device, valid, checkpoints, found)


def _same_preprocessing(engines: dict[str, Engine]) -> None:
    described = {name: engine_.loaded.preprocess.describe() for name, engine_ in engines.items()}
    first = next(iter(described))
    for name, settings in described.items():
        if settings != described[first]:
            raise checkpoint.CheckpointError(
                f"{name} and {first} were saved with different preprocessing ({settings} against {described[first]}): "
                "run 1_finetune again, so that all checkpoints come from one training"
            )


def _one_training(engines: dict[str, Engine], checkpoints: Path) -> None:
    """CheckpointError where a quantized checkpoint was made from other weights than the merged one beside it."""
    merged, labels = checkpoints / "merged", checkpoint.read_labels(checkpoints / "merged")
    checksum = files.checksum(merged / "model.safetensors")
    for name, engine_ in engines.items():
        made_from = checkpoint.merged_checksum(engine_.loaded.folder)
        if engine_.loaded.labels != labels or made_from not in ("", checksum):
            raise checkpoint.CheckpointError(
                f"{name} was quantized from other weights or labels than {merged.name}/ holds: run 1_finetune again, "
                "so that all checkpoints come from one training"
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


def tuning(bench: Bench, settings: Parameters) -> pd.DataFrame:
    """The paths that fused variants took, a row a variant, layer format and path; `records/tuning.csv` has all timed.

    A column a batch size: the median µs of the layer shapes that took the path there, missing where none did.
    """
    frame = engine.tunings(bench.engines, "variant")
    if frame.empty:
        return frame
    records.write_table(frame, files.study_folder(settings.study) / "records" / "tuning.csv")
    taken = frame[frame["chosen"]]
    table = taken.groupby(["variant", "layer", "path", "batch"], sort=False)["us"].median().unstack()
    table = table.rename(columns={size: f"batch {size} (µs)" for size in table}).reset_index()
    return table.rename(columns={"layer": "layers", "path": "path taken"}).rename_axis(columns=None)


def outputs(bench: Bench, settings: Parameters) -> dict[str, torch.Tensor]:
    """float32 logits (n, classes) of the validation split for each variant; kept in `records/logits.npz`."""
    found = {
        name: engine.logits(engine_, bench.valid.pixels, settings.eval_batch_size)
        for name, engine_ in bench.engines.items()
    }
    arrays = {name: values.numpy() for name, values in found.items()}
    target = files.study_folder(settings.study) / "records" / "logits.npz"
    with files.atomic_path(target) as path, open(path, "wb") as file:
        np.savez_compressed(file, labels=bench.labels.ids(bench.valid.pictures).numpy(), **arrays)
    return found


def accuracy(bench: Bench, logits: dict[str, torch.Tensor], settings: Parameters) -> pd.DataFrame:
    """Accuracy with its uncertainty, a row a variant; written to `records/accuracy.csv`.

    Beside Top-1, Top-5 and weighted F1: right answers of n with Wilson's interval; pictures lost and gained against the
    baseline with McNemar's exact p, adjusted by Holm over the rows; the paired difference with a bootstrap and a
    score interval; flips; mean KL from the baseline with its interval; and a verdict (`stats.verdict`).
    """
    labels = bench.labels.ids(bench.valid.pictures).numpy()
    base = logits[bench.baseline].numpy()
    rows = [_accuracy_row(name, values.numpy(), base, labels, settings.seed) for name, values in logits.items()]
    frame = pd.DataFrame(rows)
    other = frame["variant"] != bench.baseline
    frame["holm_p"] = np.nan
    frame.loc[other, "holm_p"] = stats.holm(frame.loc[other, "mcnemar_p"].to_numpy())
    bounds = zip(frame["difference"], frame["difference_low"], frame["difference_high"], frame["holm_p"], strict=True)
    frame["verdict"] = [
        stats.verdict(difference=stats.Interval(d, low, high), p_adjusted=p, margin=settings.margin)
        for d, low, high, p in bounds
    ]
    frame.loc[~other, "verdict"] = "baseline"
    records.write_table(frame, files.study_folder(settings.study) / "records" / "accuracy.csv")
    return frame


def _accuracy_row(name: str, found: np.ndarray, base: np.ndarray, labels: np.ndarray, seed: int) -> dict[str, object]:
    right, base_right = (stats.topk_right(values, labels, 1) for values in (found, base))
    low, high = stats.wilson(int(right.sum()), len(labels))
    test, score = stats.mcnemar(base_right, right), stats.paired_difference(base_right, right)
    resampled = stats.paired_bootstrap(right.astype(float) - base_right.astype(float), seed=seed)
    kl = stats.paired_bootstrap(stats.kl_divergence(base, found), seed=seed)
    predicted, expected = found.argmax(axis=1), base.argmax(axis=1)
    return {
        "variant": name,
        "n": len(labels),
        "right": int(right.sum()),
        "top1": right.mean(),
        "top1_low": low,
        "top1_high": high,
        "top5": stats.topk_accuracy(found, labels, 5),
        "f1_weighted": stats.f1_weighted(labels, predicted),
        "agreement_with_baseline": float((predicted == expected).mean()),
        "flips": stats.flips(expected, predicted),
        "lost": test.lost,
        "gained": test.gained,
        "mcnemar_p": test.p,
        "difference": score.estimate,
        "difference_low": score.low,
        "difference_high": score.high,
        "bootstrap_low": resampled.low,
        "bootstrap_high": resampled.high,
        "logit_kl": kl.estimate,
        "logit_kl_low": kl.low,
        "logit_kl_high": kl.high,
    }


def variants_table(
    bench: Bench,
    settings: Parameters,
    *,
    quality: pd.DataFrame,
    speeds: pd.DataFrame,
    memories: pd.DataFrame,
    cpu: pd.Series,
    device_times: pd.DataFrame,
    clocks: dict[str, object],
) -> pd.DataFrame:
    """All measurements joined, a row a variant and batch size, written to `records/variants.csv`.

    Accuracy, device time (of `profiled_batch` pictures) and CPU latency (of one picture) do not depend on the row's
    batch size and repeat. A variant that did not run has one row with its reason.
    """
    measured = speeds.merge(memories, on=["variant", "batch"], validate="one_to_one")
    measured = measured.merge(quality, on="variant")
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
    folder = files.study_folder(settings.study) / "records"
    records.write_table(table, folder / "variants.csv")
    environment = provenance.environment(
        parameters=used_by(settings, "2_evaluate"),
        seeds={"study": settings.seed},
        checksums={"weights": files.checksum(bench.checkpoints / "merged"), "data": data_checksum(bench)},
    )
    records.write_json(environment | {"while_measuring": clocks}, folder / "environment.json")
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
            "attention kernel": device_times["attention_kernel"].str.removeprefix("void ").map(_short),
        }
    )


def _short(kernel: str) -> str:
    return kernel if len(kernel) <= 40 else kernel[:39] + "…"


def readable_accuracy(quality: pd.DataFrame) -> "pd.io.formats.style.Styler":
    """The accuracy table for a report: percentages with intervals, tests and verdict."""
    bounds = zip(quality["top1_low"], quality["top1_high"], strict=True)
    shown = pd.DataFrame(
        {
            "variant": quality["variant"],
            f"right of {quality['n'].iloc[0]}": quality["right"],  # all see the same pictures
            "Top-1 (%)": 100 * quality["top1"],
            "95 % interval": [f"{100 * low:.1f} … {100 * high:.1f}".replace(" ", NO_BREAK) for low, high in bounds],
            "Top-5 (%)": 100 * quality["top5"],
            "F1": quality["f1_weighted"],
            "flips": quality["flips"],
            "lost": quality["lost"],
            "gained": quality["gained"],
            "Holm p": quality["holm_p"],
            "KL (nats)": quality["logit_kl"],
            "verdict": quality["verdict"],
        }
    )
    formats = {"Top-1 (%)": "{:.2f}", "Top-5 (%)": "{:.2f}", "F1": "{:.4f}", "Holm p": "{:.3f}", "KL (nats)": "{:.1e}"}
    text = [list(shown).index(name) for name in ("variant", "verdict")]
    left = [{"selector": f".col{number}", "props": "text-align: left"} for number in text]
    return shown.style.format(formats, na_rep="–").set_table_styles(left).hide(axis="index")


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
    if not shown["reason"].astype(bool).any():
        del columns["reason"]
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
        small, own = rows.iloc[0], table[table["variant"] == name].set_index("batch")
        agreement = own["agreement_with_baseline"].iloc[0]
        latencies = []
        for batch in dict.fromkeys((rows.index[0], rows.index[-1])):
            found = _faster(rows.loc[batch, "times lower latency"], own.loc[batch, "against_baseline"])
            latencies.append(f"{found} at batch {batch:.0f}")
        lines.append(
            f"- **{name}**: its weights are {small['times smaller']:.1f} times smaller than those of {bench.baseline}; "
            f"its latency is {' and '.join(latencies)}. It agrees on "
            f"{100 * agreement:.1f} % of the pictures, and Top-1 moves by {small['Top-1 points']:+.2f} points."
        )
    lines += [f"- **{name}** did not run: {reason}." for name, reason in bench.reasons.items()]
    return "\n".join(lines)


def _faster(ratio: float, verdict: str) -> str:
    if verdict in ("same", "not shown"):
        return "the same" if verdict == "same" else "not shown to differ"
    return f"{ratio:.2f} times lower" if ratio >= 1 else f"{1 / ratio:.2f} times higher"
