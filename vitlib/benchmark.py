"""Speed and memory of every variant of a bench, behind a gate that lets nothing through under a wrong name. Level 3."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from vitlib import files, models, profile, records, roofline, stats, timing
from vitlib.engine import Engine
from vitlib.evaluate import Bench
from vitlib.monitor import Monitor
from vitlib.params import Parameters
from vitlib.records import NO_BREAK
from vitlib.variants import Variant

ROTATING = 4  # different batches that a timed call cycles through, so that its input is not always in cache
ATTRIBUTION_LIMIT = 0.05  # of the device time
CLOCKS_AGREE = 0.02  # wall clock against device events
# The ceiling that linear layers of some weights are held against, a key of `roofline.Ceilings.tflops`.
EIGHT_BIT_PRODUCTS = {"int8": "int8", "w8a8": "int8", "fp8": "fp8"}
KNOWN_MS, KNOWN_MB = 5.0, 64.0
# What the kernel of an attention that names its backend is called.
_KERNELS_OF = {
    "direct_cudnn": ("cudnn",),
    "direct_efficient": ("fmha_cutlass", "efficient"),
    "direct_fa": ("pytorch_flash",),
}
SIMULATED = 100


class GateError(RuntimeError):
    """The baseline is not what it is called, or the instruments do not agree; nothing may be compared with it."""


def every_call(
    engines: Mapping[str, Engine], pixels: torch.Tensor, batch_sizes: Iterable[int]
) -> dict[tuple[str, int], Callable[[int], torch.Tensor]]:
    """`rotating_calls` of each engine and batch size, by both."""
    return {(name, size): rotating_calls(run, pixels, size) for name, run in engines.items() for size in batch_sizes}


def rotating_calls(engine: Engine, pixels: torch.Tensor, size: int) -> Callable[[int], torch.Tensor]:
    """A call of one batch of `size` that cycles through different pictures already on the device, normalised."""
    loaded, total = engine.loaded, len(pixels)
    batches = [
        loaded.preprocess.normalise(
            pixels[torch.arange(k * size, (k + 1) * size) % total].to(loaded.device), loaded.dtype
        )
        for k in range(ROTATING)
    ]
    return lambda number: engine(batches[number % ROTATING])


# ------------------------------------------------------------------------------------------------- device time


def device_time(bench: Bench, settings: Parameters) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Profile one pass of every variant and refuse those that are not what they are called.

    Returns the kernels by part of the model (written to `records/kernels.csv`) and totals a variant. A variant whose
    kernels contradict its name leaves the bench with the reason. A Chrome trace of each goes to `records/traces/`.
    Variants that replay a CUDA graph or compiled code have no module ranges; their network is profiled eagerly.
    """
    size, frames, rows = settings.profile_batch_size, [], []
    folder = files.study_folder(settings.study) / "records"
    for variant in [variant for variant in bench.variants if variant.name in bench.engines]:
        loaded = bench.engines[variant.name].loaded
        call = rotating_calls(Engine(loaded), bench.valid.pixels, size)
        trace = folder / "traces" / f"{variant.name}.json.gz"
        frame = profile.profile(lambda call=call: call(0), loaded.model, bench.device, trace=trace)
        if fault := identity_fault(variant, frame):
            _refuse(bench, variant, fault)
            continue
        rows.append(
            {
                "variant": variant.name,
                "profiled_batch": size,
                # graph and compiled rows too: only modules have parts
                "profiled_execution": _profiled_execution(variant, bench.engines[variant.name], size),
                "device_time_us": frame.attrs["total_us"],
                "attention_device_time_us": profile.attention_time_us(frame),
                "attention_kernel": profile.attention_kernel(frame),
                "kernels_per_pass": frame["calls"].sum(),
                "unattributed_share": frame.attrs["unattributed_share"],
            }
        )
        frames.append(frame.assign(variant=variant.name, batch=size))
    kernels = pd.concat(frames, ignore_index=True)
    records.write_table(kernels, folder / "kernels.csv")
    return kernels, pd.DataFrame(rows)


def _profiled_execution(variant: Variant, runner: Engine, size: int) -> str:
    """What was profiled; also of graphs and compiled code it is the network's modules, launched one by one."""
    if not variant.fused:
        return "eager"
    return "fused" + ("; its graph dequantizes whole blocks at once" if runner.by_block(size) else "")


