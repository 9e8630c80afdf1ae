"""Notebook 2: what each variant costs and what it brings, all through one pipeline."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
import torch

from vitlib.measure import benchmark, profile, roofline, timing
from vitlib.measure.profile import PARTS as PARTS
from vitlib.measure.stats import Interval
from vitlib.network import checkpoint, engine, verify
from vitlib.network.engine import Engine
from vitlib.network.testbench import Bench, engines_of
from vitlib.network.testbench import prepare as prepare
from vitlib.network.tuning import relative_error
from vitlib.report import plots
from vitlib.report.tables import Markdown, number
from vitlib.study import files, provenance
from vitlib.study.params import used_by
from vitlib.study.study import Study
from vitlib.study.variants import FORMATS, Variant, label

open = Study.open


def status(bench: Bench) -> pd.DataFrame:
    """What each variant really is (module classes, dtypes), or why it did not run; see `checkpoint.whole`."""
    rows = []
    for name in (variant.name for variant in bench.variants):
        found = bench.evidence.get(name, {"encoder_linears": {}, "dtypes": []})
        linears = ", ".join(f"{count} {kind}" for kind, count in found["encoder_linears"].items())
        runs = "runs" if found.get("verified", True) else "runs, its files are unverified"
        said = f"not run: {bench.reasons[name]}" if name in bench.reasons else runs
        rows.append((name, said, linears, ", ".join(found["dtypes"])))
    return pd.DataFrame(rows, columns=["variant", "status", "linear layers of the encoder", "other weights"])


def tuning(study: Study, bench: Bench) -> pd.DataFrame:
    """The kernels of fused variants, all that were timed in `records/tuning.csv`; empty, without record, if none."""
    frame = engine.tunings(bench.engines, "variant")
    return benchmark.chosen(frame if frame.empty else study.write("tuning", frame))


def outputs(study: Study, bench: Bench) -> dict[str, torch.Tensor]:
    """float32 logits (n, classes) of the validation split for each variant; also in `records/logits.npz`."""
    pixels, size = bench.valid.pixels, study.settings.eval_batch_size
    found = {name: engine.logits(each, pixels, size) for name, each in bench.engines.items()}
    with files.atomic_path(study.record("logits.npz")) as path, path.open("wb") as file:
        arrays = {name: values.numpy() for name, values in found.items()}
        np.savez_compressed(file, labels=bench.labels.ids(bench.valid.pictures).numpy(), **arrays)
    return found


def accuracy(study: Study, bench: Bench, logits: Mapping[str, torch.Tensor]) -> pd.DataFrame:
    """`benchmark.accuracy` of the logits of `outputs`; written to `records/accuracy.csv`."""
    labels = bench.labels.ids(bench.valid.pictures).numpy()
    arrays = {name: values.numpy() for name, values in logits.items()}
    how = {"margin": study.settings.margin, "seed": study.settings.seed}
    return study.write("accuracy", benchmark.accuracy(arrays, labels, bench.baseline, **how))


def against_reference(study: Study, bench: Bench, logits: Mapping[str, torch.Tensor]) -> pd.DataFrame:
    """Outputs of each variant against those of the eager network with the same weights, a row a batch size.

    On a GPU, fused variants and CUDA graphs have kernels of their own for each batch size; all else is compared at the
    evaluation's. NaN where the reference is the variant itself or did not run.
    """
    rows = []
    for variant in bench.ran():
        reference = Variant(variant.format.reference).name
        for size in study.settings.batch_sizes:
            error = agreement = np.nan
            if reference in logits and reference != variant.name:
                own, expected = logits[variant.name], logits[reference]
                if (variant.fused or variant.graphed) and bench.device.type == "cuda":
                    own = engine.logits(bench.engines[variant.name], bench.valid.pixels, size)
                error = relative_error(own, expected)
                error = np.inf if np.isnan(error) else error  # missing means not measured
                agreement = (own.argmax(1) == expected.argmax(1)).double().mean().item()
            rows.append((variant.name, size, reference, error, agreement))
    return pd.DataFrame(rows, columns=["variant", "batch", "reference", "relative_error", "agreement_with_reference"])


def measure(study: Study, bench: Bench) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, object]]:
    """Measure latency and throughput of all variants and batch sizes, in turns in random order.

    Returns the latency samples (as `records/latency.csv`), the table of `benchmark.speed`, and the GPU's clocks.
    """
    settings = study.settings
    budget = timing.Budget(settings.rounds, settings.samples, settings.round_seconds)
    calls = {(n, size): bench.calls(run, size) for n, run in bench.engines.items() for size in settings.batch_sizes}
    with provenance.monitored(seconds=2.0) as clocks:
        latencies = timing.latency(calls, bench.device, budget, settings.seed)
        # Queued calls are averages already: a third of the time is enough.
        shorter = dataclasses.replace(budget, seconds=budget.seconds / 3)
        rates = timing.throughput(calls, {key: key[1] for key in calls}, bench.device, shorter, settings.seed)
    latencies, rates = (_in_order(frame, list(bench.engines)) for frame in (latencies, rates))
    study.write("latency", latencies)
    study.write("throughput", rates)
    table = benchmark.speed(latencies, rates, bench.baseline)
    table.attrs = latencies.attrs
    return latencies, table, clocks


def _in_order(frame: pd.DataFrame, variants: list[str]) -> pd.DataFrame:
    """Samples with their candidate as variant and batch, ordered by the study's variants, then batch, then time."""
    names = pd.DataFrame(frame["candidate"].tolist(), columns=["variant", "batch"])
    frame = names.join(frame.drop(columns="candidate")).sort_values("batch", kind="stable")
    return frame.sort_values("variant", key=lambda names: names.map(variants.index), kind="stable", ignore_index=True)


