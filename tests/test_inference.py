"""A row a file, whatever the file; labels that the checkpoint does not know do not count."""

import dataclasses
import html
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from bs4 import BeautifulSoup
from IPython.core.formatters import DisplayFormatter
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image

from vitlib import inference
from vitlib.deploy import predictor
from vitlib.network import attention, engine
from vitlib.pictures import decode, sources
from vitlib.pictures.sources import DataError
from vitlib.report import page, plots, tables
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
    assert "notebook 2 has measured no variant that runs here" in inference.reason(predicted[0])
    variant, why = choose(changed(study, variant="int8-sdpa"))
    assert variant == variants.find("int8-sdpa") and "names it" in why


def choose(study):
    settings, device = study.settings, torch.device("cpu")
    size, limits = settings.eval_batch_size, inference.limits(settings)
    return predictor.choose(predictor.weights_of(study), settings.variant, device, size, limits)


def measured(study, monkeypatch, runs=True):
    """A record of five variants at two batch sizes; without `runs` FlashAttention-2 cannot run here."""
    rows = [
        ("fp32-sdpa", 1, 9.0, 400.0, np.nan),
        ("nf4-sdpa", 1, 5.0, 90.0, -0.01),
        ("fp16-sdpa", 1, 6.0, 200.0, -0.01),
    ]
    rows += [("fp32-sdpa", 32, 30.0, 500.0, np.nan), ("nf4-sdpa", 32, 20.0, 150.0, -0.01)]
    rows += [("fp16-sdpa", 32, 15.0, 300.0, -0.01), ("nf4-flash_attention_2", 32, 15.3, 140.0, -0.01)]
    rows += [("fp16-sdpa-graph", 32, np.nan, np.nan, -0.01), ("another-version", 32, 1.0, 1.0, 0.0)]
    table = pd.DataFrame(rows, columns=["variant", "batch", "latency_p50_ms", "peak_memory_mb", "difference_low"])
    table = table.assign(status="ok", gelu="checkpoint", logit_kl=0.01)
    study.write(
        "variants",
        table.reindex(columns=[*records.COLUMNS["variants"], *table.columns.difference(records.COLUMNS["variants"])]),
    )
    own_flash = "" if runs else "needs a CUDA device"
    monkeypatch.setattr(attention, "not_runnable", lambda variant, device: own_flash * variant.own_flash)


@pytest.mark.parametrize(
    ("changes", "runs", "chosen"),
    [
        ({}, True, "nf4-flash_attention_2"),  # as fast as the fastest within 5 %, and smaller
        ({}, False, "fp16-sdpa"),
        ({"eval_batch_size": 2}, True, "nf4-sdpa"),  # by the nearest batch size that was measured
        ({"memory_limit_mb": 160.0}, False, "nf4-sdpa"),
        ({"margin": 0.005}, True, "fp32-sdpa"),
    ],
)
def test_auto_takes_the_best_variant_within_the_limits_that_runs_here(study, monkeypatch, changes, runs, chosen):
    measured(study, monkeypatch, runs)
    variant, why = choose(changed(study, **changes))
    assert variant.name == chosen and "the best within the limits" in why


def test_the_recommendation_says_why_the_next_two_lose_and_when_nothing_fits(study, monkeypatch, predicted):
    measured(study, monkeypatch)
    text = inference.recommendation(study, predicted[0])
    assert text.startswith("Deploy **NF4 · FlashAttention-2**: 15.3 ms at batch size 32 and 140 MB with all that")
    assert "The next: FP16 · SDPA: as fast, but needs 2.1 times the memory; NF4 · SDPA: 1.3 times slower." in text
    assert study.read_json("recommendation")["sentence"] == text.replace("**", "")
    none = inference.recommendation(changed(study, latency_limit_ms=1.0), predicted[0])
    assert none.startswith("**No measured variant is within the limits.** NF4 · FlashAttention-2: takes 15.3 ms, more")
    assert none.endswith("Limits: 1 ms, a loss of 2 points of Top-1.")


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


def test_only_known_labels_count_for_accuracy(study, predicted):
    predictor, frame, passed, _ = predicted
    rows = frame.set_index("file")
    names = {"2/a.png": "hard-leaved pocket orchid", "10/b.png": "globe thistle", "weeds/c.png": "", "d.png": ""}
    assert rows["label_name"].loc[list(names)].to_dict() == names
    right = sum(rows.loc[file, "name_1"] == name for file, name in names.items())
    text = inference.headline(study, frame, predictor, 1234.0, ["Said."], "Pixels differ.")
    assert text.startswith(
        f'- **FP32 · SDPA** classifies {right} of 2 pictures of the folder "pictures" correctly: '
        f"Top-1 is **{50 * right:.1f} %**."
    )
    assert "The class of 2 more pictures is not known." in text and "Top-5" not in text  # of three classes
    assert "- Said." in text and "From file to class: 1,200 images/s on the CPU. Pixels differ." in text
    assert "2 of 6 files were skipped: .DS_Store (hidden file of the system); 2/broken.jpg" in html.unescape(text)
    assert "DS_Store" not in text  # its underscore would be markup
    grid = inference.grid(frame, passed, 12)
    assert len(grid["images"]) == 4 and grid["right"].count(True) == right and grid["right"].count(None) == 2
    assert ["; is " in title for title in grid["titles"]] == [mark is False for mark in grid["right"]]


