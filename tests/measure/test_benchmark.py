"""The tables of notebook 2 from samples, and the sentences about them."""

import numpy as np
import pandas as pd
import pytest

from vitlib.measure import benchmark, stats
from vitlib.measure.stats import Interval


def timed(rounds: int, **milliseconds: float) -> pd.DataFrame:
    """Latencies of variants at batch sizes 1 and 8 with 1 % jitter: `rounds` of 4 samples."""
    draw = np.random.default_rng(0)
    keys = [(v, batch, r, k) for v in milliseconds for batch in (1, 8) for r in range(rounds) for k in range(4)]
    frame = pd.DataFrame(keys, columns=["variant", "batch", "round", "sample"])
    level = frame["variant"].map(milliseconds) * np.exp(draw.normal(0, 0.01, len(frame)))
    return frame.assign(latency_ms=level, device_ms=np.nan)


def rates(latencies: pd.DataFrame) -> pd.DataFrame:
    frame = latencies[latencies["sample"] == 0][["variant", "batch", "round"]]
    return frame.assign(throughput_img_s=frame["batch"] * 50.0)


def test_the_factor_is_the_ratio_of_the_printed_medians():
    latencies = timed(12, base=10.0, other=2.0)
    table = benchmark.speed(latencies, rates(latencies), "base").set_index(["variant", "batch"])
    row, base = table.loc[("other", 8)], table.loc[("base", 8)]
    assert row["times_baseline"] == base["latency_p50_ms"] / row["latency_p50_ms"]
    assert row["times_baseline_low"] < row["times_baseline"] < row["times_baseline_high"]
    assert row["latency_low_ms"] <= row["latency_p50_ms"] <= row["latency_high_ms"]
    assert (row["against_baseline"], row["rounds"], row["samples"]) == ("faster", 12, 48)
    assert base["times_baseline"] == base["times_baseline_low"] == base["times_baseline_high"] == 1.0
    assert base["against_baseline"] == "" and np.isnan(row["latency_p95_ms"])


def test_throughput_is_what_was_measured_at_that_batch_size():
    """10 ms of latency would be 100 images a second at batch 1 and 800 at batch 8; what was measured differs."""
    latencies = timed(10, base=10.0)
    found = benchmark.speed(latencies, rates(latencies), "base").set_index("batch")["throughput_img_s"]
    assert found.to_dict() == {1: 50.0, 8: 400.0}


@pytest.mark.parametrize(
    ("times", "verdict", "rounds", "said"),
    [
        (Interval(7.3, 7.1, 7.44), "faster", 20, "7.3 times faster (7.1 … 7.4)"),
        (Interval(0.4, 0.25, 0.5), "slower", 20, "2.5 times slower (2.0 … 4.0)"),
        (Interval(1.03, 0.98, 1.05), "not shown", 20, "1.03 times faster (0.98 … 1.05), not established by this run"),
        (Interval(1.0, 0.99, 1.01), "same", 20, "equally fast within 2 %"),
        (Interval(1.1, 0.9, 1.3), stats.TOO_FEW_ROUNDS, 4, "too few rounds to tell (8 needed, 4 run)"),
        (Interval(1.1, np.nan, np.nan), stats.TOO_FEW_ROUNDS, 1, "too few rounds to tell (8 needed, 1 run)"),
        (
            Interval(0.2, 0.19, 0.22),
            stats.TOO_FEW_ROUNDS,
            4,
            "5.0 times slower (4.5 … 5.3) (only 4 rounds, not tested)",
        ),
    ],
)
def test_a_comparison_in_words(times, verdict, rounds, said):
    assert benchmark.in_words(times, verdict, rounds) == said


def test_checks_find_a_slowdown_and_fail_with_few_rounds():
    for rounds, reached in ((12, "yes"), (4, "no")):
        table = benchmark.validity(
            timed(rounds, base=10.0), "base", facts={"run": "2"}, errors={"clock": (0.01, 0.025), "size": (0.03, 0.02)}
        ).set_index("check")["reached"]
        assert (table["clock"], table["size"], table["run"]) == ("yes", "no", "yes")
        assert table["2 % slower, found, batch size 8"] == table["rounds in random order × calls"] == reached
    assert benchmark.simulated([np.ones(1)] * 8) == (0, 0)  # a single call has no halves


def test_accuracy_of_a_changed_variant():
    logits = np.random.default_rng(0).normal(size=(50, 5))
    labels = logits.argmax(1)
    other = logits.copy()
    other[:10] = -other[:10]
    found = benchmark.accuracy({"base": logits, "other": other}, labels, "base", margin=0.02).set_index("variant")
    assert found.loc["base", ["top1", "flips", "verdict"]].tolist() == [1.0, 0, "baseline"]
    assert found.loc["other", ["right", "lost", "gained", "flips", "verdict"]].tolist() == [40, 10, 0, 10, "different"]
    assert found.loc["other", "holm_p"] == found.loc["other", "mcnemar_p"] == 2 / 2**10
    assert found.loc["other", "difference_high"] < 0 < found.loc["other", "logit_kl_low"]


