"""Paths, atomic writes under errors and SIGKILL, schemas of the records."""

import csv
import errno
import itertools
import json
import os
import signal
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from vitlib.study import files, records


def _frame(name: str, rows: int = 2) -> pd.DataFrame:
    return pd.DataFrame({column: [1.5] * rows for column in records.COLUMNS[name]})


def test_paths_are_looked_for_from_the_project(tmp_path, monkeypatch):
    for folder in ("vitlib", "params", "notebooks/deep"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "notebooks" / "deep")  # JupyterLab starts in notebooks/
    assert files.project_root() == tmp_path
    assert files.study_folder("smoke") == tmp_path / "outputs" / "smoke"
    assert files.resolve("data/flowers") == tmp_path / "data" / "flowers"
    assert files.resolve("~/flowers") == tmp_path / "home" / "flowers"
    assert files.resolve(str(tmp_path / "elsewhere")) == tmp_path / "elsewhere"


def test_project_root_without_a_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkout" / "vitlib").mkdir(parents=True)
    monkeypatch.setattr(files, "__file__", str(tmp_path / "checkout" / "vitlib" / "study" / "files.py"))
    assert files.project_root() == tmp_path  # Colab: vitlib is installed, there is no checkout
    (tmp_path / "checkout" / "params").mkdir()
    assert files.project_root() == tmp_path / "checkout"


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "-x", "_x", "../up", "a/b", "a\\b", "a b", "é", "a\n", None]
)
def test_study_names_that_are_not_plain_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match="letters, digits"):
        files.study_folder(name, root=tmp_path)
    assert files.study_folder("vit-l_16.v2", root=tmp_path).parent == tmp_path / "outputs"


def _names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_an_error_midway_leaves_the_old_file(tmp_path):
    target = tmp_path / "report.html"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), files.atomic_path(target) as temporary:
        temporary.write_text("ha")
        raise KeyboardInterrupt
    assert target.read_text() == "old" and _names(tmp_path) == ["report.html"]


