"""The tables of notebook 2 from logits and timed samples, and whether the instruments can be trusted.

Pure functions of what was measured: nothing here runs a network.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vitlib.measure import stats
from vitlib.measure.stats import Interval

CLOCKS_AGREE = 0.02  # relative difference of wall clock and device events
SIMULATED = 100  # comparisons of a run's own samples
FOUND = 95  # of them that must come out right
SAME, SLOWER = "identical calls, called the same", "2 % slower, found"  # what is simulated
EIGHT_BITS = ("fp8", "w8a8", "w8a16")  # fused weight formats, of which `points` takes the first that ran


def accuracy(
    logits: Mapping[str, NDArray], labels: NDArray, baseline: str, *, margin: float, seed: int = 0
) -> pd.DataFrame:
    """Accuracy with its uncertainty, a row a variant, from logits (n, classes) and labels (n,).

    Top-1, Top-5 and weighted F1; right answers of n with Wilson's interval; pictures lost and gained against the
    baseline with McNemar's exact p, adjusted by Holm over the rows; the paired difference with a bootstrap and a
    score interval; flips; mean KL from the baseline with its interval; and a verdict (`stats.verdict`), for which
    `margin` is the share of pictures that a non-inferior variant may lose.
    """
    base = logits[baseline]
    frame = pd.DataFrame([_accuracy_row(name, found, base, labels, seed) for name, found in logits.items()])
    other = frame["variant"] != baseline
    frame["holm_p"] = np.nan
    frame.loc[other, "holm_p"] = stats.holm(frame.loc[other, "mcnemar_p"].to_numpy())
    bounds = zip(frame["difference"], frame["difference_low"], frame["difference_high"], frame["holm_p"], strict=True)
    verdicts = [stats.verdict(difference=Interval(*each), p_adjusted=p, margin=margin) for *each, p in bounds]
    return frame.assign(verdict=np.where(other, verdicts, "baseline"))


def _accuracy_row(name: str, found: NDArray, base: NDArray, labels: NDArray, seed: int) -> dict[str, object]:
    from sklearn.metrics import f1_score  # a second of import time, for this function only

    right, base_right = (stats.topk_right(values, labels, 1) for values in (found, base))
    (lost, gained, p), score = stats.mcnemar(base_right, right), stats.paired_difference(base_right, right)
    resampled = stats.paired_bootstrap(right.astype(float) - base_right.astype(float), seed=seed)
    kl = stats.paired_bootstrap(stats.kl_divergence(base, found), seed=seed)
    predicted, expected = found.argmax(axis=1), base.argmax(axis=1)
    row = {"variant": name, "n": len(labels), "right": int(right.sum())}
    row |= stats.columns("top1", stats.proportion(right))
    f1 = f1_score(labels, predicted, average="weighted", zero_division=0.0)  # 0 for a class that is never predicted
    row |= {"top5": stats.topk_accuracy(found, labels, 5), "f1_weighted": f1}
    row |= {"agreement_with_baseline": float((predicted == expected).mean()), "flips": stats.flips(expected, predicted)}
    row |= {"lost": lost, "gained": gained, "mcnemar_p": p} | stats.columns("difference", score)
    row |= {"bootstrap_low": resampled.low, "bootstrap_high": resampled.high}
    return row | stats.columns("logit_kl", kl)


def rounds_of(latencies: pd.DataFrame, variant: str, batch: int) -> list[NDArray]:
    """The latencies in ms of each round of one variant and batch size; `latencies` as in `records/latency.csv`."""
    own = latencies[(latencies["variant"] == variant) & (latencies["batch"] == batch)]
    return [group["latency_ms"].to_numpy() for _, group in own.groupby("round")]


def speed(latencies: pd.DataFrame, throughputs: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """A row a variant and batch size: latency and throughput with bootstrap intervals over rounds.

    `latency_p50_ms` is the median of the rounds' medians, with its interval in `latency_low_ms` and `latency_high_ms`;
    P95 and P99 are of all samples, where these are enough (see `stats.samples_needed`). `times_baseline` is
    `stats.times_faster`, `against_baseline` `stats.same_or_slower`, `latency_note` `clock_note`.
    """
    rows = []
    for (variant, batch), part in latencies.groupby(["variant", "batch"], sort=False):
        own, base = (rounds_of(latencies, name, batch) for name in (variant, baseline))
        median, times = stats.median_interval(own), stats.times_faster(base, own)
        same = (throughputs["variant"] == variant) & (throughputs["batch"] == batch)
        rates = stats.paired_bootstrap(throughputs.loc[same, "throughput_img_s"], statistic=np.median)
        row = {"variant": variant, "batch": batch, "latency_mean_ms": part["latency_ms"].mean()}
        row |= {"latency_p50_ms": median.estimate}
        row |= {f"latency_p{q}_ms": stats.percentile(part["latency_ms"], q) for q in (95, 99)}
        row |= {"latency_low_ms": median.low, "latency_high_ms": median.high, "samples": len(part)}
        row |= {"rounds": len(own), "latency_note": clock_note(part), **stats.columns("times_baseline", times)}
        row |= {"against_baseline": "" if variant == baseline else stats.same_or_slower(base, own)}
        row |= {"throughput_img_s": rates.estimate, "throughput_low_img_s": rates.low}
        rows.append(row | {"throughput_high_img_s": rates.high})
    return pd.DataFrame(rows)


def points(table: pd.DataFrame) -> pd.DataFrame:
    """The variants that a figure or a sentence compares at the smallest batch size, from `records/variants.csv`.

    Five where a study has them: the baseline, FP16 in its fastest execution, NF4 out of the box and in its fastest
    other execution, and the fastest fused variant in one of EIGHT_BITS. With less than two, all that ran. `best` marks
    the one whose factors of speed and size have the largest product. The tanh GELU, another function, is left out.
    """
    ran = table[(table["status"] == "ok") & (table["batch"] == table["batch"].min())]
    own = (ran[ran["gelu"] == "checkpoint"] if "gelu" in ran else ran).sort_values("latency_p50_ms", kind="stable")
    weights, plain = own["weights"], (own["execution"] == "eager") & (own["attention"] == "sdpa")
    chosen = [weights == "fp16", (weights == "nf4") & plain, (weights == "nf4") & (own["execution"] != "eager")]
    eight = [rows for kind in EIGHT_BITS if len(rows := own["variant"][(weights == kind) & ~plain])]
    found = [own["variant"][mask] for mask in chosen] + eight[:1]
    names = {ran["variant"].iloc[0], *(name for rows in found for name in rows.head(1))}
    rows = (ran[ran["variant"].isin(names)] if len(names) > 1 else ran).reset_index(drop=True)
    gain = (rows["times_baseline"] / rows["model_mb"])[1:]
    return rows.assign(best=rows.index == (gain.idxmax() if len(gain) else -1))


def in_words(times: Interval, verdict: str, rounds: int) -> str:
    """A comparison of latencies as a clause: "7.3 times faster (7.1 … 7.4)"; `times` is that of `stats.times_faster`.

    `verdict` is that of `stats.same_or_slower`. With too few rounds for a verdict the ratio is given only where its
    interval excludes 1.
    """
    if verdict == stats.TOO_FEW_ROUNDS:
        if times.low > 1 or times.high < 1:  # False for NaN
            return f"{_ratio(times)} (only {rounds} rounds, not tested)"
        return f"too few rounds to tell ({stats.MINIMUM_ROUNDS} needed, {rounds} run)"
    if verdict in ("faster", "slower"):
        return _ratio(times)
    return "equally fast within 2 %" if verdict == "same" else f"{_ratio(times)}, not established by this run"


def _ratio(times: Interval) -> str:
    faster = times.estimate >= 1
    shown = times if faster else (1 / times.estimate, 1 / times.high, 1 / times.low)
    digits = 2 if shown[0] < 2 else 1 if shown[0] < 100 else 0
    value, low, high = (f"{number:.{digits}f}" for number in shown)
    return f"{value} times {'faster' if faster else 'slower'} ({low} … {high})"


def chosen(tuning: pd.DataFrame) -> pd.DataFrame:
    """The implementations that were chosen (`records/tuning.csv`), a row a variant, layer format and implementation.

    A column a batch size: the median µs of the layer shapes that use it, missing where none does.
    """
    if tuning.empty:
        return tuning
    taken = tuning[tuning["chosen"]].groupby(["variant", "layer", "path", "batch"], sort=False)["us"].median()
    table = taken.unstack().rename(columns=lambda size: f"batch size {size} (µs)").rename_axis(columns=None)
    return table.reset_index().rename(columns={"layer": "layers", "path": "implementation"})


def clock_note(samples: pd.DataFrame) -> str:
    """'' where wall clock and device events agree within 2 %, otherwise by how much they differ and why."""
    wall, device = samples["latency_ms"].median(), samples["device_ms"].dropna().median()  # NaN without a warning
    if np.isnan(device) or abs(wall - device) <= CLOCKS_AGREE * wall:
        return ""
    return f"wall clock {(wall - device) * 1e3:+.0f} µs from device events: the CPU's launch and wake-up"


def validity(
    latencies: pd.DataFrame, baseline: str, *, facts: Mapping[str, str], errors: Mapping[str, tuple[float, float]]
) -> pd.DataFrame:
    """Checks of this run, each with what was found, what is required and whether it was reached ("yes" or "no").

    `facts` are reported as they are; `errors` are relative, each with its limit. Comparisons are simulated from this
    run's own samples: in each round one random half of the baseline's calls is compared with the other half (nothing
    changed), and with the other half made 2 % slower.
    """
    per_round, rounds = latencies.groupby(["variant", "batch", "round"]).size(), latencies["round"].nunique()
    low, high = per_round.min(), per_round.max()  # slow variants have few calls in the time of a round
    calls = f"{low}" if low == high else f"{low} to {high} (median {per_round.median():.0f})"
    notes = sum(bool(clock_note(part)) for _, part in latencies.groupby(["variant", "batch"]))
    enough = rounds >= stats.MINIMUM_ROUNDS
    rows = [
        ("rounds in random order × calls", f"{rounds} × {calls}", f"≥ {stats.MINIMUM_ROUNDS}", enough),
        *((what, f"{100 * f:.2f} %", f"< {100 * limit:g} %", f < limit) for what, (f, limit) in errors.items()),
    ]
    for batch in dict.fromkeys(latencies["batch"]):
        alarms, found = simulated(rounds_of(latencies, baseline, batch))
        for what, count in ((SAME, alarms), (SLOWER, found)):
            rows.append((f"{what}, batch size {batch}", f"{count} of {SIMULATED}", f"≥ {FOUND}", count >= FOUND))
    rows.append(("rows where wall clock and GPU timer disagree", str(notes), "noted in the row", True))
    rows += [(what, found, "reported", True) for what, found in facts.items()]
    table = pd.DataFrame(rows, columns=["check", "found", "required", "reached"])
    return table.assign(reached=table["reached"].map({True: "yes", False: "no"}))


def failed(checks: pd.DataFrame) -> str:
    """What the checks of `validity` that failed mean for a reader (Markdown), '' if none did."""
    found, missed = checks.set_index("check")["found"], checks.loc[checks["reached"] == "no", "check"]
    noisy = dict.fromkeys(size for check, _, size in (name.partition(", batch size ") for name in missed) if size)
    said = []
    for size in noisy:
        same, slower = (int(found[f"{check}, batch size {size}"].split()[0]) for check in (SAME, SLOWER))
        said.append(
            f"**At batch size {size} timings vary too much to tell differences of 2 %**: of {SIMULATED} comparisons of "
            f"the baseline with itself {SIMULATED - same} were not called the same, and {SIMULATED - slower} missed a "
            "slowdown of 2 %."
        )
    others = [f"*{name}* ({found[name]})" for name in missed if ", batch size " not in name]
    return " ".join([*said, *([f"**Failed checks**: {'; '.join(others)}."] if others else [])])


def simulated(by_round: list[NDArray], seed: int = 0) -> tuple[int, int]:
    """Of SIMULATED comparisons of halves of each round: called the same; and called slower when one is 2 % slower.

    (0, 0) where a round has a single call: it has no halves, and nothing is known.
    """
    if min(len(samples) for samples in by_round) < 2:
        return 0, 0
    draw, same, slower = np.random.default_rng(seed), 0, 0
    for _ in range(SIMULATED):
        halves = [np.array_split(draw.permutation(samples), 2) for samples in by_round]
        first, second = [half[0] for half in halves], [half[1] for half in halves]
        same += stats.same_or_slower(first, second) == "same"
        slower += stats.same_or_slower(first, [1.02 * half for half in second]) == "slower"
    return same, slower
