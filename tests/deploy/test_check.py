"""The deployment checklist passes for what was saved, and fails at the line that names what is wrong."""

import json
import shutil

import pytest
import torch

from vitlib import __main__ as command
from vitlib.deploy import check
from vitlib.measure import timing
from vitlib.network import checkpoint, samples
from vitlib.pictures import preprocess
from vitlib.study import records

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(check, "BUDGET", timing.Budget(rounds=1, samples=2, seconds=0.01))


def failed(folder, variant="auto"):
    return [row.check for row in check.checklist(folder, variant, CPU) if row.status == check.FAILED]


@pytest.mark.parametrize(
    ("folder", "variant"),
    [
        *[("merged", "auto"), ("merged", "fp8-direct-fused"), ("nf4", "nf4-direct-fused")],
        *[("int8", "w8a8-direct-fused"), ("mixed", "mixed-direct-fused")],
    ],
)
def test_each_checkpoint_passes_in_another_execution_than_the_one_that_stored_the_logits(checkpoints, folder, variant):
    rows = {row.check: row for row in check.checklist(checkpoints / folder, variant, CPU)}
    assert [name for name, row in rows.items() if row.status == check.FAILED] == []
    assert rows["attention: FlashAttention-2"].status == check.NOT
    assert all(rows[name].status == check.OK for name in check.CAN_VERIFY)


def test_the_file_of_sample_pictures_is_small_and_what_was_drawn(checkpoints):
    images, logits, dtype = samples.read(checkpoints / "nf4")
    assert (len(images), logits.shape, dtype) == (12, (12, 3), torch.float16)
    assert all(image.size == size for image, size in zip(images, samples.SIZES, strict=True))
    assert all(
        image.tobytes() == drawn.convert("RGB").tobytes() for image, drawn in zip(images, samples.draw(), strict=True)
    )
    assert (checkpoints / "nf4" / samples.PICTURES).stat().st_size < 200_000
    weights = (checkpoints / "nf4" / "model.safetensors").stat().st_size
    assert checkpoint.disk_mb(checkpoints / "nf4") == weights / 2**20


def resealed(folder, change=None, **said):
    about = checkpoint.whole(folder)
    if change:
        file, key, value = change
        file = folder / file
        found = json.loads(file.read_text())
        part = found["quantization_config"] if key.startswith(("bnb", "llm")) else found
        part[key] = value
        file.write_text(json.dumps(found))
    checkpoint.seal(folder, about | said)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (("preprocessor_config.json", "resample", 0), ["preprocessing", "sample pictures"]),
        (("preprocessor_config.json", "image_mean", [0.42, 0.31, 0.53]), ["preprocessing", "sample pictures"]),
        (("config.json", "bnb_4bit_compute_dtype", "float32"), ["quantization config", "layers"]),
        (("config.json", "llm_int8_skip_modules", None), ["quantization config", "layers"]),
        (("config.json", "layer_norm_eps", 0.1), ["sample pictures"]),
    ],
)
def test_what_was_changed_and_sealed_again_fails_by_name(checkpoints, tmp_path, change, wrong):
    folder = shutil.copytree(checkpoints / "nf4", tmp_path / "nf4")
    resealed(folder, change)
    assert failed(folder) == wrong


def test_another_weight_file_a_damaged_one_and_an_unverified_one(checkpoints, tmp_path, capsys):
    folder = shutil.copytree(checkpoints / "nf4", tmp_path / "nf4")
    logits = folder / samples.LOGITS
    logits.write_text(logits.read_text().replace("0.", "1.", 1))
    assert command.main(["check", str(folder), "--json", str(tmp_path / "list.json")]) == 1
    assert "samples.json of the checkpoint 'nf4' is not as it was saved" in capsys.readouterr().out
    assert [row["check"] for row in records.read_json(tmp_path / "list.json")["checks"]] == ["checksums"]
    shutil.copy(checkpoints / "nf4" / samples.LOGITS, logits)
    (folder / checkpoint.PROVENANCE).unlink()
    assert command.main(["check", str(folder)]) == 2
    assert "not applicable  checksums" in capsys.readouterr().out
    shutil.copy(checkpoints / "nf4-calibrated" / samples.LOGITS, logits)  # logits of other weights
    assert failed(folder) == ["sample pictures"]
    assert command.main(["check", str(tmp_path / "nothing")]) == 1
    assert failed(checkpoints / "nf4", "nf4-flash_attention_2") == ["attention: FlashAttention-2", "device"]


def test_a_network_in_training_is_saved_as_it_is_and_goes_on_training(tmp_path, labels, pre):
    network = checkpoint.new("vit-micro", image_size=32, labels=labels).train()
    checkpoint.save(network, tmp_path / "merged", pre=pre, labels=labels, provenance={})
    assert network.training and samples.read(tmp_path / "merged")[2] == torch.float32
    with torch.no_grad():
        network.classifier.bias[0] = torch.nan
    with pytest.raises(FloatingPointError, match="logits that are not finite: its checkpoint is not saved"):
        checkpoint.save(network, tmp_path / "merged", pre=preprocess.new(32), labels=labels, provenance={})
    assert checkpoint.whole(tmp_path / "merged")