def cpu_latency(study: Study, bench: Bench, latencies: pd.DataFrame) -> pd.DataFrame:
    """Median latency of one picture on this machine's CPU in `cpu_latency_ms`, for variants without a CUDA graph.

    On a CPU it is among the `latencies` of `measure`, where that has batch size 1.
    """
    cpu, cuda = torch.device("cpu"), bench.device.type == "cuda"
    samples = latencies[(latencies["batch"] == 1) & (not cuda)]
    if samples.empty:
        # Beside a GPU only unquantized ones: bitsandbytes takes seconds per picture for ViT-L/16 on a CPU.
        chosen = [v for v in bench.ran() if not v.graphed and not (v.quantized and cuda)]
        engines, _ = engines_of(chosen if study.settings.cpu_samples else [], bench.checkpoints, cpu, (1,))
        calls = {name: bench.calls(runner, 1) for name, runner in engines.items()}
        budget = timing.Budget(rounds=2, samples=study.settings.cpu_samples, seconds=5.0)
        samples = timing.latency(calls, cpu, budget, study.settings.seed).rename(columns={"candidate": "variant"})
    return samples.groupby("variant", sort=False)["latency_ms"].median().rename("cpu_latency_ms").reset_index()


def memory(study: Study, bench: Bench) -> pd.DataFrame:
    """Weights in memory and on disk, and the peak of a forward pass, in MB, a row a variant and batch size.

    `held_mb` is `model_mb` with the buffers for dequantized weights, `peak_above_weights_mb` what a pass allocates at
    its peak (with what a CUDA graph holds from capture on), `peak_memory_mb` the sum with the weights, `reserved_mb`
    what the caching allocator must get for it. `prepare_s` is the time to transform, tune and capture.
    """
    rows, cuda = [], bench.device.type == "cuda"
    for name, runner in bench.engines.items():
        weights = runner.loaded.weights_mb
        own = {"variant": name, "model_mb": weights, "held_mb": weights + runner.buffers_mb}
        own |= {"disk_mb": checkpoint.disk_mb(runner.loaded.folder), "prepare_s": runner.prepare_s}
        for size in study.settings.batch_sizes:
            allocated, reserved = timing.peak_memory_mb(bench.calls(runner, size), bench.device)
            pool = runner.pool_mb.get(size, 0.0)
            peak, reserved = allocated + pool, reserved + pool
            row = own | {"batch": size, "peak_above_weights_mb": peak, "peak_memory_mb": weights + peak}
            # What other engines left free in their blocks may have served this pass too.
            row["reserved_mb"] = weights + max(reserved, peak) if cuda else np.nan
            rows.append(row | {"peak_vram_mb": weights + peak if cuda else np.nan})
    return pd.DataFrame(rows)


