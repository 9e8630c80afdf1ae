"""The table of what each step brings: what it compares, and what it calls reached."""

import argparse
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from vitlib import bench, files, params, records, sources
from vitlib.variants import Variant

CPU = torch.device("cpu")
SMALL = {"batch_sizes": [1, 3], "eval_batch_size": 3, "rounds": 2, "samples": 2, "round_seconds": 0.02, "device": "cpu"}


@pytest.fixture
def settings():
    return params.check({"study": "bench", "data_source": "synthetic", **SMALL})


def rows(**columns) -> pd.DataFrame:
    return pd.DataFrame(columns).assign(part="engine").reindex(columns=bench.COLUMNS)


def test_speed_is_compared_with_the_first_step_and_with_fp16_of_the_same_gelu():
    fused = Variant("fp16", "direct", "fused-graph")
    ran = [
        bench.Step(Variant("fp32")),
        bench.Step(Variant("fp16")),
        bench.Step(fused),
        bench.Step(fused, "tanh"),
        bench.Step(Variant("nf4", "direct", "fused-graph"), "tanh"),
    ]
    slow = np.array([1.0, 1.0, 3.0])  # the last round was disturbed for all alike
    rounds = {(step.name, 1): ms * slow for step, ms in zip(ran, (10, 5, 2, 1, 1.5), strict=True)}
    found = bench._compared(rounds, ran)
    assert found["ms"].tolist() == [10, 5, 2, 1, 1.5] and (found["ms_high"] > found["ms"]).all()
    assert found["times_baseline"].tolist() == [1, 2, 5, 10, 10 / 1.5]
    # The plain fp16 row has the checkpoint's GELU, so the fused one with it is the best of that form.
    assert found["of_best_fp16"].tolist() == [5, 2.5, 1, 1, 1.5]
    assert (found["of_best_fp16_low"] == found["of_best_fp16_high"]).all()  # what disturbs all changes no ratio


def test_targets_say_what_was_found_and_what_was_not_measured():
    names = [
        "fp16-direct-fused-graph",
        "nf4-direct-fused-graph",
        "w8a8-direct-fused-graph",
        "fp16-direct-fused-graph, t",
    ]
    frame = rows(
        step=[*names, "nf4-sdpa"],
        batch=[1, 1, 1, 1, 1],
        gelu=["checkpoint", "checkpoint", "checkpoint", "tanh", "checkpoint"],
        ms=[1.2, 1.4, 1.2, 1.1, 9.0],
        ms_low=[1.18, 1.3, 1.1, 1.05, 8.0],
        ms_high=[1.22, 1.5, 1.3, 1.12, 10.0],
        of_best_fp16=[1.0, 1.27, 1.09, 1.0, 8.0],
        of_best_fp16_low=[1.0, 1.2, 1.0, 1.0, 7.0],
        of_best_fp16_high=[1.0, 1.3, 1.2, 1.0, 9.0],
        agreement=[0.996, 0.994, 0.5, 0.1, 1.0],
        model_mb=[580.0, 160.0, 290.0, 580.0, 150.0],
        held_mb=[580.0, 210.0, 290.0, 580.0, 150.0],
    )
    found = bench.targets(frame, cuda=True).set_index("target")
    # The tanh form is another function: what it reaches does not count for the checkpoint's.
    assert found.loc["fp16 (ms), batch 1"].tolist() == ["≤ 1.15", "1.2 (1.18 … 1.22)", "no", names[0]]
    assert found.loc["fp16 (ms), batch 1, tanh GELU", "reached"] == "yes"
    assert found.loc["NF4 of fp16's time, batch 1", "reached"] == "undecided"  # 1.25 lies within its bounds
    # Another function than w8a16: each has a target of its own.
    assert found.loc["int8 (w8a8) of fp16's time, batch 1", "reached"] == "yes"
    assert found.loc["int8 (w8a16) of fp16's time, batch 1", "reached"] == "–"
    assert found.loc["fp16 (ms), batch 32"].tolist() == ["≤ 8.5", "–", "–", ""]
    assert found.loc["NF4: bytes held, of the libraries' own"].tolist() == ["≤ 1", "1.4", "no", names[1]]
    # w8a8 keeps no outliers in 16 bit: it is another function, and no engine path of LLM.int8.
    assert found.loc["16 bit, same function: least Top-1 agreement", "found"] == "0.994"
    assert len(bench.targets(frame, cuda=False)) < len(found)


