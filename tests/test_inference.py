"""A row a file, whatever the file; labels that the checkpoint does not know do not count."""

import numpy as np
import pytest
from PIL import Image

from vitlib import inference, params, records
from vitlib.data import DataError


@pytest.fixture
def study(checkpoints, tmp_path, monkeypatch):
    """A project whose study 'unit' has the checkpoints, and a folder of odd files to classify."""
    (tmp_path / "outputs" / "unit").mkdir(parents=True)
    (tmp_path / "outputs" / "unit" / "checkpoints").symlink_to(checkpoints)
    monkeypatch.setattr(records, "project_root", lambda: tmp_path)
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