def device_time(study: Study, bench: Bench) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, str]]:
    """Profile a pass of every variant, for `records/kernels.csv` and `records/traces/`; refuse by `verify`.

    Returns kernels by part of the model (as in the record), their totals a row a variant, and why variants that are not
    what their name says are refused. A CUDA graph has no module ranges, so its network is profiled kernel by kernel.
    """
    size, frames, rows, refused = study.settings.profile_batch_size, [], [], {}
    for variant in bench.ran():
        runner = bench.engines[variant.name]
        call = bench.calls(Engine(runner.loaded), size)
        trace = study.record(f"traces/{variant.name}.json.gz")
        frame = profile.profile(lambda call=call: call(0), runner.network, bench.device, trace=trace)
        if fault := verify.identity_fault(variant, frame):
            refused[variant.name] = f"identity gate: {fault}"
            continue
        ran = ("fused" if variant.fused else "eager") + "; its graph dequantizes whole blocks" * runner.by_block(size)
        row = {"variant": variant.name, "profiled_batch": size, "profiled_execution": ran}
        row |= {"device_time_us": frame.attrs["total_us"], "kernels_per_pass": frame["calls"].sum()}
        row |= {"attention_device_time_us": profile.attention_time_us(frame)}
        row |= {"attention_kernel": profile.attention_kernel(frame)}
        rows.append(row | {"unattributed_share": frame.attrs["unattributed_share"]})
        frames.append(frame.assign(variant=variant.name, batch=size))
    return study.write("kernels", pd.concat(frames, ignore_index=True)), pd.DataFrame(rows), refused


def against_the_roofline(study: Study, bench: Bench, kernels: pd.DataFrame) -> pd.DataFrame:
    """TFLOP/s and GB/s of each variant's parts and the ceilings measured here; written to `records/roofline.csv`."""
    peak, frames = roofline.ceilings(bench.device), []
    for variant in bench.ran():
        loaded = bench.engines[variant.name].loaded
        sizes = {"bytes_per_weight": verify.encoder_bytes_per_weight(loaded.model)}
        sizes |= {"bytes_per_value": loaded.dtype.itemsize, "class_token_only": variant.fused}
        counted = roofline.work(loaded.model.config, study.settings.profile_batch_size, **sizes)
        times, dtype = profile.by_part(kernels[kernels["variant"] == variant.name]), str(loaded.dtype)[len("torch.") :]
        frame = roofline.achieved(counted, times, peak, dtype, linears=variant.format.product or dtype)
        frame["share_of_time"] = times / times.sum()
        frames.append(frame.rename_axis("part").reset_index().assign(variant=variant.name))
    return study.write("roofline", pd.concat(frames, ignore_index=True))


def validity(
    study: Study, bench: Bench, latencies: pd.DataFrame, totals: pd.DataFrame, clocks: dict[str, object]
) -> pd.DataFrame:
    """`benchmark.validity` of this run; written to `records/validity.csv`."""
    throttled = "; ".join(clocks.get("throttle_reasons", [])) or "no"
    ran = f"{len(bench.engines)}, {len(bench.reasons)}"
    facts = {"variants run, refused with a reason": ran, "clocks throttled while measuring": throttled}
    share = totals["unattributed_share"].max()
    errors = {"largest share of device time not attributed": (share, verify.ATTRIBUTION_LIMIT)}
    errors |= {"error for a call of 5 ms": (timing.known_duration_error(5.0), 0.025)}
    errors |= {"error for a tensor of 64 MB": (timing.known_tensor_error(64.0), 0.02)}
    return study.write("validity", benchmark.validity(latencies, bench.baseline, facts=facts, errors=errors))


def variants_table(study: Study, bench: Bench, *measured: pd.DataFrame, clocks: dict | None = None) -> pd.DataFrame:
    """All measurements in one table, a row a variant and batch size; written to `records/variants.csv`.

    `measured` are tables by variant, or by variant and batch: what does not depend on the batch size repeats. A variant
    that did not run has one row with its reason. `records/environment.json` gets hardware, versions, parameters,
    checksums and the GPU's `clocks`.
    """
    rows = [(v.name, v.weights, v.attention, v.execution, v.gelu) for v in bench.variants]
    facts = pd.DataFrame(rows, columns=["variant", "weights", "attention", "execution", "gelu"])
    facts["status"] = ["ok" if name in bench.engines else "not run" for name in facts["variant"]]
    facts["reason"] = [bench.reasons.get(name, "") for name in facts["variant"]]
    table = functools.reduce(lambda left, right: left.merge(right, how="left"), measured, facts)
    sums = {"weights": files.checksum(study.checkpoint("merged")), "data": bench.data_checksum()}
    used, seeds = used_by(study.settings, "2_evaluate"), {"study": study.settings.seed}
    environment = provenance.environment(parameters=used, seeds=seeds, checksums=sums)
    study.write_json("environment", environment | {"while_measuring": clocks or {}})
    return study.write("variants", table)