def test_engines_are_timed_and_held_against_the_plain_form_of_their_weights(checkpoints, settings, pixels):
    wanted = bench.steps(CPU)
    found, tuning = bench.measure_engines(settings, checkpoints, pixels, wanted)
    assert set(found["step"]) == {step.name for step in wanted} and set(found["batch"]) == {1, 3}
    assert (found["ms"] > 0).all() and (found["images_per_s"] > 0).all()
    by_step = found.drop_duplicates("step").set_index("step")
    assert by_step.loc["w8a16-direct-fused", "reference"] == "int8 rows, dequantized"
    for step in ("nf4-direct-fused", "w8a16-direct-fused"):
        assert 0 < by_step.loc[step, "relative_error"] < 1e-2
    assert by_step.loc["fp32-direct-fused", "relative_error"] < 1e-5
    assert by_step.loc["fp32-sdpa", "times_baseline"] == 1
    plain = found["step"] == found["reference"]
    assert found.loc[plain, "relative_error"].isna().all()  # nothing is compared with itself
    assert found.loc[~plain, "relative_error"].notna().all()
    assert {"NF4", "W8A8"} <= set(tuning["layer"])


def test_each_batch_size_is_compared_and_a_logit_that_is_no_number_is_no_success():
    """Each has a graph of its own: one that is wrong must not hide behind that of the largest size."""
    fused = bench.Step(Variant("nf4", "direct", "fused-graph"))
    right = torch.randn(6, 4)

    def at(size):
        return {1: right * torch.nan, 2: -right, 3: right}[size]

    class Fake:
        loaded = SimpleNamespace(preprocess=SimpleNamespace(normalise=lambda chunk, _: chunk), device=CPU, dtype=None)

        def __init__(self):
            self.done = 0

        def __call__(self, pixels):
            first, self.done = self.done % 6, self.done + len(pixels)
            return at(len(pixels))[first : first + len(pixels)]

    found = bench._quality([fused], {fused.name: Fake()}, {"nf4-sdpa": right}, torch.zeros(6, 1), [1, 2, 3])
    assert found["relative_error"].tolist() == [np.inf, 2, 0] and found["agreement"].iloc[2] == 1
    frame = rows(step=fused.name, batch=[1, 2, 3], gelu="checkpoint", relative_error=found["relative_error"])
    assert bench.targets(frame, False).set_index("target")["reached"].iloc[-2] == "no"


def test_a_step_that_cannot_be_built_does_not_end_the_run(checkpoints, settings, pixels, monkeypatch):
    wanted = [bench.Step(Variant("fp32")), bench.Step(Variant("fp32", "direct", "fused"), "tanh")]
    monkeypatch.setattr(bench.engine.fused, "_activation", lambda *_: (_ for _ in ()).throw(ValueError("only a GELU")))
    found, _ = bench.measure_engines(settings, checkpoints, pixels, wanted)
    assert found["note"].dropna().tolist() == ["not run: only a GELU"]
    wrong = bench.models.EvidenceError("not NF4")
    monkeypatch.setattr(bench.engine.fused, "_activation", lambda *_: (_ for _ in ()).throw(wrong))
    with pytest.raises(bench.models.EvidenceError):  # what is not the variant asked for is no missing kernel
        bench.measure_engines(settings, checkpoints, pixels, wanted)


def test_machines_with_many_cores_can_run_the_bench(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(192)), raising=False)
    assert bench.default_settings(torch.device("cuda")).workers == 64


def test_a_step_that_cannot_run_keeps_its_row_with_the_reason(checkpoints, settings, pixels):
    wanted = [bench.Step(Variant("fp32")), bench.Step(Variant("fp16", "sdpa", "graph"))]
    found, _ = bench.measure_engines(settings, checkpoints, pixels, wanted)
    row = found[found["step"] == "fp16-sdpa-graph"]
    assert row["note"].tolist() == ["not run: CUDA graphs need a CUDA device"] and row["ms"].isna().all()


def test_everything_is_measured_on_random_weights_where_there_is_no_study(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "study_folder", lambda study: tmp_path / study)
    small = {"architecture": "vit-micro", "image_size": 32, "pictures_per_class": 4, "ablation_pictures": 6}
    settings = params.check({"study": "bench", **SMALL, **small, "limit": 30, "train_batch_size": 2})
    frame = bench.run(settings, ("pipeline", "ablation", "training"), None)
    written = records.read_table(tmp_path / "bench" / "records" / "bench.csv")
    assert set(written["part"]) == {"pipeline", "ablation", "training"} and set(written["weights"]) == {"random"}
    shared = frame[frame["step"] == "shared"].iloc[0]
    assert shared["share"] <= 0.55 + 1 / 4  # four blocks share less than 24
    assert np.isfinite(frame.loc[frame["part"] == "training", "images_per_s"]).all()
    overlapped = frame.set_index("step").loc["overlapped, pil"]
    assert 0 < overlapped["share_low"] <= overlapped["share"] <= overlapped["share_high"]
    count, kinds = re.fullmatch(r"2 threads, (\d+) pictures of (\d+ × picture)", overlapped["note"]).groups()
    assert int(count) >= bench.BATCHES * 3 and int(count) % int(kinds.split()[0]) == 0  # few are taken several times
    assert "nvJPEG decodes on a CUDA device" in frame.set_index("step").loc["overlapped, nvjpeg", "note"]
    names = {file.name for file in (tmp_path / "bench" / "records").iterdir()}
    assert names == {"bench.csv", "targets.csv", "bench.json"}