def test_a_full_disk_is_said_whatever_the_library_says(tmp_path, monkeypatch):
    """safetensors and torch raise errors of their own; only the disk's free bytes say why."""
    (tmp_path / "a.csv").write_text("old")
    for error, free, found in (
        (OSError(errno.ENOSPC, "No space left on device"), 10**9, "no room on the disk for .*/a.csv: free some"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 10**9, "no room on the disk for .*/a.csv"),
        (RuntimeError("unexpected pos 64 vs 0"), 0, "no room on the disk for .*/a.csv: free some"),
        (RuntimeError("another fault"), 10**9, "another fault"),
    ):
        monkeypatch.setattr(files.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        with pytest.raises((OSError, RuntimeError), match=found), files.atomic_path(tmp_path / "a.csv"):
            raise error
    assert (tmp_path / "a.csv").read_text() == "old" and _names(tmp_path) == ["a.csv"]


def test_success_replaces_file_and_folder(tmp_path):
    for text in ("one", "two"):
        with files.atomic_path(tmp_path / "new" / "a.csv") as temporary:
            assert temporary.suffix == ".csv" and temporary.parent == tmp_path / "new"
            temporary.write_text(text)
        with files.atomic_path(tmp_path / "new" / "checkpoint") as temporary:
            (temporary / "part").mkdir(parents=True)
            (temporary / "part" / text).write_text(text)
    assert (tmp_path / "new" / "a.csv").read_text() == "two"
    assert _names(tmp_path / "new" / "checkpoint" / "part") == ["two"]
    assert _names(tmp_path / "new") == ["a.csv", "checkpoint"]
    with pytest.raises(FileNotFoundError, match="nothing was written"), files.atomic_path(tmp_path / "a"):
        pass


def test_an_error_midway_leaves_the_old_folder(tmp_path, monkeypatch):
    target = tmp_path / "checkpoint"
    target.mkdir()
    (target / "weights").write_text("old")

    def write() -> None:
        with files.atomic_path(target) as temporary:
            temporary.mkdir()
            (temporary / "weights").write_text("new")

    replace = os.replace

    def refused(source: Path, destination: Path) -> None:
        if source.name.startswith(".tmp-"):
            raise PermissionError("the new folder cannot be moved in")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(PermissionError):
        write()
    assert (target / "weights").read_text() == "old" and _names(tmp_path) == ["checkpoint"]


def _killed_while_writing(folder: Path) -> int:
    """Wait status of a process that SIGKILL ends when it has half written `file` and `folder/weights`."""
    with warnings.catch_warnings(action="ignore"):  # of numpy's threads, which the child leaves alone
        child = os.fork()
    if child == 0:
        try:
            with files.atomic_path(folder / "file") as one, files.atomic_path(folder / "folder") as two:
                two.mkdir()
                for path in (one, two / "weights"):
                    path.write_text("half of the new")
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_sigkill_midway_leaves_the_old_and_is_cleaned_up_later(tmp_path):
    targets = {"file": tmp_path / "file", "folder": tmp_path / "folder" / "weights"}
    for content in targets.values():
        content.parent.mkdir(exist_ok=True)
        content.write_text("old")
    assert os.WTERMSIG(_killed_while_writing(tmp_path)) == signal.SIGKILL
    assert len(_names(tmp_path)) == 4 and all(path.read_text() == "old" for path in targets.values())

    for name in targets:
        files._clean_leftovers(tmp_path / name)
    assert len(_names(tmp_path)) == 4  # they might belong to a run that is still writing
    for path in tmp_path.glob(".tmp-*"):
        os.utime(path, (0, 0))
    for name in targets:
        files._clean_leftovers(tmp_path / name)
    assert _names(tmp_path) == ["file", "folder"] and all(path.read_text() == "old" for path in targets.values())


def test_a_folder_that_stepped_aside_is_put_back(tmp_path):
    aside = tmp_path / ".old-0123456789ab-merged"
    aside.mkdir()
    (aside / "weights").write_text("old")
    with pytest.raises(RuntimeError), files.atomic_path(tmp_path / "merged"):
        raise RuntimeError("the next run fails too")
    assert _names(tmp_path) == ["merged"] and (tmp_path / "merged" / "weights").read_text() == "old"


@pytest.mark.parametrize("name", sorted(records.COLUMNS))
def test_schema_first_then_the_rest(name, tmp_path):
    frame = _frame(name).assign(extra=1)
    path = records.write_table(frame[frame.columns[::-1]], tmp_path / "records" / f"{name}.csv")
    assert tuple(records.read_table(path).columns) == (*records.COLUMNS[name], "extra")


def test_a_missing_schema_column_is_named(tmp_path):
    path = tmp_path / "ablation.csv"
    with pytest.raises(ValueError, match=r"ablation\.csv lacks the columns flips, holm_p"):
        records.write_table(_frame("ablation").drop(columns=["flips", "holm_p"]), path)
    with pytest.raises(ValueError, match="twice: a"):
        records.write_table(pd.DataFrame([[1, 2]], columns=["a", "a"]), tmp_path / "other.csv")
    assert not list(tmp_path.iterdir())
    path.write_text("bits,kept\n4,none\n")
    with pytest.raises(ValueError, match=r"top1.*run 3_ablation again"):
        records.read_table(path)


def test_values_come_back(tmp_path):
    frame = _frame("predictions", rows=6).drop(columns=["file", "name_1", "reason"])
    files = ["01", "NA", 'a,"b".png', "line\nbreak", "return\rhere", os.fsdecode(b"caf\xe9.jpg")]
    frame["file"] = pd.Series(files, dtype=object)  # pandas' own text type may refuse what is not Unicode
    frame["name_1"] = ["None", "nan", "1e3", "null", "été", " blank "]
    frame["reason"] = [None] * 5 + ["not a picture"]
    frame["probability_1"] = np.array([0.1, 1e-12, np.nan, 1 / 3, 123456789, 0.9], dtype=np.float32)
    frame["count"] = [123456789, 1, 2, 3, 4, 5]
    read = records.read_table(records.write_table(frame, tmp_path / "predictions.csv"))
    assert read["file"].tolist() == [*frame["file"][:5], "caf\\udce9.jpg"]  # escaped, in sight
    assert read["name_1"].tolist() == frame["name_1"].tolist()
    assert read["reason"].isna().tolist() == [True] * 5 + [False]
    np.testing.assert_array_equal(read["probability_1"].to_numpy(np.float32), frame["probability_1"])
    assert read["count"].tolist() == frame["count"].tolist()


def test_no_cell_is_a_formula_and_every_text_comes_back(tmp_path):
    """Of all columns, whatever the first characters; numbers keep their sign."""
    first = ["".join(some) for count in (1, 2, 3) for some in itertools.product("'=+-@\t\r\n\\r＝ ", repeat=count)]
    names = [name + "cmd|calc" for name in first]
    frame = pd.DataFrame({"file": names, "label": names, "other": names, "number": -1.5})
    path = records.write_table(frame, tmp_path / "x.csv")
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert len(rows) == len(names)
    assert not [cell for row in rows for cell in row[:3] if cell[0] in "=+-@\t\r\n＝"]
    assert {row[3] for row in rows} == {"-1.5"}
    pd.testing.assert_frame_equal(records.read_table(path), frame)


def test_a_missing_record_names_its_notebook(tmp_path):
    path = tmp_path / "records" / "variants.csv"
    with pytest.raises(records.MissingRecord) as caught:
        records.read_table(path)
    assert str(caught.value) == "records/variants.csv is missing: run 2_evaluate first"
    path.parent.mkdir()
    path.touch()
    with pytest.raises(ValueError, match="empty: run 2_evaluate again"):
        records.read_table(path)
    assert set(records.COLUMNS) <= set(records.NOTEBOOKS)


def test_json_is_plain_and_strict(tmp_path):
    content = {
        "z": float("nan"),
        "a": np.float32("inf"),
        "array": np.array([[1, 2]]),
        3: (True, np.int64(4), None),
        "where": Path("/home/someone/data.csv"),
        "odd": os.fsdecode(b"caf\xe9"),
    }
    path = records.write_json(content, tmp_path / "environment.json")
    read = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert list(read) == ["z", "a", "array", "3", "where", "odd"]
    assert read["z"] is None and read["a"] is None and read["array"] == [[1, 2]]
    assert read["3"] == [True, 4, None] and read["where"] == "data.csv"
    assert read["odd"] == content["odd"] and records.read_json(path) == read
    with pytest.raises(TypeError, match="object"):
        records.write_json({"a": object()}, path)
    assert records.read_json(path) == read


def test_checksum_of_files_and_folders(tmp_path):
    for copy in ("one", "two"):
        (tmp_path / copy / "sub").mkdir(parents=True)
        (tmp_path / copy / "sub" / "abc").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, "abc"
    assert files.checksum(tmp_path / "one" / "sub" / "abc") == known
    folder = files.checksum(tmp_path / "one")
    (tmp_path / "two" / ".tmp-0123456789ab-abc").write_text("left by a killed run")
    assert files.checksum(tmp_path / "two") == folder
    (tmp_path / "two" / "sub" / "abc").rename(tmp_path / "two" / "abc")
    assert files.checksum(tmp_path / "two") != folder
    with pytest.raises(FileNotFoundError, match="nothing to take a checksum of"):
        files.checksum(tmp_path / "three")
