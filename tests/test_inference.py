"""A row a file, whatever the file; labels that the checkpoint does not know do not count."""

import io

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from vitlib import engine, files, inference, params, plots, records
from vitlib.sources import DataError


@pytest.fixture
def study(checkpoints, tmp_path, monkeypatch):
    """A project whose study 'unit' has the checkpoints, and a folder of odd files to classify."""
    (tmp_path / "outputs" / "unit").mkdir(parents=True)
    (tmp_path / "outputs" / "unit" / "checkpoints").symlink_to(checkpoints)
    monkeypatch.setattr(files, "project_root", lambda: tmp_path)
    folder = tmp_path / "pictures"
    for name in ("2/a.png", "10/b.png", "weeds/c.png", "d.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(len(name)).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / name)
    (folder / ".DS_Store").write_bytes(b"Bud1")
    (folder / "2" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not really")
    return params.check({"study": "unit", "device": "cpu", "pictures": str(folder)})


@pytest.fixture
def predicted(study):
    predictor = inference.load(study)
    found, skipped = inference.find_pictures(study)
    return predictor, *inference.predict(predictor, found, skipped, study)


def test_default_is_nf4_with_an_attention_that_runs(predicted):
    assert predicted[0].variant.name == "nf4-sdpa"


@pytest.mark.parametrize(
    ("runs", "flash_ms", "size", "chosen"),
    [
        (True, 30.0, 32, "nf4-sdpa"),  # FlashAttention-2 can run and is slower: it is not taken
        (True, 10.0, 32, "nf4-flash_attention_2"),
        (True, 10.0, 2, "nf4-sdpa"),  # at the batch size nearest to what is asked
        (False, 10.0, 32, "nf4-sdpa"),
    ],
)
def test_auto_takes_the_attention_that_was_measured_to_be_fastest(study, monkeypatch, runs, flash_ms, size, chosen):
    rows = [
        {
            "variant": name,
            "weights": "nf4",
            "execution": execution,
            "status": "ok",
            "batch": batch,
            "latency_p50_ms": ms,
        }
        for name, execution, batch, ms in (
            ("nf4-sdpa", "eager", 1, 5.0),
            ("nf4-sdpa", "eager", 32, 20.0),
            ("nf4-flash_attention_2", "eager", 1, 6.0),
            ("nf4-flash_attention_2", "eager", 32, flash_ms),
            ("nf4-sdpa-graph", "graph", 32, 1.0),
            ("nf4-unknown", "eager", 32, 1.0),
        )
    ]
    table = pd.DataFrame(rows).reindex(columns=records.COLUMNS["variants"])
    records.write_table(table, files.study_folder("unit") / "records" / "variants.csv")
    own_flash = "" if runs else "needs a CUDA device"
    monkeypatch.setattr(inference.attention, "not_runnable", lambda variant, device: own_flash * variant.own_flash)
    settings = study.model_copy(update={"eval_batch_size": size})
    assert inference.automatic(settings, torch.device("cpu")).name == chosen


def test_the_caption_says_how_much_is_shown(predicted):
    _, frame, *_ = predicted
    assert "3 of 6 rows" in inference.caption(frame, 3) and "predictions.csv" in inference.caption(frame)
    assert inference.caption(frame).startswith(f"*{len(frame)} of {len(frame)} rows")


def test_a_row_for_every_file(predicted, tmp_path):
    written = records.read_table(tmp_path / "outputs" / "unit" / "records" / "predictions.csv")
    assert sorted(written["file"]) == sorted(
        [".DS_Store", "2/a.png", "2/broken.jpg", "10/b.png", "weeds/c.png", "d.png"]
    )
    skipped = written[written["status"] == "skipped"].set_index("file")["reason"]
    assert "hidden" in skipped[".DS_Store"]
    assert skipped["2/broken.jpg"]


def test_names_belong_to_ids_and_probabilities_fall(predicted):
    predictor, frame, *_ = predicted
    names = predictor.engine.loaded.labels.names
    rows = frame[frame["status"] == "ok"]
    assert all(names[int(row["id_1"])] == row["name_1"] for _, row in rows.iterrows())
    assert (rows["probability_1"] >= rows["probability_2"]).all()
    np.testing.assert_allclose(rows[["probability_1", "probability_2", "probability_3"]].sum(axis=1), 1, atol=1e-3)


def test_only_known_labels_count_for_accuracy(predicted):
    predictor, frame, *_ = predicted
    found = inference.accuracy(frame, predictor)
    assert (found["pictures"], found["labelled"], found["skipped"]) == (4, 2, 2)


def test_a_missing_folder_is_said(study):
    with pytest.raises(DataError, match="no folder of pictures"):
        inference.find_pictures(study.model_copy(update={"pictures": "nowhere"}))


def test_an_empty_folder_is_said(study, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no picture"):
        inference.find_pictures(study.model_copy(update={"pictures": str(tmp_path / "empty")}))


def test_a_relative_folder_is_looked_for_from_the_project_not_from_notebooks(study, tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    pictures, _ = inference.find_pictures(study.model_copy(update={"pictures": "pictures"}))
    assert len(pictures) == 5


def test_hidden_folders_are_named_and_linked_ones_followed_without_end(study, tmp_path):
    folder = tmp_path / "pictures"
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / "2" / "a.png").rename(folder / ".ipynb_checkpoints" / "a.png")
    (tmp_path / "elsewhere").mkdir()
    (folder / "d.png").rename(tmp_path / "elsewhere" / "d.png")
    (folder / "1").symlink_to(tmp_path / "elsewhere")
    (folder / "10" / "linked.png").symlink_to(tmp_path / "elsewhere" / "d.png")
    (folder / "10" / "up").symlink_to(folder)
    (folder / "0").symlink_to(folder / "10")  # the real folder keeps its own name, though it comes later
    (folder / "itself").symlink_to(folder / "itself")
    pictures, skipped = inference.find_pictures(study)
    assert {(p.file, p.label) for p in pictures} == {
        ("1/d.png", "1"),
        ("10/b.png", "10"),
        ("10/linked.png", "10"),
        ("2/broken.jpg", "2"),
        ("weeds/c.png", "weeds"),
    }
    reasons = dict(skipped)
    assert reasons[".ipynb_checkpoints"] == "hidden folder"
    assert reasons["10/up"] == reasons["0"] == "a link to a folder that is listed already"
    assert set(reasons) == {".DS_Store", ".ipynb_checkpoints", "10/up", "0", "itself"}


@pytest.fixture
def nothing_readable(study, tmp_path, monkeypatch):
    """A folder in which no file can be decoded; the network must not be called, NF4 ends the process then."""
    for file in (tmp_path / "pictures").rglob("*.png"):
        file.write_text("no picture")
    monkeypatch.setattr(engine.Engine, "__call__", lambda *_: pytest.fail("the network was called with no picture"))
    predictor = inference.load(study)
    return predictor, *inference.predict(predictor, *inference.find_pictures(study), study)


def test_without_a_readable_picture_every_file_still_has_its_row(nothing_readable, tmp_path):
    written = records.read_table(tmp_path / "outputs" / "unit" / "records" / "predictions.csv")
    assert tuple(written.columns) == records.COLUMNS["predictions"]
    assert len(written) == 6 and set(written["status"]) == {"skipped"}
    assert written["id_1"].isna().all() and written["reason"].notna().all()
    assert pd.isna(nothing_readable[3])


def test_without_a_readable_picture_the_later_cells_work(nothing_readable):
    predictor, frame, passed, rate = nothing_readable
    plots.table(inference.readable(frame)).to_html()
    images, titles = inference.examples(frame, passed, 12)
    assert titles == ["no picture could be read"]
    plots.picture_grid(images, titles, right=inference.marks(frame, 12)).savefig(io.BytesIO())
    assert inference.headline(frame, predictor, rate) == (
        "- No picture could be read; 6 files were skipped, each with its reason."
    )


def test_a_folder_of_nothing_but_empty_files_gets_its_rows(study, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.jpg").touch()
    chosen = study.model_copy(update={"pictures": str(tmp_path / "empty")})
    found = inference.find_pictures(chosen)
    assert found == ([], [("a.jpg", "empty file")])
    frame, *_ = inference.predict(inference.load(chosen), *found, chosen)
    assert frame["reason"].tolist() == ["empty file"]