def _refuse(bench: Bench, variant: Variant, fault: str) -> None:
    if variant.name == bench.baseline:
        raise GateError(f"the baseline {variant.name} is not what it is called: {fault}")
    del bench.engines[variant.name]
    bench.reasons[variant.name] = f"identity gate: {fault}"


def identity_fault(variant: Variant, frame: pd.DataFrame) -> str:
    """What in the profiled kernels contradicts `variant` ('' if nothing does).

    FlashAttention-2's own kernels live in the namespace `flash::`, PyTorch's copy of them in `pytorch_flash::`.
    """
    kernel = profile.attention_kernel(frame)
    if profile.attention_time_us(frame) <= 0:
        return "the profiler saw no attention function"
    if frame.attrs["unattributed_share"] > ATTRIBUTION_LIMIT:
        return f"{frame.attrs['unattributed_share']:.1%} of the device time belongs to no part of the model"
    own = "flash::flash_fwd" in kernel and "pytorch_flash" not in kernel
    if own != variant.own_flash:
        return f"attention ran in {kernel}"
    if not any(part in kernel for part in _KERNELS_OF.get(variant.attention, ("",))):
        return f"attention ran in {kernel}"
    unfused = variant.attention in ("eager", "direct_math")
    if unfused and any(part in kernel for part in ("scaled_dot_product", "fmha", "sdpa", "flash")):
        return f"attention ran fused, in {kernel}"
    through_bitsandbytes = frame["operation"].str.startswith("bitsandbytes::").any()
    if variant.fused and variant.quantized:  # several libraries can compute these; `models.verify` saw the layers
        return ""
    if through_bitsandbytes != variant.quantized:
        return "bitsandbytes was " + ("not used" if variant.quantized else "used")
    return ""


def against_the_roofline(
    bench: Bench, settings: Parameters, kernels: pd.DataFrame, peak: roofline.Ceilings
) -> pd.DataFrame:
    """Achieved TFLOP/s and GB/s of each variant's parts beside the measured ceilings; `records/roofline.csv`."""
    frames, weights = [], {variant.name: variant.weights for variant in bench.variants}
    for name, engine in bench.engines.items():
        loaded = engine.loaded
        counted = roofline.work(
            loaded.model.config,
            batch=settings.profile_batch_size,
            bytes_per_weight=models.encoder_bytes_per_weight(loaded.model),
            bytes_per_value=loaded.dtype.itemsize,
            class_token_only=hasattr(loaded.model, "evidence"),
        )
        times = profile.by_part(kernels[kernels["variant"] == name])
        dtype = str(loaded.dtype).removeprefix("torch.")
        linears = EIGHT_BIT_PRODUCTS.get(weights[name], dtype)
        frame = roofline.achieved(counted, times, peak, dtype, linears=linears).rename_axis("part").reset_index()
        frame.insert(0, "variant", name)
        frames.append(frame)
    table = pd.concat(frames, ignore_index=True)
    records.write_table(table, files.study_folder(settings.study) / "records" / "roofline.csv")
    return table


def readable_roofline(limits: pd.DataFrame, share: float = 0.05) -> pd.DataFrame:
    """The table of `against_the_roofline` for a report: parts with at least `share` of their variant's device time."""
    total = limits.groupby("variant")["device_time_us"].transform("sum")
    shown = limits[limits["device_time_us"] >= share * total]
    return pd.DataFrame(
        {
            "variant": shown["variant"],
            "part": shown["part"],
            "device time (ms)": shown["device_time_us"] / 1000,
            "TFLOP/s": shown["tflop_s"].where(shown["gflop"] > 0),
            "of at most": shown["ceiling_tflop_s"].where(shown["gflop"] > 0),
            "GB/s": shown["gb_s"],
            "of a copy's": shown["ceiling_gb_s"].where(shown["gb_s"].notna()),
            "bound by": shown["bound"],
            "of the possible (%)": 100 * shown["share_of_floor"],
        }
    )


# ------------------------------------------------------------------------------------------ latency, throughput


