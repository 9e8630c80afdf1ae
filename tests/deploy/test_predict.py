"""`python -m vitlib predict`: a row a file, whatever ends it in between, in memory that does not grow."""

import csv
import fcntl
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from vitlib import __main__, inference
from vitlib.deploy import predict, predictor
from vitlib.network import checkpoint
from vitlib.pictures import sources
from vitlib.study import files, params, provenance, records
from vitlib.study.study import Study

ODD = ('=cmd|calc "1".png', "0/line\nbreak.png", "07.png", "7.png")
COUNT = 27  # files: seven batches of 4, the last of 3


@pytest.fixture(scope="module")
def chosen(checkpoints):
    return predictor.load(predictor.find(checkpoints), "fp32-sdpa", device="cpu", batch_size=4)


@pytest.fixture
def folder(tmp_path):
    """Pictures with odd names, flat and in class folders, and four files that are skipped."""
    rng = np.random.default_rng(0)
    for name in (*ODD, *(f"{number % 3}/picture {number}.png" for number in range(19))):
        (tmp_path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "pictures" / name)
    (tmp_path / "pictures" / ".hidden").mkdir()
    for name in ("2/empty.png", "2/broken.jpg", "10.txt"):
        (tmp_path / "pictures" / name).write_bytes(b"" if "empty" in name else b"no picture")
    return tmp_path / "pictures"


@pytest.fixture
def command(folder, checkpoints, chosen, monkeypatch):
    """The command with a prepared network; keywords replace options."""
    monkeypatch.setattr(predictor, "load", lambda *_, **__: chosen)

    def call(output, *more, **changes):
        options = {"checkpoint": checkpoints, "variant": "fp32-sdpa", "batch_size": 4, "workers": 2, "device": "cpu"}
        options |= {"folder": folder, "output": output} | changes
        given = [f"--{key.replace('_', '-')}={value}" for key, value in options.items() if key != "folder"]
        return __main__.main(["predict", str(options["folder"]), *given, *more])

    return call


def test_every_file_has_the_row_that_notebook_4_writes(command, folder, checkpoints, chosen, tmp_path, monkeypatch):
    assert command(tmp_path / "new" / "x.csv") == 2
    table = records.read_table(tmp_path / "new" / "x.csv")
    assert tuple(table.columns) == records.COLUMNS["predictions"]
    assert table["file"].tolist()[:3] == ["0/line\nbreak.png", "0/picture 0.png", "0/picture 3.png"]
    assert table["file"].tolist()[-5:] == ["07.png", "7.png", "10.txt", ".hidden", ODD[0]]
    (tmp_path / "outputs" / "unit").mkdir(parents=True)
    monkeypatch.setattr(files, "project_root", lambda: tmp_path)
    settings = {"study": "unit", "device": "cpu", "pictures": str(folder), "eval_batch_size": 4}
    study = Study.of(params.check(settings))
    inference.predict(study, chosen, *inference.find_pictures(study))
    theirs = study.read("predictions")
    assert len(table) == len(theirs) == COUNT and (table["status"] == "skipped").sum() == 4
    table, theirs = (frame.sort_values("file", ignore_index=True) for frame in (table, theirs))
    pd.testing.assert_frame_equal(table, theirs, rtol=1e-5)  # the batches are others


def _killed_after(events, output, command):
    """Run the command and kill this process after so many lines of its module."""

    def trace(frame, event, argument):
        nonlocal events
        if frame.f_code.co_filename != predict.__file__:
            return None
        events -= event == "line"
        if events < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    command(output)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_killed_run_continues_without_a_gap_or_a_repeat(command, folder, tmp_path, kind, monkeypatch):
    """The output is in the folder itself, and a kill may leave any of the command's own files there."""
    pytest.importorskip("pyarrow" if kind == "parquet" else "csv")
    monkeypatch.setattr(predict, "SECONDS", 0.0)  # write every batch
    whole, output = tmp_path / f"whole.{kind}", folder / f"whole.{kind}"
    assert command(whole) == 2
    fork, sizes, events = multiprocessing.get_context("fork"), [], 60
    while True:
        process = fork.Process(target=_killed_after, args=(events, output, command))
        process.start()
        process.join(60)
        if process.exitcode != -signal.SIGKILL:
            break
        part = output if kind == "csv" else output.with_name(f"{output.name}.part")
        part = part if part.is_file() else output  # it is complete
        sizes.append(part.stat().st_size if part.is_file() else 0)
        events += 29
    assert process.exitcode == 0 and len(sizes) > 5 and sizes[-2] > 0 and sizes[-1] > 0
    assert output.read_bytes() == whole.read_bytes()
    assert output.with_name(f"{output.name}.json").read_bytes() == whole.with_name(f"{whole.name}.json").read_bytes()
    left = {file.name for file in folder.iterdir() if output.name in file.name and not file.name.startswith(".tmp-")}
    assert left == {output.name, f"{output.name}.json"}


