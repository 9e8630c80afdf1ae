"""What pages say of a base: never that a stand-in or random weights are pretrained."""

import json

import pytest
import standin

from vitlib import finetune
from vitlib.study import origin, params
from vitlib.study.study import Study


@pytest.fixture
def project(tmp_path, monkeypatch):
    for folder in ("vitlib", "params", "bases/stage2", "bases/theirs", "outputs/demo/records"):
        (tmp_path / folder).mkdir(parents=True)
    provenance = {"origin": standin.ORIGIN, "pretrained": False, "training pictures": 6552, "top1": 0.7763}
    (tmp_path / "bases" / "stage2" / "provenance.json").write_text(json.dumps(provenance))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("base", "kind", "words"),
    [
        ("random", "random", "has random weights"),
        ("pretrain", "generator", "other synthetic flowers from the generator"),
        ("bases/stage2", "stand-in", "stand-in, not a pretrained network"),
        ("bases/gone/stage2", "folder", "`stage2`; what it was trained on is not recorded"),
        ("bases/theirs", "folder", "what it was trained on is not recorded"),
        ("google/vit-large-patch16-224", "hub", "`google/vit-large-patch16-224` from the Hub at commit abcdef1234.**"),
    ],
)
def test_each_kind_of_base_is_said(project, base, kind, words):
    found = origin.describe(base, revision="abcdef1234567890")
    text = origin.sentence(found)
    assert found["kind"] == kind and words in text
    assert (" nothing about " in text or "do not predict" in text) == (kind in ("random", "generator", "stand-in"))


def test_a_folder_that_is_gone_is_no_repository_of_the_hub(project):
    assert origin.describe("bases/gone")["kind"] == "folder"


def test_a_stand_in_says_what_it_saw_and_reached(project):
    text = origin.sentence(origin.describe("bases/stage2"))
    assert "on the training split of the same data, 6,552 pictures. Before fine-tuning it reached 77.63 % Top-1" in text


def test_the_evaluated_checkpoint_comes_before_the_record(project):
    demo = project / "outputs" / "demo"
    assert origin.of_study(demo) == {} and origin.sentence(demo) == ""
    (demo / "records" / "base.json").write_text(json.dumps(origin.describe("random")))
    assert "random weights" in origin.sentence(demo)
    merged = demo / "checkpoints" / "merged"
    merged.mkdir(parents=True)
    (merged / "provenance.json").write_text(json.dumps({"origin": origin.describe("bases/stage2")}))
    assert "stand-in" in origin.sentence(demo)


def test_the_record_names_no_folder_of_the_machine(project):
    base = finetune.Base(None, None, None, None, origin.describe(str(project / "bases" / "stage2")))
    text = finetune.introduce(Study.of(params.check({"study": "demo"})), base)
    written = (project / "outputs" / "demo" / "records" / "base.json").read_text()
    assert "stand-in" in text and json.loads(written)["base"] == "stage2" and str(project) not in written