def measure(bench: Bench, settings: Parameters) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, object]]:
    """Raw latency samples and throughput rounds of every variant and batch size, and the clocks meanwhile.

    All are shuffled together. Columns: variant, batch, round, sample, latency_ms, device_ms; and variant, batch, round,
    throughput_img_s. Both are written to `records/latency.csv` and `records/throughput.csv`.
    """
    budget = timing.Budget(settings.rounds, settings.samples, settings.round_seconds)
    calls = every_call(bench.engines, bench.valid.pixels, settings.batch_sizes)
    sizes = {key: key[1] for key in calls}
    folder, frames = files.study_folder(settings.study) / "records", []
    with Monitor(seconds=2.0) as clocks:
        latencies = timing.latency(calls, bench.device, budget, settings.seed)
        shorter = replace(budget, seconds=budget.seconds / 3)  # calls that are queued average themselves
        throughputs = timing.throughput(calls, sizes, bench.device, shorter, settings.seed)
    for record, frame in (("latency", latencies), ("throughput", throughputs)):
        frame.insert(0, "variant", [name for name, _ in frame["candidate"]])
        frame.insert(1, "batch", [size for _, size in frame["candidate"]])
        frames.append(_in_order(frame.drop(columns="candidate"), list(bench.engines)))
        records.write_table(frames[-1], folder / f"{record}.csv")
    return frames[0], frames[1], clocks.summary()


def _in_order(frame: pd.DataFrame, variants: list[str]) -> pd.DataFrame:
    """The shuffled samples in the order of the table of variants, of batch sizes and of time."""
    rank = frame["variant"].map(variants.index)
    return frame.assign(rank=rank).sort_values(["rank", "batch"], kind="stable", ignore_index=True).drop(columns="rank")