@pytest.mark.parametrize(("first", "split"), [("test/2/a.png", "test"), ("valid/2/a.png", "validation")])
def test_the_split_is_named(study, predicted, first, split):
    predictor, frame, *_ = predicted
    own = changed(study, pictures="")
    text = inference.headline(own, frame.assign(file=first), predictor, 1.0)
    assert f" of 2 pictures of the {split} split correctly" in text


@pytest.mark.parametrize(
    ("change", "limit"),
    [({}, True), ({"throughput_img_s": 149.0}, False), ({"peak_vram_mb": 1.0}, False), ({"variant": "x"}, False)],
)
def test_the_network_alone_is_compared_where_decoding_limits(study, predicted, change, limit):
    """At the batch size nearest to the one used, of the same variant on such a device."""
    rows = [{"variant": "fp32-sdpa", "batch": 8, "throughput_img_s": 999.0}]
    rows.append({"variant": "fp32-sdpa", "batch": 32, "throughput_img_s": 1234.0} | change)
    rows[0] |= {name: value for name, value in change.items() if name != "throughput_img_s"}
    study.write("variants", pd.DataFrame(rows).reindex(columns=records.COLUMNS["variants"]))
    said = inference.headline(study, predicted[1], predicted[0], 100.0)
    alone = "100 images/s on the CPU; the network alone does 1,234 (notebook 2, batch size 32), so reading and decoding"
    assert (alone in said) == limit and ("the network alone" in said) == limit
    elsewhere = inference.headline(changed(study, checkpoints_of="other"), predicted[1], predicted[0], 100.0)
    assert "the network alone" not in elsewhere


def _told(frame, guesses):
    """The record with the probabilities (3,) of its first pictures in place of the network's."""
    frame = frame.copy()
    for row, probabilities in enumerate(guesses):
        for rank, number in enumerate(np.argsort(probabilities)[::-1], 1):
            frame.loc[row, [f"id_{rank}", f"name_{rank}"]] = number, NAMES[number]
            frame.loc[row, f"probability_{rank}"] = probabilities[number]
    return frame


NAMES = ("hard-leaved pocket orchid", "globe thistle", "pink primrose")


def test_the_most_confident_mistakes_come_first_each_beside_an_example(predicted):
    predictor, frame, passed, _ = predicted
    frame.loc[2:3, ["label", "label_name"]] = ["1", NAMES[2]], ["10", NAMES[1]]
    told = _told(frame, [(0.1, 0.8, 0.1), (0.1, 0.9, 0.0), (0.1, 0.95, 0.0), (0.2, 0.5, 0.3)])
    said, wrong = inference.mistakes(told, passed, predictor)
    assert "**2 of 4 pictures are misclassified**, 1 of them with a probability above 90 %" in said
    assert "mistake, pink primrose is called globe thistle (95.0 %)" in said
    assert [title.replace(tables.NO_BREAK, " ") for title in wrong["titles"]] == [
        *("globe thistle 95 %; is pink primrose", "for comparison: globe thistle"),
        *("globe thistle 80 %; is hard-leaved pocket orchid", "for comparison: globe thistle"),
    ]
    assert list(wrong["right"]) == [False, None] * 2 and wrong["columns"] == 4
    shown = [
        np.asarray(passed.pictures[position].open()) for position in (2, 1, 0, 1)
    ]  # the best example is the second
    assert all(np.array_equal(*pair) for pair in zip(wrong["images"], shown, strict=True))
    alone = _told(told, [(0.1, 0.8, 0.1), (0.9, 0.1, 0.0), (0.1, 0.95, 0.0), (0.2, 0.3, 0.5)])
    _, wrong = inference.mistakes(alone, passed, predictor)
    assert wrong["columns"] == 0 and list(wrong["right"]) == [False] * 4  # no example of each predicted class