def hero(study: Study, table: pd.DataFrame) -> plots.Plot:
    """Size against latency of five variants of `variants_table`; also written to `hero.svg` beside the reports."""
    return plots.hero(benchmark.points(table)).saved(study.folder / "hero.svg")


def headline(table: pd.DataFrame, checks: pd.DataFrame) -> Markdown:
    """What the table of variants and the checks of `validity` say, in three or four sentences."""
    ran = table[table["status"] == "ok"]
    others = ran[ran["variant"] != table["variant"].iloc[0]].drop_duplicates("variant").set_index("variant")
    lines = [_finding(benchmark.points(table)), _out_of_the_box(ran)]
    if len(others):
        lines.append(_quality(others))
    missing = table[table["status"] != "ok"].groupby("reason", sort=False)["variant"]
    limits = [f"**Not run**: {_listed(names)} ({reason})." for reason, names in missing]
    lines.append(" ".join(filter(None, [*limits, benchmark.failed(checks)])))
    return Markdown("\n".join(f"- {line}" for line in lines if line))


def _finding(points: pd.DataFrame) -> str:
    """What the best of `benchmark.points` gains and loses against the baseline; its first sentence is the finding."""
    base, batch = points.iloc[0], f"at batch size {points['batch'].iloc[0]:.0f}"
    if not points["best"].any():
        ms, mb = number(base["latency_p50_ms"]), number(base["model_mb"])
        return f"{label(base['variant'])} takes {ms} ms {batch} and {mb} MB."
    best = points[points["best"]].iloc[0]
    compared, smaller = _compared(best), _smaller(base["model_mb"] / best["model_mb"])
    change, low, high = (f"{100 * best[f'difference{side}']:+.1f}" for side in ("", "_low", "_high"))
    moved = f"Top-1 changes by {change} points (95 % interval {low} … {high})"
    moved = moved if best["flips"] else "no picture changes class"
    if best["against_baseline"] in ("faster", "slower"):
        speed = compared.partition(" (")[0]
        said = f"is **{speed}** than {base['weights'].upper()} {batch} and **{smaller}**; {moved}."
    else:
        said = f"is **{smaller}** than {base['weights'].upper()}; {moved}. Latency {batch}: {compared}."
    whole = f"With all that a call needs it is {_smaller(base['peak_memory_mb'] / best['peak_memory_mb'])}."
    return f"{label(best['variant'])} {said} {whole}"


def _smaller(times: float) -> str:
    if 1 / 1.05 < times < 1.05:
        return "no smaller"
    return f"{times:.1f} times smaller" if times > 1 else f"{1 / times:.1f} times larger"


def _compared(row: pd.Series) -> str:
    """How the latency of a row compares with the baseline's."""
    times = Interval(*(row[f"times_baseline{side}"] for side in ("", "_low", "_high")))
    return benchmark.in_words(times, row["against_baseline"], int(row["rounds"]))


def _out_of_the_box(ran: pd.DataFrame) -> str:
    """What quantization out of the box does to latency at the smallest batch size; '' where it did not run."""
    first = ran[ran["batch"] == ran["batch"].min()].set_index("variant")
    plain = (Variant(name).name for name, row in FORMATS.items() if row.bits < 16 and not row.fused_only)
    found = [f"{label(name)} {_compared(first.loc[name])}" for name in plain if name in first.index[1:]]
    said = f"**Quantized out of the box**, batch size {first['batch'].iloc[0]:.0f}: {', '.join(found)}."
    return said if found else ""


def _quality(rows: pd.DataFrame) -> str:
    n, worst, most = int(rows["n"].iloc[0]), str(rows["flips"].idxmax()), int(rows["flips"].max())
    flips = f"at most {most} of {n} pictures change class ({label(worst)})" if most else "no picture changes class"
    names = {verdict: _listed(own) for verdict, own in rows.groupby("verdict").groups.items()}
    if different := names.get("different"):
        said = f"differs from the baseline's for {different}"
    elif unknown := names.get("not shown"):
        said = f"is not shown to differ, but {n} pictures do not exclude a relevant loss for {unknown}"
    else:
        said = "of every variant is non-inferior to the baseline's"
    return f"**Accuracy** {said}; {flips}."


def _listed(names: Iterable[str], most: int = 3) -> str:
    """Variants in words, those beyond `most` as a number."""
    words = [label(name) for name in names]
    return ", ".join(words) if len(words) <= most + 1 else f"{', '.join(words[:most])} and {len(words) - most} more"