def test_a_torn_row_is_cut_wherever_it_is_torn(command, tmp_path):
    output, side = tmp_path / "x.csv", tmp_path / "x.csv.json"
    command(output)
    whole, known = output.read_bytes(), json.loads(side.read_text())
    in_quotes = whole.index(b"line\nbreak") + len(b"line\n")
    for size in range(0, len(whole) + 1, 17):
        output.write_bytes(whole[:size])
        kept, left = predict.Output(output, {}, [], tmp_path)._kept(4), output.read_text()
        assert kept % 4 == 0 and whole.startswith(left.encode()) and kept > whole[:size].count(b"\n") - 7
        assert len(list(csv.reader(io.StringIO(left, newline="")))) == kept + bool(left)
    for size in (1, 60, whole.index(b"\n") + 1, len(whole) // 2, in_quotes, len(whole) - 1, len(whole)):
        output.write_bytes(whole[:size])
        records.write_json(known | {"finished": False}, side)
        assert command(output) == 2
        assert output.read_bytes() == whole and json.loads(side.read_text()) == known
    output.write_bytes(whole.replace(b"picture 3", b"picture x"))  # as by hand
    records.write_json(known | {"finished": False}, side)
    assert command(output) == 1 and not json.loads(side.read_text())["finished"]


def test_another_run_is_refused_and_a_finished_one_is_not_repeated(command, checkpoints, folder, tmp_path, capsys):
    output = tmp_path / "x.csv"
    assert command(output) == 2
    written, stamp = output.read_bytes(), output.stat().st_mtime_ns
    assert command(output) == 2 and output.stat().st_mtime_ns == stamp
    shutil.copytree(checkpoints / "merged", tmp_path / "study" / "merged")
    provenance_file = tmp_path / "study" / "merged" / checkpoint.PROVENANCE
    provenance_file.unlink()  # unverified, and so another checkpoint
    shutil.copytree(folder, tmp_path / "same names")
    for changes, what in (
        ({"checkpoint": tmp_path / "study"}, "checkpoint"),
        ({"variant": "nf4-sdpa"}, "checkpoint and variant"),
        ({"folder": tmp_path / "same names"}, "folder"),
        ({"batch_size": 5}, "batch size"),
    ):
        capsys.readouterr()
        assert command(output, **changes) == 1
        said = f"error: {output} was begun with a different {what}: name another --output, or replace it with"
        assert said in capsys.readouterr().err
    (folder / "one more.png").write_bytes(b"")
    assert command(output) == 1 and "different list of files: " in capsys.readouterr().err
    assert output.read_bytes() == written
    assert command(output, "--overwrite") == 2 and len(records.read_table(output)) == COUNT + 1
    (tmp_path / "mine.csv").write_text("precious\n")
    assert command(tmp_path / "mine.csv") == 1 and "exists, and not from this command" in capsys.readouterr().err
    assert (tmp_path / "mine.csv").read_text() == "precious\n"


def test_the_exit_status_says_what_was_read(command, folder, tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit, match="0"):
        __main__.main(["predict", "--help"])
    assert "Exit status: 0 every file was classified, 1 none was or" in capsys.readouterr().out
    assert command(tmp_path / "0.csv", folder=folder / "0") == 0
    assert command(tmp_path / "2.csv", folder=folder / "2") == 2
    (tmp_path / "bad").mkdir()
    for changes, said in (
        ({}, "there is no file in the folder"),
        ({"folder": tmp_path / "nowhere"}, "there is no folder"),
        ({"folder": folder, "checkpoint": tmp_path / "bad"}, "there is no checkpoint"),
        ({"folder": folder, "output": tmp_path / "x.txt"}, "must end in .csv or .parquet"),
        ({"folder": folder, "max_megapixels": -1}, "max_megapixels"),
    ):
        assert command(**({"output": tmp_path / "x.csv", "folder": tmp_path / "bad"} | changes)) == 1
        assert said in capsys.readouterr().err and not list(tmp_path.glob("x.*"))
    (tmp_path / "bad" / "a.png").write_text("no picture")
    assert command(tmp_path / "x.csv", folder=tmp_path / "bad") == 1
    assert len(records.read_table(tmp_path / "x.csv")) == 1
    monkeypatch.setattr(predict.importlib.util, "find_spec", lambda name: None)
    assert command(tmp_path / "x.parquet") == 1 and "pip install 'vitlib[parquet]'" in capsys.readouterr().err


def test_ctrl_c_says_how_to_continue_and_one_process_writes_an_output(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(predict, "SECONDS", 0.0)
    command(tmp_path / "whole.csv")
    output, rows, calls = tmp_path / "x.csv", predict.rows, []

    def interrupted(*given):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return rows(*given)

    monkeypatch.setattr(predict, "rows", interrupted)
    assert command(output) == 130 and f"the same command continues {output}" in capsys.readouterr().err
    assert len(records.read_table(output)) == 8
    with open(output, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert command(output) == 1 and "another process writes" in capsys.readouterr().err
    assert command(output) == 2 and output.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_parquet_has_what_csv_has(command, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    parts = records.read_parts
    monkeypatch.setattr(records, "read_parts", lambda path: parts(path, 4))  # some without a skipped file, some with
    assert command(tmp_path / "x.csv") == command(tmp_path / "x.parquet") == 2
    stored = pd.read_parquet(tmp_path / "x.parquet", dtype_backend="numpy_nullable")
    assert stored["file"].isin(ODD).sum() == len(ODD) and str(stored["id_1"].dtype) == "Int64"
    table = records.read_table(tmp_path / "x.csv")
    assert stored.astype(object).fillna("-").equals(table.astype(object).fillna("-"))


def test_memory_does_not_grow_with_the_number_of_files(command, folder, tmp_path, monkeypatch):
    """Of 600 files at most those of a few batches are in memory, and the rows that are not written yet."""
    (tmp_path / "many").mkdir()
    for number in range(600):
        os.link(folder / "7.png", tmp_path / "many" / f"{number}.png")
    alive, most, each, batches = [], {"Picture": 0, "Tensor": 0}, sources.each, predict.stream.batches

    def seen(one):
        alive.append(weakref.ref(one))
        found = [type(each()).__name__ for each in alive]
        most.update({kind: max(count, found.count(kind)) for kind, count in most.items()})
        return one

    def batches_seen(*given, **named):
        for batch in batches(*given, **named):
            seen(batch.logits)
            yield batch

    monkeypatch.setattr(predict, "ROWS", 16)
    monkeypatch.setattr(predict.stream, "batches", batches_seen)
    monkeypatch.setattr(sources, "each", lambda *given: map(seen, each(*given)))
    assert command(tmp_path / "x.csv", folder=tmp_path / "many") == 0
    assert 20 <= most["Picture"] <= 60 and 4 <= most["Tensor"] <= 8


def test_a_record_of_another_device_is_said_and_of_another_kind_not_used(checkpoints, tmp_path):
    shutil.copytree(checkpoints / "merged", tmp_path / "checkpoints" / "merged")
    row = {"status": "ok", "batch": 8, "peak_memory_mb": 9.0, "gelu": "checkpoint", "logit_kl": 0.0}
    table = pd.DataFrame([row | {"variant": "bf16-sdpa", "latency_p50_ms": 1.0, "difference_low": 0.0}])
    table = table.reindex(columns=[*records.COLUMNS["variants"], "peak_memory_mb", "gelu", "difference_low"])
    for vram, hardware, name, said in (
        (np.nan, {"cpu": provenance.cpu_model(), "gpus": None}, "bf16-sdpa", "it is the best within the limits"),
        (np.nan, {"cpu": "Abacus 1", "gpus": None}, "bf16-sdpa", "limits (measured on Abacus 1, not on this device)"),
        (5.0, {"cpu": "Abacus 1", "gpus": [{"name": "NVIDIA H200"}]}, "fp32-sdpa",
         "(measured on NVIDIA H200, Abacus 1, not on this device), and it is the default on cpu"),
    ):  # fmt: skip
        records.write_table(table.assign(peak_vram_mb=vram), tmp_path / "records" / "variants.csv")
        records.write_json({"hardware": hardware}, tmp_path / "records" / "environment.json")
        variant, why = predictor.choose(predictor.find(tmp_path), "auto", torch.device("cpu"), 8)
        assert variant.name == name and why.endswith(said)
