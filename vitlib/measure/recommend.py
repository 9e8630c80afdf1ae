"""Which measured variant to deploy within a user's limits, and why others lose. Pure functions of measured tables."""

from __future__ import annotations

import pandas as pd

EQUAL = 1.05  # times the latency of the fastest up to which a variant counts as equally fast


def ranked(
    table: pd.DataFrame, batch: int, *, memory_mb: float = 0.0, latency_ms: float = 0.0, margin: float
) -> pd.DataFrame:
    """The variants of `records/variants.csv` that ran, best first, at the measured batch size nearest to `batch`.

    Limits are the peak memory of a call with weights, its median latency (0: none), and the fraction of pictures that
    may be lost (`margin`) at the lower bound of the 95 % interval. The best is the one within all limits that takes
    the least memory of those that are as fast as the fastest; `why` says what each other lacks. Variants that compute
    another function (tanh GELU) are left out.
    """
    rows = table[(table["status"] == "ok") & (table["gelu"] == "checkpoint")].dropna(subset="latency_p50_ms")
    if rows.empty:
        return rows.assign(why="")
    distance = (rows["batch"] - batch).abs()
    rows = rows[distance == distance.min()].reset_index(drop=True)
    rows["why"] = [_fault(row, memory_mb, latency_ms, margin) for row in rows.itertuples()]
    within = rows["why"] == ""
    fastest = rows.loc[within, "latency_p50_ms"].min()  # NaN where none is within the limits
    slower = rows["latency_p50_ms"].where(rows["latency_p50_ms"] > EQUAL * fastest, 0.0)
    rows = rows.assign(_out=~within, _slower=slower).sort_values(
        ["_out", "_slower", "peak_memory_mb", "logit_kl", "latency_p50_ms"], kind="stable", ignore_index=True
    )
    best = rows.iloc[0]
    for at in range(1, len(rows)):
        rows.loc[at, "why"] = rows.loc[at, "why"] or _behind(rows.loc[at], best)
    return rows.drop(columns=["_out", "_slower"])


def _fault(row: tuple, memory_mb: float, latency_ms: float, margin: float) -> str:
    """Which limit a row exceeds, '' if none."""
    if memory_mb and row.peak_memory_mb > memory_mb:
        return f"needs {row.peak_memory_mb:,.0f} MB, more than {memory_mb:g}"
    if latency_ms and row.latency_p50_ms > latency_ms:
        return f"takes {row.latency_p50_ms:.3g} ms, more than {latency_ms:g}"
    if row.logit_kl > 0 and row.difference_low < -margin:  # the baseline loses nothing, however wide its interval
        return f"may lose {-100 * row.difference_low:.1f} points of Top-1, more than {100 * margin:g}"
    return ""


def _behind(row: pd.Series, best: pd.Series) -> str:
    """Why a row within the limits comes after the best."""
    times, larger = row["latency_p50_ms"] / best["latency_p50_ms"], row["peak_memory_mb"] / best["peak_memory_mb"]
    if times > EQUAL:
        return f"{times:.2g} times slower"
    if larger > EQUAL:
        return f"as fast, but needs {larger:.2g} times the memory"
    return "as fast and as small, but its outputs differ more from the baseline's"
