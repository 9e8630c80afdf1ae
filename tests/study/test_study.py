"""A study opens, reads, writes and locks what belongs to it."""

import socket
import subprocess
import sys

import IPython
import pandas as pd
import pytest
from filelock import FileLock, Timeout

from vitlib.study import files, params, records
from vitlib.study import study as study_module
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


HOLD = """
import sys
from vitlib.study import files
from vitlib.study.study import Study
study = Study.at(sys.argv[1])
with study.locked(), files.unchanged_on_error(study.folder, ["records", "old.html", "new.html"]):
    (study.folder / "old.html").write_text("of the killed run")
    (study.folder / "new.html").write_text("of the killed run")
    study.record("base.json").write_text("of the killed run")
    study.record("new.json").write_text("of the killed run")
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_is_killed_and_its_changes_are_undone(study):
    """Also the page, which would stand beside the records of another run."""
    study.write_json("base", {"kind": "random"})
    (study.folder / "old.html").write_text("before")
    words = [sys.executable, "-c", HOLD, str(study.folder)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        said = rf"running study 'unit' \(pid {holder.pid} on {socket.gethostname()} since 20\d\d-"
        with pytest.raises(StudyBusy, match=said), study.locked():
            pass
        assert study.has("new.json")
        holder.kill()
    with study.locked():  # a dead holder's lock is free
        assert study.read_json("base") == {"kind": "random"} and not study.has("new.json")
        assert (study.folder / "old.html").read_text() == "before" and not (study.folder / "new.html").exists()


def test_a_notebooks_kernel_holds_its_study_until_it_opens_another(study, monkeypatch):
    monkeypatch.setattr(IPython, "get_ipython", object)
    other = Study.of(params.check({"study": "other"}))

    def held(one):
        try:
            with FileLock(one.folder / ".lock", blocking=False):  # as another process would
                return False
        except Timeout:
            return True

    for _ in range(2):
        Study.open({"study": "unit"})
        assert held(study)
    Study.open({"study": "other"})
    assert held(other) and not held(study)
    study_module._kernel.close()
    assert not held(other)
    with other.locked():  # as the process that starts the kernel does
        Study.open({"study": "other"})
        assert held(other)
    assert not held(other)
