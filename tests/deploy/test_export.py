"""An exported network computes what the original does at any batch size, or is not written."""

import json
import re

import onnxruntime
import pytest
import torch

from vitlib import __main__ as command
from vitlib.deploy import export
from vitlib.measure import timing
from vitlib.network import checkpoint, tuning
from vitlib.study import records
from vitlib.study.variants import Variant


@pytest.fixture(autouse=True)
def quickly(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "BUDGET", timing.Budget(rounds=8, samples=2, seconds=0.01))


def test_onnx_takes_any_batch_and_knows_classes_and_preprocessing(checkpoints, tmp_path, capsys):
    words = ["export", str(checkpoints), "--to", "onnx"]
    assert command.main(words) == 0
    session = onnxruntime.InferenceSession("vitlib-onnx/model.onnx", providers=["CPUExecutionProvider"])
    loaded = checkpoint.load(checkpoints, Variant("fp32"), torch.device("cpu"))
    pixels = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        expected = loaded.model(pixels).logits
    (found,) = session.run(["logits"], {"pixel_values": pixels.numpy()})
    assert tuning.relative_error(torch.from_numpy(found), expected) < 1e-5
    about = session.get_modelmeta().custom_metadata_map
    assert tuple(json.loads(about["labels"])) == loaded.labels.names
    assert json.loads(about["preprocessing"])["image_mean"] == [0.31, 0.42, 0.53]
    row = records.read_json(tmp_path / "vitlib-onnx" / "latency.json")
    assert (
        0 < row["difference"] < row["tolerance"] < 1e-5 and {"plain_ms", "exported_ms", "times_faster_low"} < row.keys()
    )
    assert command.main(words) == 1
    assert "vitlib-onnx exists" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    assert command.main([*words, "--output", "mine", "--overwrite"]) == 1  # it is no older export


def test_a_network_that_computes_something_else_is_not_written(checkpoints, tmp_path, monkeypatch, capsys):
    def other(plain, pixels, about, folder):
        (folder / "model.onnx").write_text("other")
        return lambda values: plain(values) + 1e-3 * (len(values) == 3)  # at one batch size only

    monkeypatch.setitem(export.EXPORTERS, "onnx", other)
    assert command.main(["export", str(checkpoints), "--to", "onnx"]) == 1 and list(tmp_path.iterdir()) == []
    assert re.search(r"nothing was written: .* at batch size 3, and rounding allows 3.8e-06", capsys.readouterr().err)


def test_what_cannot_be_exported_is_said_in_a_line(checkpoints, tmp_path, monkeypatch, capsys):
    def refused(message, *words):
        assert command.main(["export", *words]) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1

    refused("holds nf4: export takes FP32 and FP16", str(checkpoints / "nf4"), "--to", "onnx")
    monkeypatch.setenv("CXX", "no-such-compiler")
    refused("AOTInductor needs a C++ compiler", str(checkpoints), "--to", "aoti")
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    refused("pip install 'vitlib[export]'", str(checkpoints), "--to", "onnx")
    assert list(tmp_path.iterdir()) == []
