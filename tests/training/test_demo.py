"""The demo's base is trained once for the same settings."""

import json

import torch

from vitlib.study import files, params
from vitlib.study.study import Study
from vitlib.training import demo

CPU = torch.device("cpu")


def test_the_demos_base_is_trained_once_for_the_same_settings(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "PICTURES", 3)
    monkeypatch.setattr(files, "project_root", lambda: tmp_path)
    chosen = {"study": "unit", "architecture": "vit-micro", "image_size": 32, "pretrain_epochs": 1, "workers": 1}
    study = Study.of(params.check(chosen))
    folder = demo.base(study, CPU)
    note, changed = json.loads((folder / "provenance.json").read_text()), (folder / "config.json").stat().st_mtime_ns
    assert note["trained on"] == "the generator's pretraining classes" and 0 <= note["top1"] <= 1
    assert demo.base(study, CPU) == folder and (folder / "config.json").stat().st_mtime_ns == changed
    (folder / "labels.json").write_text("[]")
    assert demo.base(study, CPU) == folder and json.loads((folder / "labels.json").read_text())
    assert "resuming from checkpoint-" in capsys.readouterr().out  # of the training, which was whole