def test_without_mistakes_or_known_classes_that_is_said(study, predicted):
    predictor, frame, passed, _ = predicted
    told = _told(frame, [(0.9, 0.1, 0.0), (0.1, 0.9, 0.0)])
    said, wrong = inference.mistakes(told, passed, predictor)
    assert said == "No mistake: the classes of all 2 pictures are predicted correctly." and not wrong["images"]
    unknown = told.assign(label="", label_name="")
    said, wrong = inference.mistakes(unknown, passed, predictor)
    assert "classes of these pictures are not known" in said and not wrong["images"]
    text = inference.headline(study, unknown, predictor, 1.0, [said, inference.NOT_COMPARED])
    assert text.startswith('- **FP32 · SDPA** classifies 4 pictures of the folder "pictures", most often as ')
    assert "Top-1" not in text and said not in text and text.count("\n- ") == 1  # what is not known is no answer


@pytest.fixture
def compared(study, checkpoints, pre, tmp_path):
    """A study whose notebook 2 classified 5 of 6 validation pictures; FP32 and NF4 differ on two of them."""
    for number, name in enumerate(("1/a", "2/a", "2/b", "2/c", "10/a")):
        for split in ("train", "valid"):
            file = tmp_path / "data" / split / f"{name}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng([number, split == "valid"]).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(noise).save(file)
    (tmp_path / "data" / "valid" / "2" / "aa.png").write_text("no picture")
    chosen = changed(study, pictures="", data_source=str(tmp_path / "data"))
    valid = decode.decode(sources.load(chosen.settings).splits["valid"], pre)
    assert [picture.file for picture in valid.pictures] == [
        f"valid/{n}.png" for n in ("1/a", "2/a", "2/b", "2/c", "10/a")
    ]
    chosen.write_json("environment", {"checksums": {"data": decode.checksum(valid)}})
    labels = np.array([2, 0, 0, 0, 1])  # ids are in the checkpoint's order: 2, 10, 1
    fp32 = 5.0 * np.eye(3, dtype=np.float32)[[2, 0, 0, 1, 1]]
    nf4 = fp32.copy()
    nf4[1], nf4[3] = (0, 1, 0), (0, 0, 9)
    chosen.record("logits.npz").parent.mkdir(exist_ok=True)
    np.savez(chosen.record("logits.npz"), labels=labels, **{"fp32-sdpa": fp32, "nf4-sdpa": nf4})
    return chosen, inference.load(chosen), valid


def test_pictures_of_the_disagreement_are_those_of_their_logits(compared):
    study, predictor, valid = compared
    said, found = inference.disagreement(study, predictor, 12)
    assert "classes for **2 of 5** validation pictures: FP32 is right in 1, NF4 in 0, neither in 1." in said
    assert [title.replace(tables.NO_BREAK, " ") for title in found["titles"]] == [
        f"FP32: {NAMES[0]} 99 % · NF4: {NAMES[1]} 58 % · is {NAMES[0]}",
        f"FP32: {NAMES[1]} 99 % · NF4: {NAMES[2]} 100 % · is {NAMES[0]}",
    ]
    assert list(found["right"]) == [False, None]
    for image, row in zip(found["images"], (1, 3), strict=True):  # the files have the size of the network's input
        assert np.array_equal(image, valid.pixels[row].permute(1, 2, 0).numpy())
    assert len(inference.disagreement(study, predictor, 1)[1]["images"]) == 1
    with np.load(study.record("logits.npz")) as stored:
        arrays = dict(stored)
    arrays["nf4-sdpa"][3] = arrays["fp32-sdpa"][3]
    np.savez(study.record("logits.npz"), **arrays)
    said, found = inference.disagreement(study, predictor, 12)
    assert "**1 of 5** validation pictures: FP32 is right in 1, NF4 in 0." in said
    assert len(found["images"]) == 1


def test_pictures_that_notebook_2_did_not_classify_are_not_shown(compared, tmp_path):
    study, predictor, _ = compared
    for elsewhere in ({"pictures": str(tmp_path / "data" / "valid")}, {"checkpoints_of": "another"}):
        said, found = inference.disagreement(changed(study, **elsewhere), predictor, 12)
        assert "notebook 2 has no outputs for these pictures" in said and not found["images"]
    assert "has no outputs" in inference.disagreement(Study.at(tmp_path / "outputs" / "new"), predictor, 12)[0]
    with np.load(study.record("logits.npz")) as stored:
        arrays = dict(stored)
    np.savez(study.record("logits.npz"), **arrays | {"nf4-sdpa": arrays["fp32-sdpa"]})
    said, found = inference.disagreement(study, predictor, 12)
    assert (
        said == "In notebook 2, NF4 and FP32 choose the same class for all 5 validation pictures."
        and not found["images"]
    )
    np.savez(study.record("logits.npz"), labels=arrays["labels"], **{"fp32-sdpa": arrays["fp32-sdpa"]})
    assert "did not run both" in inference.disagreement(study, predictor, 12)[0]
    np.savez(study.record("logits.npz"), **arrays | {"labels": arrays["labels"][::-1]})
    said, found = inference.disagreement(study, predictor, 12)
    assert "not those that notebook 2 classified" in said and not found["images"]
    np.savez(study.record("logits.npz"), **arrays)
    valid = tmp_path / "data" / "valid" / "2"
    shutil.copy(valid / "b.png", valid / "a.png")  # another picture of the same name and class
    said, found = inference.disagreement(study, predictor, 12)
    assert "not those that notebook 2 classified" in said and not found["images"]