def speed(latencies: pd.DataFrame, throughputs: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """A row a variant and batch size: latency and throughput with bootstrap intervals over rounds.

    A percentile stands only where there are samples enough for it (see `stats.percentile`). `latency_note` says where
    wall clock and device events differ by more than 2 %. `against_baseline` is the outcome of `stats.same_or_slower`.
    """
    rows = []
    for (variant, batch), part in latencies.groupby(["variant", "batch"], sort=False):
        samples = part["latency_ms"]
        by_round = [group["latency_ms"].to_numpy() for _, group in part.groupby("round")]
        interval = stats.median_interval(by_round)
        same = (throughputs["variant"] == variant) & (throughputs["batch"] == batch)
        rates = stats.paired_bootstrap(throughputs.loc[same, "throughput_img_s"], statistic=np.median)
        reference = latencies[(latencies["variant"] == baseline) & (latencies["batch"] == batch)]
        compared = stats.same_or_slower([g["latency_ms"].to_numpy() for _, g in reference.groupby("round")], by_round)
        rows.append(
            {
                "variant": variant,
                "batch": batch,
                "latency_mean_ms": samples.mean(),
                **{f"latency_p{q}_ms": stats.percentile(samples, q) for q in (50, 95, 99)},
                "latency_low_ms": interval.low,
                "latency_high_ms": interval.high,
                "samples": len(samples),
                "latency_note": clock_note(part),
                "against_baseline": "" if variant == baseline else compared,
                "throughput_img_s": rates.estimate,
                "throughput_low_img_s": rates.low,
                "throughput_high_img_s": rates.high,
            }
        )
    return pd.DataFrame(rows)


def readable_speed(speeds: pd.DataFrame) -> pd.DataFrame:
    """The table of `speed` for a report: medians with their bounds in one column."""

    def bounds(low: str, high: str, digits: int) -> list[str]:
        pairs = zip(speeds[low], speeds[high], strict=True)
        shown = ["–" if np.isnan(a) else f"{a:,.{digits}f} … {b:,.{digits}f}" for a, b in pairs]
        return [text.replace(" ", NO_BREAK) for text in shown]

    return pd.DataFrame(
        {
            "variant": speeds["variant"],
            "batch": speeds["batch"],
            "calls": speeds["samples"],
            "P50 (ms)": speeds["latency_p50_ms"],
            "its bounds": bounds("latency_low_ms", "latency_high_ms", 2),
            "P95 (ms)": speeds["latency_p95_ms"],
            "P99 (ms)": speeds["latency_p99_ms"],
            "images/s": speeds["throughput_img_s"].round(),
            "their bounds": bounds("throughput_low_img_s", "throughput_high_img_s", 0),
            "latency against the baseline": speeds["against_baseline"],
            "the two clocks": speeds["latency_note"],
        }
    )


def clock_note(samples: pd.DataFrame) -> str:
    """'' where wall clock and device events agree within 2 %, otherwise by how much they differ and why."""
    wall, device = samples["latency_ms"].median(), samples["device_ms"].median()
    if np.isnan(device) or abs(wall - device) <= CLOCKS_AGREE * wall:
        return ""
    return f"wall clock {(wall - device) * 1e3:+.0f} µs against device events: launch and wake-up of the host"


# --------------------------------------------------------------------------------------------------------- memory


def memory(bench: Bench, settings: Parameters) -> pd.DataFrame:
    """Weights in memory and on disk, and the peak of a forward pass, a row a variant and batch size.

    `peak_above_weights_mb` is what a pass allocates at its peak and `peak_memory_mb` the sum with the weights, on the
    device that ran it; `peak_vram_mb` is that sum where the device is a GPU. `reserved_mb` is what the caching
    allocator must hold from the driver for it (weights and the pool that the pass needed), on a GPU only. A CUDA graph
    holds its activations from capture on; they are counted as the pass's.
    """
    rows = []
    for name, engine in bench.engines.items():
        for size in settings.batch_sizes:
            call = rotating_calls(engine, bench.valid.pixels, size)
            used, pool = timing.peak_memory_mb(call, bench.device), engine.pool_mb.get(size, 0.0)
            used = used._replace(allocated=used.allocated + pool, reserved=used.reserved + pool)
            weights, cuda = engine.loaded.weights_mb, bench.device.type == "cuda"
            rows.append(
                {
                    "variant": name,
                    "batch": size,
                    "model_mb": weights,
                    "disk_mb": models.disk_mb(engine.loaded.folder),
                    "peak_above_weights_mb": used.allocated,
                    "peak_memory_mb": weights + used.allocated,
                    "peak_vram_mb": weights + used.allocated if cuda else np.nan,
                    # What other engines left free in their blocks may have served this pass too.
                    "reserved_mb": weights + max(used.reserved, used.allocated) if cuda else np.nan,
                }
            )
    return pd.DataFrame(rows)


def readable_memory(memories: pd.DataFrame) -> pd.DataFrame:
    """The table of `memory` for a report, in MB; without the column that repeats another on a GPU."""
    names = {
        "model_mb": "weights (MB)",
        "disk_mb": "on disk (MB)",
        "peak_above_weights_mb": "pass at its peak (MB)",
        "peak_memory_mb": "weights + pass (MB)",
        "reserved_mb": "reserved (MB)",
    }
    return memories[["variant", "batch", *names]].rename(columns=names)


def cpu_latency(bench: Bench, settings: Parameters) -> pd.Series:
    """Median latency in ms of one picture on this machine's CPU, for the eager variants that run there.

    On a machine with a GPU only the unquantized ones: bitsandbytes' CPU path takes seconds a picture for ViT-L/16, and
    nobody would use it there.
    """
    cpu, calls = torch.device("cpu"), {}
    for variant in bench.variants:
        eager = variant.execution in ("eager", "fused")
        if variant.name not in bench.engines or not eager or not settings.cpu_samples:
            continue
        if variant.quantized and bench.device.type == "cuda":
            continue
        try:
            loaded = models.load(bench.checkpoints, variant, cpu)
        except models.NotRun:  # FlashAttention-2: the row has no CPU latency
            continue
        calls[variant.name] = rotating_calls(Engine(loaded, variant.execution, (1,)), bench.valid.pixels, 1)
    samples = timing.latency(calls, cpu, timing.Budget(2, settings.cpu_samples, 5.0), settings.seed)
    return samples.groupby("candidate")["latency_ms"].median().rename("cpu_latency_ms")


# ------------------------------------------------------------------------------------------------------- validity


def validity(
    bench: Bench, settings: Parameters, latencies: pd.DataFrame, device_times: pd.DataFrame, clocks: dict[str, object]
) -> pd.DataFrame:
    """What makes the numbers of this run believable, each with what is required and whether it was reached.

    The comparisons are simulated from this run's own samples: of the baseline's calls in each round one random half is
    compared with the other (nothing changed), and with the other made 2 % slower.
    """
    asked, ran = len(bench.variants), len(bench.engines)
    per_round = latencies.groupby(["variant", "batch", "round"]).size()
    found = [_simulated(latencies, bench.baseline, size, settings.seed) for size in settings.batch_sizes]
    duration, size = _known_duration_error(), _known_tensor_error()
    notes = sum(bool(clock_note(part)) for _, part in latencies.groupby(["variant", "batch"]))
    throttled = clocks.get("throttle_reasons")
    rows = [
        ("variants asked, run, refused with a reason", f"{asked}, {ran}, {asked - ran}", "asked = run + refused", True),
        (
            "rounds in shuffled order × calls",
            f"{settings.rounds} × {calls_of(per_round)}",
            "8 rounds",
            settings.rounds >= 8,
        ),
        ("device time not attributed, at most", device_times["unattributed_share"].max(), 0.05, None),
        (f"error on a callable of {KNOWN_MS:g} ms", duration, 0.025, None),
        (f"error on a tensor of {KNOWN_MB:g} MB", size, 0.02, None),
        *(
            (f"{what}, of 100, at batch {size}", str(pair[k]), "≥ 95", pair[k] >= 95)
            for k, what in enumerate(("nothing changed, called the same", "2 % slower, found"))
            for size, pair in zip(settings.batch_sizes, found, strict=True)
        ),
        ("rows where wall clock and device events differ", notes, "said in the row", True),
        ("clocks throttled while measuring", "; ".join(throttled or []) or "no", "said", True),
    ]
    table = pd.DataFrame(rows, columns=["check", "found", "required", "reached"])
    limits = table["reached"].isna()
    table.loc[limits, "reached"] = [f < r for f, r in table.loc[limits, ["found", "required"]].to_numpy()]
    table.loc[limits, ["found", "required"]] = [
        (f"{100 * f:.2f} %", f"< {100 * r:g} %") for f, r in table.loc[limits, ["found", "required"]].to_numpy()
    ]
    table["reached"] = ["yes" if reached else "no" for reached in table["reached"]]
    records.write_table(table, files.study_folder(settings.study) / "records" / "validity.csv")
    return table


def unreached(checks: pd.DataFrame) -> str:
    """What the table of `validity` says no to, as a sentence (Markdown); that all was reached where it was."""
    missed = checks.loc[checks["reached"] == "no", "check"]
    if missed.empty:
        return "All of it was reached."
    named = "; ".join(f"*{check}*" for check in missed)
    return f"**Not reached**: {named}. Differences as small as these checks ask for are not established by this run."


def calls_of(per_round: pd.Series) -> str:
    """How many calls a round had: the range and, where it is one, its median. A slow row has few calls in its time."""
    low, high = per_round.min(), per_round.max()
    return f"{low}" if low == high else f"{low} to {high} (median {per_round.median():.0f})"


def _simulated(latencies: pd.DataFrame, baseline: str, batch: int, seed: int) -> tuple[int, int]:
    """How often the halves of the baseline's rounds are called the same, and a 2 % slower half slower.

    (0, 0) where a round has a single call: it cannot be halved, and nothing is known.
    """
    chosen = latencies[(latencies["variant"] == baseline) & (latencies["batch"] == batch)]
    by_round = [group["latency_ms"].to_numpy() for _, group in chosen.groupby("round")]
    if min(len(samples) for samples in by_round) < 2:
        return 0, 0
    draw, same, slower = np.random.default_rng(seed), 0, 0
    for _ in range(SIMULATED):
        halves = [np.array_split(draw.permutation(samples), 2) for samples in by_round]
        first, second = [half[0] for half in halves], [half[1] for half in halves]
        same += stats.same_or_slower(first, second) == "same"
        slower += stats.same_or_slower(first, [1.02 * half for half in second]) == "slower"
    return same, slower


def _known_duration_error() -> float:
    samples = timing.latency(
        {"": timing.busy(KNOWN_MS / 1e3)}, torch.device("cpu"), timing.Budget(rounds=3, samples=20, seconds=0.5)
    )
    return abs(samples["latency_ms"].min() / KNOWN_MS - 1)  # other processes only make it longer


def _known_tensor_error() -> float:
    used = timing.peak_memory_mb(
        lambda _: torch.empty(int(KNOWN_MB * 2**20), dtype=torch.uint8).fill_(1), torch.device("cpu")
    )
    return abs(used.allocated / KNOWN_MB - 1)
