"""One pipeline for every variant; a row that cannot run says so; nothing is derived that should be measured."""

import dataclasses
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoImageProcessor

from vitlib import (
    ablation,
    benchmark,
    checkpoint,
    decode,
    evaluate,
    files,
    inference,
    params,
    records,
    stats,
    synthetic,
)
from vitlib.sources import DataError, Dataset, Picture

NAMES = ["fp32-sdpa", "nf4-sdpa", "int8-sdpa", "nf4-flash_attention_2"]


@pytest.fixture(scope="module")
def settings():
    return params.check(
        {
            "study": "unit",
            "device": "cpu",
            "variants": NAMES,
            "batch_sizes": [1, 4],
            "rounds": 2,
            "samples": 3,
            "round_seconds": 0.05,
            "cpu_samples": 1,
            "profile_batch_size": 2,
            "workers": 1,
        }
    )


def dataset_for(labels) -> Dataset:
    """Three pictures of each of the checkpoint's classes."""

    def draw(folder: str, index: int) -> Picture:
        flower = synthetic.TARGET_CLASSES[int(folder) % len(synthetic.TARGET_CLASSES)]
        pixels = synthetic.render(flower, index=index, split="valid", seed=0, size=32)
        return Picture(f"valid/{folder}/{index}", folder, lambda: evaluate.data.Image.fromarray(pixels))

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
def bench(project, settings, labels):
    return evaluate.prepare(settings, dataset_for(labels))


