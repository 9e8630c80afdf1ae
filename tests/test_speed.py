"""The page of what `make bench` measured: from its records alone, and nothing left out."""

import dataclasses

import pandas as pd
import pytest

from vitlib import bench, files, plots, provenance, records, speed

SHARED = {"part": "engine", "gelu": "checkpoint", "reference": "fp32-sdpa", "relative_error": 1e-3, "agreement": 1.0}


def engine_row(step: str, batch: int, ms: float, **columns) -> dict:
    row = SHARED | {"step": step, "batch": batch, "ms": ms, "ms_low": 0.9 * ms, "ms_high": 1.1 * ms}
    for name in ("times_baseline", "of_best_fp16"):
        row |= {name: 8 / ms, f"{name}_low": 7 / ms, f"{name}_high": 9 / ms}
    return row | {"model_mb": 100.0, "held_mb": 110.0} | columns


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A study whose bench ran on a GPU; the engine's rows stand as `bench` writes them, plain steps first."""
    monkeypatch.setattr(files, "project_root", lambda: tmp_path)
    rows = [engine_row("fp32-sdpa", 1, 8.0), engine_row("fp32-sdpa", 32, 80.0), engine_row("nf4-sdpa", 1, 20.0)]
    rows += [engine_row("fp16-direct-fused-graph", 1, 1.0), engine_row("nf4-direct-fused-graph", 1, 1.2)]
    rows += [engine_row("nf4-direct-fused-graph", 32, 7.0, agreement=0.99)]
    rows += [{"part": "engine", "step": "fp16-direct_fa2-fused-graph", "note": "not run: no flash-attn"}]
    rows += [{"part": "training", "step": "PEFT", "batch": 8, "images_per_s": 10.0, "times_baseline": 1.0}]
    frame = pd.DataFrame(rows).reindex(columns=bench.COLUMNS).assign(weights="trained")
    folder = files.study_folder("unit") / "records"
    records.write_table(frame, folder / "bench.csv")
    records.write_table(bench.targets(frame, True), folder / "targets.csv")
    records.write_json(
        provenance.environment(parameters={"rounds": 8, "data_source": "synthetic"}), folder / "bench.json"
    )
    return speed.load("unit")


@pytest.fixture
def tuned(measured):
    """The tuning table as `engine.tunings` leaves it: layer by layer first, then each other way against the best."""
    shared = {"step": "nf4-direct-fused-graph", "layer": "all blocks", "config": None, "note": None}
    ways = [("until then, against by block", 9.0, False), ("by block", 8.0, True)]
    ways += [("until then, against ahead", 8.1, False), ("ahead", 8.5, False)]
    rows = [shared | {"batch": 32, "path": path, "us": 1e3 * ms, "chosen": taken} for path, ms, taken in ways]
    rows += [row | {"batch": 1, "us": row["us"] / 9, "chosen": row["path"] == "ahead"} for row in rows]
    rows += [shared | {"batch": 0, "path": "ahead", "us": None, "chosen": False, "note": "no memory"}]
    linear = {"layer": "W8A8", "batch": 1, "path": "fused", "us": 8.0, "chosen": True}
    rows += [shared | linear | {"step": "w8a8-direct-fused-graph", "us": us} for us in (7.0, 8.0, 9.0)]
    rows += [shared | {"layer": "Dense", "batch": 1, "path": "library", "us": 5.0, "chosen": True}]
    both = shared | {"layer": "ScaledDotProduct", "batch": 1}
    rows += [both | {"rows": 197, "path": "library", "us": 9.0, "chosen": False}]
    rows += [both | {"rows": 197, "path": "fused", "us": us, "chosen": us < 6} for us in (5.0, 6.0)]
    rows += [both | {"rows": 197, "path": "library", "us": 1.0, "chosen": True, "step": "fp16-direct_fa-fused-graph"}]
    rows += [both | {"rows": 1, "path": "library", "us": 2.0, "chosen": True}]  # the last block
    return dataclasses.replace(measured, tuning=pd.DataFrame(rows))


def test_the_ways_to_dequantize_are_compared_as_passes_and_the_products_as_products(tuned):
    table = speed.blocks(tuned).set_index("batch")
    assert table.loc[32, ["layer by layer", "by block", "ahead"]].tolist() == [9.0, 8.0, 8.5]
    assert table["taken"].to_dict() == {1: "ahead", 32: "by block"}
    failed = tuned.tuning["path"].str.contains("by block")  # one that did not fit: the next one's first row counts
    found = speed.blocks(dataclasses.replace(tuned, tuning=tuned.tuning[~failed])).set_index("batch")
    assert found.loc[32, ["layer by layer", "ahead"]].tolist() == [8.1, 8.5]
    (row,) = speed.layers(tuned).to_dict("records")
    assert (row["way taken"], row["layer shapes"]) == ("this project's kernel", 3)
    assert row["one product, median (µs)"] == 8.0


def test_attention_over_all_tokens_has_its_two_ways(tuned):
    assert speed.attention(tuned).to_numpy().tolist() == [[1, 9.0, 5.0, "1 of 1"]]
    for tuning in (pd.DataFrame(), tuned.tuning[tuned.tuning["path"] == "library"]):
        assert speed.attention(dataclasses.replace(tuned, tuning=tuning)).empty