@pytest.mark.parametrize("wall_ms", [1.0, 1.015])
def test_clocks_that_agree_need_no_note(wall_ms):
    assert benchmark.clock_note(pd.DataFrame({"latency_ms": [wall_ms], "device_ms": [1.0]})) == ""


def test_clocks_that_differ_are_said():
    assert "+30 µs" in benchmark.clock_note(pd.DataFrame({"latency_ms": [1.03], "device_ms": [1.0]}))


def test_failed_checks_are_named():
    names = [f"{check}, batch size {size}" for size in (1, 8) for check in (benchmark.SAME, benchmark.SLOWER)]
    found = ["81 of 100", "68 of 100", "100 of 100", "99 of 100", "7 %", "yes"]
    reached = ["no", "no", "yes", "yes", "no", "yes"]
    checks = pd.DataFrame({"check": [*names, "error of a tensor", "clocks"], "found": found, "reached": reached})
    text = benchmark.failed(checks)
    assert "At batch size 1 timings vary too much" in text and "19 were not called the same, and 32 missed" in text
    assert "batch size 8" not in text and "**Failed checks**: *error of a tensor* (7 %)." in text
    assert benchmark.failed(checks.tail(1)) == ""


def test_chosen_implementations_have_a_column_a_batch_size():
    row = {"variant": "nf4-direct-fused-graph", "layer": "NF4", "path": "dequantize", "batch": 1, "chosen": True}
    rows = [row | {"us": us} for us in (4.0, 6.0)] + [
        row | {"batch": 8, "us": 9.0},
        row | {"us": 99.0, "chosen": False},
    ]
    (found,) = benchmark.chosen(pd.DataFrame(rows)).to_dict("records")
    assert (found["batch size 1 (µs)"], found["batch size 8 (µs)"]) == (5.0, 9.0)
    assert benchmark.chosen(pd.DataFrame()).empty


def variants(*rows: tuple[str, str, str, float, float]) -> pd.DataFrame:
    """What `points` reads of variants.csv: weights, attention, execution, milliseconds at batch size 1, MB."""
    frame = pd.DataFrame(rows, columns=["weights", "attention", "execution", "latency_p50_ms", "model_mb"])
    frame = frame.assign(variant=frame["weights"] + "-" + frame["execution"], batch=1.0, status="ok", gelu="checkpoint")
    return frame.assign(times_baseline=frame["latency_p50_ms"].iloc[0] / frame["latency_p50_ms"])


def test_points_are_the_best_executions_and_the_best_of_them_is_small_and_fast():
    table = variants(
        ("fp32", "sdpa", "eager", 10.0, 1200.0),
        ("fp16", "sdpa", "eager", 9.0, 600.0),
        ("fp16", "direct", "fused", 2.0, 600.0),
        ("nf4", "sdpa", "eager", 25.0, 150.0),
        ("nf4", "direct", "fused", 3.0, 160.0),
        ("nf4", "direct", "fused-graph", 1.5, 160.0),
        ("w8a8", "direct", "fused", 2.5, 300.0),
    )
    slower = table.assign(batch=8.0, latency_p50_ms=1.0)
    found = benchmark.points(pd.concat([table, slower])).set_index("variant")
    assert list(found.index) == ["fp32-eager", "fp16-fused", "nf4-eager", "nf4-fused-graph", "w8a8-fused"]
    assert list(found.index[found["best"]]) == ["nf4-fused-graph"]
    other = variants(("fp8", "direct", "fused", 9.0, 300.0))
    assert list(benchmark.points(pd.concat([table, other], ignore_index=True))["variant"])[-1] == "fp8-fused"
    tanh = pd.concat([table, table.iloc[[5]].assign(variant="tanh", gelu="tanh", latency_p50_ms=0.1)])
    assert "tanh" not in set(benchmark.points(tanh)["variant"])


def test_points_of_a_small_study_are_all_that_ran():
    others = variants(("fp32", "sdpa", "eager", 10.0, 12.0), ("int8", "sdpa", "eager", 20.0, 3.0))
    missing = others.iloc[[1]].assign(variant="nf4-eager", weights="nf4", status="not run", batch=np.nan)
    found = benchmark.points(pd.concat([others, missing]))
    assert found[["variant", "best"]].to_numpy().tolist() == [["fp32-eager", False], ["int8-eager", True]]
    assert benchmark.points(others.iloc[:1])["best"].tolist() == [False]