@pytest.fixture(scope="module")
def table(bench, settings):
    logits = evaluate.outputs(bench, settings)
    _, device_times = benchmark.device_time(bench, settings)
    latencies, throughputs, clocks = benchmark.measure(bench, settings)
    return evaluate.variants_table(
        bench,
        settings,
        quality=evaluate.accuracy(bench, logits, settings),
        speeds=benchmark.speed(latencies, throughputs, bench.baseline),
        memories=benchmark.memory(bench, settings),
        cpu=benchmark.cpu_latency(bench, settings),
        device_times=device_times,
        clocks=clocks,
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
    ran = table[table["status"] == "ok"]
    not_here = {"latency_p95_ms", "latency_p99_ms", "peak_vram_mb"}  # too few samples; no GPU
    filled = ran[[name for name in records.COLUMNS["variants"] if name not in not_here]]
    assert filled.notna().all(axis=None)
    assert ran[list(not_here)].isna().all(axis=None)


def test_a_latency_that_differs_by_chance_is_not_called_lower():
    assert evaluate._faster(1.03, "not shown") == "not shown to differ"
    assert evaluate._faster(1.01, "same") == "the same"
    assert (
        evaluate._faster(2.0, "faster") == "2.00 times lower" and evaluate._faster(0.5, "slower") == "2.00 times higher"
    )


def test_throughput_is_what_was_measured_at_that_batch_size():
    """Latencies say 100 images a second at batch 1 and 800 at batch 8; what was measured says otherwise and counts."""
    keys = [("fp32-sdpa", batch, number) for batch in (1, 8) for number in range(10)]
    latencies = pd.DataFrame(keys, columns=["variant", "batch", "round"]).assign(
        sample=0, latency_ms=10.0, device_ms=np.nan
    )
    throughputs = latencies[["variant", "batch", "round"]].assign(throughput_img_s=latencies["batch"] * 50.0)
    found = benchmark.speed(latencies, throughputs, "fp32-sdpa").set_index("batch")["throughput_img_s"]
    assert found.to_dict() == {1: 50.0, 8: 400.0}


def test_the_baseline_agrees_with_itself_and_quantized_rows_diverge(table):
    rows = table.drop_duplicates("variant").set_index("variant")
    assert rows.loc["fp32-sdpa", "agreement_with_baseline"] == 1
    assert rows.loc["fp32-sdpa", "logit_kl"] == 0
    assert 0 < rows.loc["int8-sdpa", "logit_kl"] < rows.loc["nf4-sdpa", "logit_kl"]


def test_sizes_are_those_of_the_weights(table):
    rows = table.drop_duplicates("variant").set_index("variant")["model_mb"]
    assert rows["fp32-sdpa"] > 3 * rows["int8-sdpa"] > rows["nf4-sdpa"] * 3


def test_records_and_environment_are_written(project, table):
    folder = project / "outputs" / "unit" / "records"
    assert len(records.read_table(folder / "variants.csv")) == len(table)
    for name in ("kernels", "latency", "throughput"):
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


def test_classes_in_another_order_change_nothing(project, settings, labels, bench):
    """The original study took ids from sorted folder names: '1', '10', '2'."""
    shuffled = dataset_for(labels)
    shuffled.splits["valid"] = shuffled.splits["valid"][::-1]
    other = evaluate.prepare(settings, shuffled)
    first, second = (
        evaluate.accuracy(b, {n: evaluate.engine.logits(e, b.valid.pixels, 4) for n, e in b.engines.items()}, settings)
        for b in (bench, other)
    )
    columns = ["variant", "n", "right", "top5", "flips", "lost", "gained", "verdict"]
    pd.testing.assert_frame_equal(first[columns], second[columns])


def test_ids_are_the_checkpoints_everywhere(bench, labels, project, settings):
    assert bench.labels == labels
    subject = ablation.prepare(settings, dataset_for(labels))
    assert subject.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3


def test_the_network_sees_what_the_checkpoints_own_processor_makes(bench, settings, checkpoints, labels, project):
    """The original study typed mean and deviation anew in each notebook; here all three agree."""
    processor = AutoImageProcessor.from_pretrained(checkpoints / "merged", backend="pil")
    pictures = dataset_for(labels).splits["valid"]
    expected = processor(images=[picture.open() for picture in pictures], return_tensors="pt")["pixel_values"]
    seen = []

    def spy(module, args, kwargs):
        seen.append((args[0] if args else kwargs["pixel_values"]).float())

    def watched(model):
        return model.vit.embeddings.register_forward_pre_hook(spy, with_kwargs=True)

    subject = ablation.prepare(settings, dataset_for(labels))
    predictor = inference.load(settings)
    networks = [bench.engines["fp32-sdpa"].loaded.model, subject.loaded.model, predictor.engine.loaded.model]
    handles = [watched(network) for network in networks]
    evaluate.outputs(dataclasses.replace(bench, engines={"fp32-sdpa": bench.engines["fp32-sdpa"]}), settings)
    ablation.measure(subject, settings.model_copy(update={"ablation_bits": [8]}))
    inference.predict(predictor, pictures, [], settings)
    for handle in handles:
        handle.remove()
    assert len(seen) == 3
    for batch in seen:
        torch.testing.assert_close(batch, expected, rtol=0, atol=5e-3)


def test_checkpoints_of_different_trainings_are_not_compared(project, settings, labels, checkpoints):
    copy = project / "outputs" / "mixed" / "checkpoints"
    shutil.copytree(checkpoints, copy)
    (copy / "nf4" / "provenance.json").write_text(json.dumps({"merged_sha256": "of another training"}))
    with pytest.raises(checkpoint.CheckpointError, match="other weights"):
        evaluate.prepare(settings.model_copy(update={"study": "mixed"}), dataset_for(labels))


def test_fewer_classes_than_the_checkpoint_knows_is_an_error(project, settings, labels):
    dataset = dataset_for(labels)
    dataset.splits["valid"] = [picture for picture in dataset.splits["valid"] if picture.label != "10"]
    with pytest.raises(DataError, match="knows 3"):
        evaluate.prepare(settings, dataset)


def test_checkpoints_of_different_preprocessing_are_not_compared(project, settings, labels, checkpoints, monkeypatch):
    copy = project / "outputs" / "other" / "checkpoints"
    shutil.copytree(checkpoints, copy)
    config = json.loads((copy / "nf4" / "preprocessor_config.json").read_text())
    config["image_mean"] = [0.485, 0.456, 0.406]
    (copy / "nf4" / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(checkpoint.CheckpointError, match="different preprocessing"):
        evaluate.prepare(settings.model_copy(update={"study": "other"}), dataset_for(labels))


def test_data_checksum_changes_with_a_label(bench):
    before = evaluate.data_checksum(bench)
    changed = [*bench.valid.pictures[:-1], Picture(bench.valid.pictures[-1].file, "2", None)]
    other = evaluate.Bench(**{**vars(bench), "valid": decode.Decoded(bench.valid.pixels, changed, [])})
    assert evaluate.data_checksum(other) != before