@pytest.mark.parametrize("part", ["training", "pipeline", "ablation"])
def test_a_bench_of_one_part_has_a_page(measured, part):
    """Every function of the notebook gives something to show, however little was measured."""
    row = {"part": part, "step": "shared", "batch": 8, "note": "nothing", "images_per_s": 1.0}
    frame, folder = pd.DataFrame([row]).reindex(columns=bench.COLUMNS), files.study_folder("unit") / "records"
    records.write_table(frame.assign(weights="random"), folder / "bench.csv")  # as it is read, whole columns are empty
    records.write_table(bench.targets(frame, False), folder / "targets.csv")
    alone = speed.load("unit")
    functions = (
        "conditions",
        "ladder",
        "not_run",
        "against_fp16",
        "blocks",
        "attention",
        "layers",
        "agreement",
        "sizes",
    )
    for name in (*functions, "training", "ablation", "pipeline"):
        assert plots.table(getattr(speed, name)(alone)) is not None
    assert plots.steps(alone.engine).data == "*none*"
    assert speed.headline(alone) == "- **Targets**: none could be judged by what was measured."


def test_every_step_that_ran_has_a_row_beside_those_of_its_format(measured):
    table = speed.ladder(measured)
    assert table["step"].tolist() == [
        *("fp32-sdpa", "nf4-sdpa", "nf4-direct-fused-graph", "fp16-direct-fused-graph"),
    ]
    assert table.loc[2, ["batch 1 (ms)", "batch 32 (ms)"]].tolist() == [1.2, 7.0]
    assert speed.not_run(measured).to_numpy().tolist() == [["fp16-direct_fa2-fused-graph", "not run: no flash-attn"]]


def test_quantized_rows_are_held_against_fp16_and_all_against_their_reference(measured):
    compared = speed.against_fp16(measured)
    assert compared["step"].tolist() == ["nf4-direct-fused-graph"]
    assert list(compared) == ["step", "batch 1"]  # at 32 there is no fused fp16 to compare with
    agreement = speed.agreement(measured).set_index("step")
    assert "fp32-sdpa" not in agreement.index
    assert agreement.loc["nf4-direct-fused-graph", "same class (%)"] == 99.0  # of the batch size where it is worst
    assert speed.sizes(measured)["step"].tolist() == ["fp32-sdpa", "nf4-sdpa", "fp16-direct-fused-graph"]


@pytest.mark.parametrize(
    ("state", "shown"),
    [
        ({"sm_clock_mhz": 1500, "sm_clock_max_mhz": 1980, "throttle_reasons": []}, "1,980 MHz, slowed by: nothing"),
        ({"sm_clock_mhz": 1500, "sm_clock_max_mhz": 1980, "throttle_reasons": None}, "slowed by: unknown"),
        ({"sm_clock_mhz": 1500, "sm_clock_max_mhz": 1980, "throttle_reasons": ["heat"]}, "slowed by: heat"),
        ({"sm_clock_mhz": 1500}, ""),
    ],
)
def test_clocks_are_told_as_far_as_the_driver_does(state, shown):
    assert speed._clocks(state).endswith(shown) and bool(speed._clocks(state)) == bool(shown)


def test_an_estimate_and_its_bounds_have_the_same_digits():
    row = {"x": 1.0347, "x_low": 1.0, "x_high": 1.0638}
    assert speed._bounds(row, "x").replace(speed.NO_BREAK, " ") == "1.03 (1.00 … 1.06)"
    assert speed._bounds(row, "x", 100).replace(speed.NO_BREAK, " ") == "103 (100 … 106)"


def test_the_headline_counts_what_was_judged_and_names_what_was_missed(measured):
    text = speed.headline(measured)
    assert "nf4 1.2 ms, 6.67 times as fast (`nf4-direct-fused-graph`)" in text
    judged = measured.targets[measured.targets["reached"] != "–"]
    assert f"{(judged['reached'] == 'yes').sum()} of {len(judged)} that this run can judge" in text
    for name in judged.loc[judged["reached"] == "no", "target"]:
        assert name in text.split("Not reached:")[1]


def test_what_was_not_measured_is_an_empty_table_and_no_error(measured):
    assert (
        speed.blocks(measured).empty
        and speed.layers(measured).empty
        and speed.ablation(measured).empty
        and speed.pipeline(measured).empty
    )
    assert speed.training(measured)["images/s"].tolist() == [10.0]
    assert "peak memory (MB)" not in speed.training(measured)
    assert len(plots.steps(measured.engine).axes) == len(plots.steps(measured.engine, words="fused").axes) == 2
    told = speed.conditions(measured).set_index("what")["this run"]
    assert "weights" in told and told["products of fp32"] == "in fp32, TF32 is off"


def test_a_study_without_a_bench_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "project_root", lambda: tmp_path)
    with pytest.raises(records.MissingRecord, match="run `make bench` with this STUDY first"):
        speed.load("unit")
