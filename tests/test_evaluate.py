"""One pipeline for every variant; a row that cannot run says so; nothing is derived that should be measured."""

import dataclasses
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from vitlib import ablation, evaluate, inference
from vitlib.measure import roofline, stats
from vitlib.network import checkpoint
from vitlib.network.checkpoint import CheckpointError
from vitlib.network.verify import GateError
from vitlib.pictures import synthetic
from vitlib.pictures.decode import Decoded, Picture
from vitlib.pictures.sources import DataError, Dataset
from vitlib.report import layout
from vitlib.study import files, params, records
from vitlib.study.study import Study

NAMES = ["fp32-sdpa", "nf4-sdpa", "int8-sdpa", "nf4-flash_attention_2"]


@pytest.fixture(scope="module")
def settings():
    few = {"batch_sizes": [1, 4], "rounds": 2, "samples": 3, "round_seconds": 0.01, "cpu_samples": 1, "workers": 1}
    return params.check({"study": "unit", "device": "cpu", "variants": NAMES, "profile_batch_size": 2} | few)


def dataset_for(labels) -> Dataset:
    """Three pictures of each of the checkpoint's classes."""
    flowers = synthetic.classes("in the study")

    def draw(folder: str, index: int) -> Picture:
        flower = flowers[int(folder) % len(flowers)]
        pixels = synthetic.render(flower, index=index, split="valid", seed=0, size=32)
        return Picture(f"valid/{folder}/{index}", folder, lambda: Image.fromarray(pixels))

    pictures = [draw(folder, index) for folder in labels.folders for index in range(3)]
    return Dataset({"train": list(pictures), "valid": pictures}, dict(zip(labels.folders, labels.names, strict=True)))


@pytest.fixture(scope="module")
def project(checkpoints, tmp_path_factory):
    """A project folder whose study 'unit' has the checkpoints."""
    root = tmp_path_factory.mktemp("project")
    (root / "outputs" / "unit").mkdir(parents=True)
    (root / "outputs" / "unit" / "checkpoints").symlink_to(checkpoints)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "project_root", lambda: root)
        yield root


@pytest.fixture(scope="module")
def study(project, settings):
    return Study.of(settings)


@pytest.fixture(scope="module")
def bench(study, labels):
    return evaluate.prepare(study, dataset_for(labels))


@pytest.fixture(scope="module")
def profiled(study, bench):
    return evaluate.device_time(study, bench)


@pytest.fixture(scope="module")
def measured(study, bench):
    return evaluate.measure(study, bench)


@pytest.fixture(scope="module")
def checks(study, bench, measured, profiled):
    return evaluate.validity(study, bench, measured[0], profiled[1], measured[2])


@pytest.fixture(scope="module")
def table(study, bench, measured, profiled):
    logits = evaluate.outputs(study, bench)
    peak = roofline.Ceilings({"float32": 0.1, "float16": 0.1}, gb_s=10.0)  # measuring them takes most of a minute
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "ceilings", lambda device: peak)
        evaluate.against_the_roofline(study, bench, profiled[0])
    return evaluate.variants_table(
        study,
        bench,
        measured[1],
        evaluate.memory(study, bench),
        evaluate.against_reference(study, bench, logits),
        evaluate.accuracy(study, bench, logits),
        evaluate.cpu_latency(study, bench, measured[0]),
        profiled[1],
        clocks=measured[2],
    )


def test_every_variant_asked_for_has_a_row(table):
    ran = table[table["status"] == "ok"]
    assert list(dict.fromkeys(table["variant"])) == NAMES
    assert ran.groupby("variant")["batch"].apply(list).to_dict() == {name: [1.0, 4.0] for name in NAMES[:3]}


def test_what_cannot_run_here_has_a_reason_and_no_numbers(table):
    row = table[table["variant"] == "nf4-flash_attention_2"].iloc[0]
    assert (row["status"], row["reason"]) == ("not run", "FlashAttention-2 needs a CUDA device")
    assert row[["latency_p50_ms", "throughput_img_s", "top1", "device_time_us"]].isna().all()


def test_every_measured_column_is_filled(table):
    assert {"gelu", "held_mb", "prepare_s", "rounds", "times_baseline", "reference", "relative_error"} <= set(table)
    ran = table[table["status"] == "ok"]
    not_here = {"latency_p95_ms", "latency_p99_ms", "peak_vram_mb"}  # too few samples; no GPU
    filled = ran[[name for name in records.COLUMNS["variants"] if name not in not_here]]
    assert filled.notna().all(axis=None)
    assert ran[list(not_here)].isna().all(axis=None)


def test_the_latency_of_one_picture_on_the_cpu_is_measured_once(study, bench, measured):
    """Where the device is the CPU, the benchmark has it; without batch size 1 it is measured apart."""
    one = measured[0].query("batch == 1").groupby("variant")["latency_ms"].median()
    found = evaluate.cpu_latency(study, bench, measured[0]).set_index("variant")["cpu_latency_ms"]
    assert found.to_dict() == one.to_dict()
    apart = evaluate.cpu_latency(study, bench, measured[0].query("batch == 4")).set_index("variant")
    assert set(apart.index) == set(NAMES[:3]) and (apart["cpu_latency_ms"] > 0).all()