@pytest.mark.parametrize(
    ("data", "kind", "which"),
    [("synthetic", "hub", "network"), ("data/mine", "generator", "base network"), ("data/mine", "hub", "")],
)
def test_photographs_for_a_network_that_knows_drawn_flowers_are_said(study, predicted, tmp_path, data, kind, which):
    own, folder = predicted[0].engine.loaded, tmp_path / "checkpoints"
    about = {"parameters": {"data_source": data}, "origin": {"kind": kind, "base": "x"}}
    records.write_json(about, folder / "merged" / "provenance.json")
    loaded = dataclasses.replace(own, folder=folder / "nf4", about=about)
    said = predictor.drawn_only(loaded)
    assert said.startswith(f"**The {which} was trained on drawn flowers only**" if which else "")
    assert bool(said) == bool(which)
    chosen = dataclasses.replace(predicted[0], engine=SimpleNamespace(loaded=loaded))
    for pictures in ("photographs", ""):  # those of the study itself are what it was trained on
        shown = inference.headline(changed(study, pictures=pictures), predicted[1], chosen, 1.0)
        assert ("drawn flowers" in shown) == bool(which and pictures)


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


def test_hostile_names_are_text_in_notebook_page_and_record(study, tmp_path):
    """Class and file names as a downloaded checkpoint and folder may have them, through the cells of notebook 4."""
    names = [r"$\notacommand$", "<!-- a", "<script>alert(1)</script>", "=cmd|calc", "<img src=x onerror=alert(2)>"]
    predictor = inference.load(study)
    loaded, folder = predictor.engine.loaded, tmp_path / "pictures"
    all_names = (names * len(loaded.labels.names))[: len(loaded.labels.names)]
    all_names = tuple(f"{name}{number}" for number, name in enumerate(all_names))
    loaded = dataclasses.replace(loaded, labels=dataclasses.replace(loaded.labels, names=all_names))
    predictor.engine.loaded = loaded
    for number, name in enumerate(names):
        shutil.copy(folder / "d.png", folder / "2" / f"{name.replace('/', '')}.png")
        (folder / f"{name.replace('/', '')}{number}.jpg").write_text("no picture")
    frame, passed, rate = inference.predict(study, predictor, *inference.find_pictures(study))
    missed, wrong = inference.mistakes(frame, passed, predictor)
    shown = [missed, plots.picture_grid(**wrong), inference.headline(study, frame, predictor, rate, [missed])]
    shown += [tables.table(frame, inference.PREDICTIONS), plots.picture_grid(**inference.grid(frame, passed, 100))]
    shown += [tables.table(frame[frame["status"] == "skipped"], inference.FAULTS)]
    formats = DisplayFormatter()
    cells = [new_code_cell("1", outputs=[new_output("display_data", data=formats.format(one)[0])]) for one in shown]
    written = page.page_of(new_notebook(cells=cells), tmp_path / "4_inference.html")
    raw = [text for one in shown if (text := formats.format(one)[0].get("text/html"))]
    for text in (written, *raw):
        soup = BeautifulSoup(text, "html.parser")
        assert not (soup.main or soup).select("script, [onerror], td *:not(br):not(small)")
    soup = BeautifulSoup(written, "html.parser")
    files = [row.td.get_text() for row in soup.select("table")[0].select("tbody tr")]
    assert files == frame["file"].tolist() and len(files) == 16
    captions = {caption.get_text().rpartition("; is ")[2] for caption in soup.select("figcaption")}
    assert all_names[predictor.engine.loaded.labels.folders.index("2")] in captions
    pd.testing.assert_series_equal(study.read("predictions")["file"], frame["file"], check_dtype=False)
    assert not re.search(r"(?m)(^|,)\"?[=+@-]", study.record("predictions").read_text().partition("\n")[2])


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
    assert tables.table(inference.sample(frame), inference.PREDICTIONS) == "*none*"
    assert not inference.mistakes(frame, passed, predictor)[1]["images"]
    assert plots.picture_grid(**inference.grid(frame, passed, 12))._repr_html_().count("<img") == 0
    said = inference.headline(study, frame, predictor, rate)
    assert said.startswith("- No picture could be read. 6 of 6 files were skipped: ") and said.endswith(" ….")
