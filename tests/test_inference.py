"""A row a file, whatever the file; labels that the checkpoint does not know do not count."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from vitlib import inference
from vitlib.network import engine
from vitlib.pictures.sources import DataError
from vitlib.report import plots, tables
from vitlib.study import files, params, records, variants
from vitlib.study.study import Study


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
    return Study.of(params.check({"study": "unit", "device": "cpu", "pictures": str(folder)}))


def changed(study, **changes) -> Study:
    return Study.of(study.settings.model_copy(update=changes))


@pytest.fixture
def predicted(study):
    predictor = inference.load(study)
    found, skipped = inference.find_pictures(study)
    return predictor, *inference.predict(study, predictor, found, skipped)


def test_auto_without_a_record_of_speed_and_a_named_variant_are_explained(study, predicted):
    assert predicted[0].variant.name == "fp32-sdpa"
    assert "notebook 2 has measured no variant that runs here" in predicted[0].reason()
    variant, why = inference.choose(changed(study, variant="int8-sdpa"), torch.device("cpu"))
    assert variant == variants.find("int8-sdpa") and "names it" in why


@pytest.mark.parametrize(
    ("size", "runs", "chosen"),
    [
        (32, True, "nf4-flash_attention_2"),  # any format and execution, by the latency of its own batch size
        (32, False, "fp16-sdpa"),  # the fastest that can run here
        (2, True, "nf4-sdpa"),
    ],
)
def test_auto_takes_the_fastest_variant_that_was_measured_and_runs_here(study, monkeypatch, size, runs, chosen):
    rows = [("nf4-sdpa", 1, 5.0), ("fp16-sdpa", 1, 6.0), ("nf4-sdpa", 32, 20.0), ("fp16-sdpa", 32, 15.0)]
    rows += [("nf4-flash_attention_2", 32, 10.0), ("fp16-sdpa-graph", 32, np.nan), ("another-version", 32, 1.0)]
    table = pd.DataFrame(rows, columns=["variant", "batch", "latency_p50_ms"]).assign(status="ok")
    study.write("variants", table.reindex(columns=records.COLUMNS["variants"]))
    own_flash = "" if runs else "needs a CUDA device"
    monkeypatch.setattr(inference.attention, "not_runnable", lambda variant, device: own_flash * variant.own_flash)
    variant, why = inference.choose(changed(study, eval_batch_size=size), torch.device("cpu"))
    assert variant.name == chosen
    assert f"the nearest to {size}" in why and "the fastest of" in why


def test_predictions_of_other_pictures_are_not_replaced(study, predicted, tmp_path):
    """They belong to the page that shows them."""
    given = {"study": "unit", "device": "cpu", "pictures": study.settings.pictures}
    assert inference.open(given).name == "unit"  # the same pictures again
    (tmp_path / "others").mkdir()
    with pytest.raises(inference.OtherPictures, match="set `study` to a new name and `checkpoints_of` to 'unit'"):
        inference.open(given | {"pictures": str(tmp_path / "others")})
    other = inference.open(given | {"study": "mine", "pictures": str(tmp_path / "others"), "checkpoints_of": "unit"})
    assert inference.load(other).engine.loaded.folder.parent == study.checkpoints
    study.record("inference.json").unlink()  # of a run from before it was written: of the study's own pictures
    with pytest.raises(inference.OtherPictures):
        inference.open(given)
    assert inference.open(given | {"pictures": ""}).name == "unit"


def test_a_picture_by_hand_gives_the_same_class(predicted):
    predictor, frame, passed, _ = predicted
    preprocess = predictor.engine.loaded.preprocess
    pixels = preprocess.normalise(preprocess.resize(passed.pictures[0].open())[None])
    assert predictor.engine(pixels).argmax().item() == frame["id_1"][0]


def test_every_file_has_a_row_and_the_rate_its_conditions(predicted, study):
    predictor, frame, *_ = predicted
    written = study.read("predictions")
    files = [".DS_Store", "2/a.png", "2/broken.jpg", "10/b.png", "weeds/c.png", "d.png"]
    assert sorted(written["file"]) == sorted(files) and tuple(written.columns) == records.COLUMNS["predictions"]
    skipped = written[written["status"] == "skipped"].set_index("file")["reason"]
    assert "hidden" in skipped[".DS_Store"] and skipped["2/broken.jpg"]
    names, rows = predictor.engine.loaded.labels.names, frame[frame["status"] == "ok"]
    assert all(names[int(row["id_1"])] == row["name_1"] for _, row in rows.iterrows())
    assert (rows["probability_1"] >= rows["probability_2"]).all()
    np.testing.assert_allclose(rows[["probability_1", "probability_2", "probability_3"]].sum(axis=1), 1, atol=1e-3)
    assert rows["id_4"].isna().all()  # there are three classes
    about = study.read_json("inference")
    assert about["images_per_s"] == pytest.approx(predicted[3])
    assert [about[key] for key in ("variant", "device", "decoder", "batch", "workers", "pictures")] == (
        ["fp32-sdpa", "cpu", "pil", 32, 2, 4]
    )
    assert study.settings.pictures not in str(about)  # no path of this machine


def test_only_known_labels_count_for_accuracy(predicted):
    predictor, frame, passed, _ = predicted
    rows = frame.set_index("file")
    names = {"2/a.png": "hard-leaved pocket orchid", "10/b.png": "globe thistle", "weeds/c.png": "", "d.png": ""}
    assert rows["label_name"].loc[list(names)].to_dict() == names
    right = sum(rows.loc[file, "name_1"] == name for file, name in names.items())
    text = inference.headline(frame, predictor, 1.0, "Pixels differ.")
    assert "** classified 4 pictures at 1 images/s on the CPU" in text and text.endswith("- Pixels differ.")
    assert "skipped, each with its reason: 2." in text
    assert f"The class of 2 is known: Top-1 **{50 * right:.2f} %**, Top-5 100.00 %." in text
    grid = inference.grid(frame, passed, 12)
    assert len(grid["images"]) == 4 and grid["right"].count(True) == right and grid["right"].count(None) == 2
    assert [", is " in title for title in grid["titles"]] == [mark is False for mark in grid["right"]]


def test_a_folder_that_is_missing_or_empty_is_named(study, tmp_path):
    with pytest.raises(params.ParameterError, match="no folder of pictures"):
        inference.open({"study": "unit", "pictures": "nowhere"})
    with pytest.raises(params.ParameterError, match="no data folder"):
        inference.open({"study": "unit", "data_source": "nowhere"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no picture"):
        inference.find_pictures(changed(study, pictures=str(tmp_path / "empty")))


def test_a_relative_folder_starts_at_the_project_not_at_notebooks(study, tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    pictures, _ = inference.find_pictures(changed(study, pictures="pictures"))
    assert len(pictures) == 5


def test_without_a_readable_picture_every_file_has_its_row_and_later_cells_work(study, tmp_path, monkeypatch):
    """The network must not be called: NF4 ends the process for an empty batch."""
    for file in (tmp_path / "pictures").rglob("*.png"):
        file.write_text("no picture")
    (tmp_path / "pictures" / "2" / "broken.jpg").write_bytes(b"")
    monkeypatch.setattr(engine.Engine, "__call__", lambda *_: pytest.fail("the network was called without a picture"))
    predictor = inference.load(study)
    frame, passed, rate = inference.predict(study, predictor, *inference.find_pictures(study))
    written = study.read("predictions")
    assert tuple(written.columns) == records.COLUMNS["predictions"]
    assert len(written) == 6 and set(written["status"]) == {"skipped"}
    assert written["id_1"].isna().all() and written["reason"].notna().all() and "empty file" in set(written["reason"])
    assert pd.isna(rate)
    tables.table(inference.sample(frame), inference.PREDICTIONS).to_html()
    assert plots.picture_grid(**inference.grid(frame, passed, 12))._repr_html_().count("<img") == 0
    said = inference.headline(frame, predictor, rate)
    assert said == "- No picture could be read. Files skipped, each with its reason: 6."