def test_a_training_step_without_its_baseline_has_no_factor(checkpoints, settings, monkeypatch):
    """The next step must not become the baseline where PEFT as it comes does not fit the memory."""
    steps = pd.DataFrame({"step": list("abcd"), "dropout": [0.1, 0.0, 0.1, 0.0], "images_per_s": [np.nan, 2, 5, 6]})
    monkeypatch.setattr(bench.trainspeed, "step_speed", lambda *_, **__: steps)
    found = bench.measure_training(settings, checkpoints)["times_baseline"]
    assert found.isna().tolist() == [True, False, True, False] and found.dropna().tolist() == [1, 3]


def test_random_checkpoints_are_those_of_a_study(tmp_path):
    small = {"architecture": "vit-micro", "image_size": 32, "pictures_per_class": 4}
    settings = params.check({"study": "bench", **SMALL, **small})
    folder = bench.random_study(settings, tmp_path / "checkpoints", sources.load(settings))
    assert {path.name for path in folder.iterdir()} == {"merged", "nf4", "int8"}


def test_the_study_keeps_its_own_tuning_table(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "study_folder", lambda study: tmp_path / study)
    kept = tmp_path / "bench" / "records" / "tuning.csv"
    kept.parent.mkdir(parents=True)
    kept.write_text("of notebook 2\n")
    small = {"architecture": "vit-micro", "image_size": 32, "pictures_per_class": 4, "limit": 30}
    bench.run(params.check({"study": "bench", **SMALL, **small}), ("engine",), None)
    assert kept.read_text() == "of notebook 2\n" and kept.with_name("bench_tuning.csv").is_file()


def test_a_run_without_the_engine_leaves_no_tuning_of_an_earlier_one(tmp_path, monkeypatch):
    """The page would show it as this run's."""
    monkeypatch.setattr(files, "study_folder", lambda study: tmp_path / study)
    folder = tmp_path / "bench" / "records"
    folder.mkdir(parents=True)
    (folder / "bench_tuning.csv").write_text("step\nof another run\n")
    small = {"architecture": "vit-micro", "image_size": 32, "pictures_per_class": 4, "limit": 30}
    bench.run(params.check({"study": "bench", **SMALL, **small}), ("pipeline",), None)
    assert {path.name for path in folder.iterdir()} == {"bench.csv", "targets.csv", "bench.json"}


def test_what_is_measured_is_the_study_that_was_named(tmp_path, monkeypatch):
    """A parameter file need not say its own name; the default study's records must not be overwritten for it."""
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "mine.yaml").write_text("limit: 30\n")
    monkeypatch.setattr(files, "project_root", lambda: tmp_path)
    monkeypatch.setattr(bench.models, "checkpoint_folder", lambda folder, variant: folder)
    options = argparse.Namespace(study="mine", batch_sizes=[1, 2])
    settings, checkpoints = bench._chosen(options)
    assert (settings.study, settings.batch_sizes, settings.rounds) == ("mine", [1, 2], bench.BUDGET["rounds"])
    assert checkpoints == tmp_path / "outputs" / "mine" / "checkpoints"


def test_a_study_that_was_not_trained_is_an_error_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "mine.yaml").write_text("limit: 30\n")
    monkeypatch.setattr(files, "project_root", lambda: tmp_path)
    monkeypatch.setattr("sys.argv", ["bench", "--study", "mine"])
    with pytest.raises(SystemExit, match=r"^error: .*finetune"):
        bench.main()


def test_a_bench_that_fails_at_once_leaves_the_records_of_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "study_folder", lambda study: tmp_path / study)
    kept = tmp_path / "bench" / "records" / "bench_tuning.csv"
    kept.parent.mkdir(parents=True)
    kept.write_text("step\nof the last run\n")
    small = {"architecture": "vit-micro", "image_size": 32, "pictures_per_class": 4, "limit": 30}
    monkeypatch.setattr(bench, "measure_pipeline", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench.run(params.check({"study": "bench", **SMALL, **small}), ("pipeline",), None)
    assert kept.is_file()


def test_a_study_that_wants_another_machine_is_an_error_in_one_line(monkeypatch):
    def on_this_machine(*_):
        raise bench.NotRun("device is 'cuda', but no CUDA device is visible")

    monkeypatch.setattr(bench, "run", on_this_machine)
    monkeypatch.setattr("sys.argv", ["bench"])
    with pytest.raises(SystemExit, match=r"^error: device is 'cuda'"):
        bench.main()


def test_bad_batch_sizes_are_an_error_in_one_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench", "--batch-sizes", "32", "1"])
    with pytest.raises(SystemExit, match="error: batch_sizes"):
        bench.main()