def test_the_headline_is_a_few_sentences_and_names_no_identifier(table, checks):
    text = evaluate.headline(table, checks)
    first, *others = text.splitlines()
    assert len(others) == 3  # speed, accuracy, what did not run and the checks that failed
    assert "NF4 · SDPA" in first and "times smaller" in first and len(layout.plain(first).split(". ")[0]) <= 160
    assert "FlashAttention-2 needs a CUDA device" in text and "-sdpa" not in text
    assert "of 9" in text or "no picture changes class" in text
    same = table[table["variant"] == "fp32-sdpa"]
    same = pd.concat([same, same.assign(variant="fp16-sdpa", verdict="non-inferior", against_baseline="same")])
    text = evaluate.headline(same, checks[checks["reached"] == "yes"])
    assert "FP16 · SDPA is **no smaller** than FP32; no picture changes class." in text
    assert "Latency at batch size 1: equally fast within 2 %." in text and "Failed" not in text


def test_a_study_of_one_variant_has_a_headline_and_a_figure(study, table, checks):
    alone = table[table["variant"] == "fp32-sdpa"]
    text = evaluate.headline(alone, checks[checks["reached"] == "yes"])
    assert text.startswith("- FP32 · SDPA takes") and len(text.splitlines()) == 1
    assert "FP32 out of the box" in repr(evaluate.hero(study, alone))
    assert (study.folder / "hero.svg").read_text().startswith("<?xml")


def test_the_finding_names_factors_and_the_change_of_accuracy(table):
    quick = {"times_baseline": 7.35, "times_baseline_low": 7.1, "times_baseline_high": 7.6, "flips": 3}
    quick |= {"against_baseline": "faster", "difference": 0.002, "difference_low": -0.002, "difference_high": 0.009}
    rows = table[table["variant"].isin(["fp32-sdpa", "nf4-sdpa"])]
    rows = pd.concat([rows[rows["variant"] == "fp32-sdpa"], rows[rows["variant"] == "nf4-sdpa"].assign(**quick)])
    none = pd.DataFrame({"check": [], "found": [], "reached": []})
    said = layout.plain(evaluate.headline(rows, none).splitlines()[0])
    assert said.startswith("NF4 · SDPA is 7.3 times faster than FP32 at batch size 1 and ")
    assert "Top-1 changes by +0.2 points (95 % interval -0.2 … +0.9). With all that a call needs it is" in said


def test_a_variant_that_the_gate_refuses_keeps_its_row(bench):
    refused = {"nf4-sdpa": "identity gate: bitsandbytes was not used"}
    left = bench.without(refused)
    assert "nf4-sdpa" not in left.engines and "nf4-sdpa" in bench.engines
    assert left.reasons["nf4-sdpa"] in evaluate.status(left).set_index("variant").loc["nf4-sdpa", "status"]
    with pytest.raises(GateError, match="baseline"):
        bench.without({bench.baseline: "fault"})


def test_a_reference_is_the_eager_network_with_the_same_weights(study, bench):
    logits = {name: torch.eye(9, 3) for name in bench.engines}
    logits["nf4-sdpa"] = logits["nf4-sdpa"].flip(1)
    rows = evaluate.against_reference(study, bench, logits).set_index("variant")
    assert rows["reference"].to_dict() == {name: name for name in bench.engines}
    assert rows["relative_error"].isna().all()  # nothing is compared with itself


def test_the_baseline_agrees_with_itself_and_quantized_rows_diverge(table):
    rows = table.drop_duplicates("variant").set_index("variant")
    assert rows.loc["fp32-sdpa", "agreement_with_baseline"] == 1
    assert rows.loc["fp32-sdpa", "logit_kl"] == 0
    assert 0 < rows.loc["int8-sdpa", "logit_kl"] < rows.loc["nf4-sdpa", "logit_kl"]


def test_sizes_are_those_of_the_weights(table):
    rows = table.drop_duplicates("variant").set_index("variant")["model_mb"]
    assert rows["fp32-sdpa"] > 3 * rows["int8-sdpa"] > rows["nf4-sdpa"] * 3


def test_records_and_environment_are_written(project, table, checks):
    folder = project / "outputs" / "unit" / "records"
    assert len(records.read_table(folder / "variants.csv")) == len(table)
    for name in ("kernels", "latency", "throughput", "validity", "roofline"):
        assert len(records.read_table(folder / f"{name}.csv")) > 0
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["parameters"]["variants"] == NAMES
    assert "epochs" not in environment["parameters"]  # this notebook did not use it
    assert set(environment["checksums"]) == {"weights", "data"}
    with np.load(folder / "logits.npz") as arrays:
        assert arrays["fp32-sdpa"].shape == (9, 3)


