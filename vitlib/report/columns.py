"""Heading, format and unit of the records' columns in tables: `tables.table(frame, columns.OF_VARIANTS)`.

A table shows those columns that its frame has, in this order.
"""

import pandas as pd

from vitlib.report.tables import Column, number

OF_VARIANTS: dict[str | tuple[str, str], str | Column] = {
    "variant": "variant",
    "part": "part",
    "batch": Column("batch size", ".0f"),
    "profiled_batch": Column("batch size", ".0f"),
    "right": "right",
    "n": "pictures",
    "top1": Column("Top-1 (%)", ".2f", 100),
    ("top1_low", "top1_high"): Column("95 % interval", ".1f", 100),
    "top5": Column("Top-5 (%)", ".2f", 100),
    "f1_weighted": Column("F1", ".4f"),
    "flips": Column("class changed", ".0f"),
    "lost": "lost",
    "gained": "gained",
    "holm_p": Column("Holm p", ".3f"),
    "logit_kl": Column("KL (nats)", ".1e"),
    "verdict": "verdict",
    "reference": "compared with",
    "relative_error": Column("relative error of logits", ".1e"),
    "agreement_with_reference": Column("same class (%)", ".2f", 100),
    "model_mb": Column("weights (MB)", ",.1f"),
    "held_mb": Column("with buffers (MB)", ",.1f"),
    "disk_mb": Column("on disk (MB)", ",.1f"),
    "peak_above_weights_mb": Column("peak of a pass (MB)", ",.1f"),
    "peak_memory_mb": Column("weights + pass (MB)", ",.1f"),
    "reserved_mb": Column("reserved (MB)", ",.1f"),
    "prepare_s": Column("preparation (s)", ",.1f"),
    "latency_p50_ms": Column("P50 (ms)", ",.2f"),
    ("latency_low_ms", "latency_high_ms"): Column("95 % interval of P50", ",.2f"),
    "latency_p95_ms": Column("P95 (ms)", ",.2f"),
    "latency_p99_ms": Column("P99 (ms)", ",.2f"),
    "times_baseline": Column("times faster than the baseline", ".2f"),
    ("times_baseline_low", "times_baseline_high"): Column("95 % interval of that", ".2f"),
    "against_baseline": "verdict on latency",
    "throughput_img_s": Column("images/s", ",.0f"),
    ("throughput_low_img_s", "throughput_high_img_s"): Column("95 % interval of images/s", ",.0f"),
    "latency_note": "wall clock and GPU timer",
    "cpu_latency_ms": Column("one picture on the CPU (ms)", ",.2f"),
    "kernels_per_pass": Column("kernels per pass", ",.0f"),
    "device_time_us": Column("device time (ms)", ",.3f", 1e-3),
    "attention_device_time_us": Column("attention (ms)", ",.3f", 1e-3),
    "unattributed_share": Column("not attributed (%)", ".2f", 100),
    "attention_kernel": "attention kernel",
    "tflop_s": Column("TFLOP/s", number),
    "ceiling_tflop_s": Column("peak TFLOP/s", number),
    "gb_s": Column("GB/s", number),
    "ceiling_gb_s": Column("peak GB/s", number),
    "bound": "limited by",
    "share_of_floor": Column("of the possible (%)", ".0f", 100),
}
ACCURACY: dict[str | tuple[str, ...], str | Column] = {
    "variant": "variant",
    ("top1", "top1_low", "top1_high"): Column("Top-1 (%)", ",", 100),
    ("difference", "difference_low", "difference_high"): Column("change (points)", "+,", 100),
    "flips": Column("class changed", ".0f", bar=True),
    "logit_kl": Column("KL (nats)", ".1e"),
    "verdict": "verdict",
}
_SPEED = {
    ("latency_p50_ms", "latency_low_ms", "latency_high_ms"): Column("ms, batch {:g} (95 % interval)", ",", best="low"),
    "times_baseline": Column("times faster, batch {:g}", number, best="high", bar=True),
}
_SIZE = {
    "variant": "variant",
    "model_mb": Column("weights (MB)", ",.1f", best="low", bar=True),
    "times_smaller": Column("times smaller", ".1f"),
    "held_mb": Column("with buffers (MB)", ",.1f"),
    "disk_mb": Column("on disk (MB)", ",.1f"),
}
_PEAK = {"peak_memory_mb": Column("weights + pass (MB), batch {:g}", ",.0f", best="low")}
_OVERVIEW = {
    "variant": "variant",
    "top1": Column("Top-1 (%)", ".1f", 100),
    "agreement_with_baseline": Column("same class (%)", ".1f", 100),
    "model_mb": Column("MB", ",.1f", best="low", bar=True),
}
_LATENCY = {"latency_p50_ms": Column("ms, batch {:g}", number, best="low", bar=True)}


def speed(frame: pd.DataFrame, *more: str) -> tuple[pd.DataFrame, dict]:
    """A row a variant, and its columns: `more`, then latency and times faster by batch size. For `tables.table(*…)`."""
    return _by_batch(frame, {name: OF_VARIANTS[name] for name in ("variant", *more)}, _SPEED)


def size(frame: pd.DataFrame) -> tuple[pd.DataFrame, dict]:
    """A row a variant, and its columns: sizes, then peak memory by batch size. For `tables.table(*…)`."""
    frame = frame.assign(times_smaller=frame["model_mb"].iloc[0] / frame["model_mb"])
    return _by_batch(frame, _SIZE, _PEAK)


def overview(frame: pd.DataFrame) -> tuple[pd.DataFrame, dict]:
    """A row a variant, and its columns: what an index shows of it, or why it did not run. For `tables.table(*…)`."""
    wide, columns = _by_batch(frame.fillna({"reason": ""}), _OVERVIEW, _LATENCY)
    return wide, columns | {"reason": "not run because"}


def _by_batch(frame: pd.DataFrame, once: dict, each: dict) -> tuple[pd.DataFrame, dict]:
    """`frame` with a row a variant: columns `once`, and those of `each` for every batch size."""
    wide, columns = frame.drop_duplicates("variant").set_index("variant"), dict(once)
    for batch in sorted(frame["batch"].dropna().unique()):
        own = frame[frame["batch"] == batch].set_index("variant")
        for key, about in each.items():
            names = key if isinstance(key, tuple) else (key,)
            if set(names) <= set(own):
                new = tuple(f"{name} {batch:g}" for name in names)
                wide = wide.assign(**{column: own[name] for column, name in zip(new, names, strict=True)})
                columns[new if len(new) > 1 else new[0]] = about._replace(title=about.title.format(batch))
    wide.attrs = frame.attrs
    return wide.reset_index(), columns
