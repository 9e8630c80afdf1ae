"""A study opens, reads, writes and locks what belongs to it."""

import subprocess
import sys

import pandas as pd
import pytest

from vitlib.study import files, params, records
from vitlib.study.study import Study, StudyBusy


@pytest.fixture
def study(tmp_path, monkeypatch) -> Study:
    monkeypatch.setattr(files, "project_root", lambda: tmp_path)
    return Study.of(params.check({"study": "unit"}))


def test_everything_lies_in_the_studys_folder(study, tmp_path):
    assert study.folder == tmp_path / "outputs" / "unit"
    assert study.checkpoint("nf4") == study.folder / "checkpoints" / "nf4"
    assert study.record("variants") == study.folder / "records" / "variants.csv"
    assert study.record("logits.npz").name == "logits.npz"


def test_tables_and_json_come_back(study):
    frame = pd.DataFrame({"check": ["a"], "found": ["1"], "required": ["1"], "reached": ["yes"]})
    study.write("validity", frame)
    study.write_json("base", {"kind": "random"})
    assert study.has("validity") and study.read_json("base.json") == {"kind": "random"}
    assert study.read("validity")["check"].tolist() == ["a"]


def test_a_missing_record_names_its_notebook(study):
    with pytest.raises(records.MissingRecord, match="run 2_evaluate first"):
        study.read("variants")


def test_what_is_missing_names_the_studies_that_have_it(study, tmp_path):
    assert files.elsewhere(study.checkpoint("nf4")) == ""
    for other in ("b", "a"):
        (tmp_path / "outputs" / other / "checkpoints" / "nf4").mkdir(parents=True)
    assert files.elsewhere(study.checkpoint("nf4")) == ", or set `study` to one that has it: a, b"
    assert files.elsewhere(study.checkpoint("int8")) == ""


def test_a_notebooks_first_cell_can_run_twice(study):
    assert Study.open({"study": study, "seed": 3}) == Study.of(params.check({"study": "unit", "seed": 3}))


def test_a_second_process_is_refused_until_the_first_ends(study):
    take = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire()"
    code = f"{take}; print('held', flush=True); sys.stdin.read()"
    study.folder.mkdir(parents=True)
    words = [sys.executable, "-c", code, str(study.folder / ".lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(StudyBusy, match="running study 'unit'"), study.locked():
            pass
        holder.kill()
    with study.locked():  # a dead holder's lock is free
        pass