def test_kept_logits_give_the_published_accuracy(project, table):
    with np.load(project / "outputs" / "unit" / "records" / "logits.npz") as arrays:
        again = stats.topk_accuracy(arrays["nf4-sdpa"], arrays["labels"], 1)
    assert table.set_index("variant").loc["nf4-sdpa", "top1"].iloc[0] == again


def test_classes_in_another_order_change_nothing(study, labels, bench):
    """The original study took ids from sorted folder names: '1', '10', '2'."""
    shuffled = dataset_for(labels)
    shuffled.splits["valid"] = shuffled.splits["valid"][::-1]
    other = evaluate.prepare(study, shuffled)
    first, second = (
        evaluate.accuracy(study, b, {n: evaluate.engine.logits(e, b.valid.pixels, 4) for n, e in b.engines.items()})
        for b in (bench, other)
    )
    columns = ["variant", "n", "right", "top5", "flips", "lost", "gained", "verdict"]
    pd.testing.assert_frame_equal(first[columns], second[columns])


def test_the_network_sees_what_the_checkpoints_own_processor_makes(bench, study, settings, checkpoints, labels):
    """The original study typed mean and deviation anew in each notebook; here all three agree."""
    processor = AutoImageProcessor.from_pretrained(checkpoints / "merged", backend="pil")
    pictures = dataset_for(labels).splits["valid"]
    expected = processor(images=[picture.open() for picture in pictures], return_tensors="pt")["pixel_values"]
    seen = []

    def spy(module, args, kwargs):
        seen.append((args[0] if args else kwargs["pixel_values"]).float())

    def watched(model):
        return model.vit.embeddings.register_forward_pre_hook(spy, with_kwargs=True)

    subject = ablation.prepare(study, dataset_for(labels))
    assert bench.labels == labels and subject.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    predictor = inference.load(study)
    networks = [bench.engines["fp32-sdpa"].loaded.model, subject.loaded.model, predictor.engine.loaded.model]
    handles = [watched(network) for network in networks]
    evaluate.outputs(study, dataclasses.replace(bench, engines={"fp32-sdpa": bench.engines["fp32-sdpa"]}))
    ablation.blocks.measure(Study.of(settings.model_copy(update={"ablation_bits": [8]})), subject)
    inference.predict(study, predictor, pictures, [])
    for handle in handles:
        handle.remove()
    assert len(seen) == 3
    for batch in seen:
        torch.testing.assert_close(batch, expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    ("file", "change", "fault"),
    [
        ("provenance.json", {"merged_sha256": "of another training"}, "other weights"),
        ("preprocessor_config.json", {"image_mean": [0.485, 0.456, 0.406]}, "different preprocessing"),
    ],
)
def test_checkpoints_that_do_not_belong_together_are_refused(
    project, settings, labels, checkpoints, file, change, fault
):
    copy = project / "outputs" / file / "checkpoints"
    shutil.copytree(checkpoints, copy)
    made = json.loads((copy / "nf4" / file).read_text())
    (copy / "nf4" / file).write_text(json.dumps(made | change))
    about = json.loads((copy / "nf4" / "provenance.json").read_text())
    checkpoint.seal(copy / "nf4", {key: value for key, value in about.items() if key != "record_sha256"})
    with pytest.raises(CheckpointError, match=fault):
        evaluate.prepare(Study.of(settings.model_copy(update={"study": file})), dataset_for(labels))


def test_a_checkpoint_without_a_list_of_checksums_is_called_unverified(bench, study):
    runs = evaluate.status(bench).set_index("variant")["status"]
    assert runs["nf4-sdpa"] == "runs" and "unverified" not in inference.reason(inference.load(study))
    foreign = {**bench.evidence, "nf4-sdpa": {**bench.evidence["nf4-sdpa"], "verified": False}}
    runs = evaluate.status(dataclasses.replace(bench, evidence=foreign)).set_index("variant")["status"]
    assert runs["nf4-sdpa"] == "runs, its files are unverified" and runs["fp32-sdpa"] == "runs"
    predictor = inference.load(study)
    predictor.engine.loaded.about = {}
    assert "unverified" in inference.reason(predictor)


def test_fewer_classes_than_the_checkpoint_knows_is_an_error(study, labels):
    dataset = dataset_for(labels)
    dataset.splits["valid"] = [picture for picture in dataset.splits["valid"] if picture.label != "10"]
    with pytest.raises(DataError, match="knows 3"):
        evaluate.prepare(study, dataset)


def test_data_checksum_changes_with_a_label(bench):
    before = bench.data_checksum()
    changed = [*bench.valid.pictures[:-1], Picture(bench.valid.pictures[-1].file, "2", None)]
    other = dataclasses.replace(bench, valid=Decoded(bench.valid.pixels, changed, []))
    assert other.data_checksum() != before
