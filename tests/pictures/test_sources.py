"""Every source gives the same splits, classes and names; what is wrong with a data set is said before training."""

import io
import json
import os
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitlib.pictures import decode, preprocess, sources, synthetic
from vitlib.pictures.decode import BadPicture, Picture
from vitlib.pictures.sources import DataError, Dataset, Labels
from vitlib.study import files, params


def save(path: Path, colour: object = "red", *, mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def load(folder: object, **more) -> Dataset:
    return sources.load(params.check({"data_source": str(folder), **more}))


def picture(label: str | None, file: str = "picture.png") -> Picture:
    return Picture(file, label, lambda: Image.new("RGB", (8, 8)))


@pytest.fixture
def tree(tmp_path) -> Path:
    """Class folders '1', '2', '10', '100' with two training pictures and one validation picture each."""
    for name in ("1", "2", "10", "100"):
        for file in ("train/{}/a.png", "train/{}/b.png", "valid/{}/a.png"):
            save(tmp_path / "flowers" / file.format(name))
    return tmp_path / "flowers"


# Sources


def test_synthetic_pictures_are_drawn_when_opened_and_follow_the_seed():
    dataset, again, other = (load("synthetic", pictures_per_class=6, image_size=16, seed=seed) for seed in (1, 1, 2))
    classes = len(synthetic.classes("in the study"))
    counts = {split: len(pictures) for split, pictures in dataset.splits.items()}
    assert counts == {"train": 6 * classes, "valid": 2 * classes, "test": 2 * classes}
    assert set(dataset.names) == set(dataset.classes("train"))
    first, same, changed = (np.asarray(d.splits["valid"][0].open()) for d in (dataset, again, other))
    assert first.shape == (16, 16, 3)
    np.testing.assert_array_equal(first, same)
    assert (first != changed).any()


@pytest.mark.parametrize("spelling", ["valid", "validation", "val"])
def test_a_folder_of_class_folders_gives_pictures_with_their_class(tree, spelling):
    (tree / "valid").rename(tree / spelling)
    for file in ("b.jpg", "a.jpg", "10/c.jpg"):  # a test split may be flat or in class folders
        save(tree / "test" / file)
    dataset = load(tree)
    assert [(p.file, p.label) for p in dataset.splits["valid"]] == [
        (f"{spelling}/{name}/a.png", name) for name in ("1", "2", "10", "100")
    ]
    assert dataset.splits["valid"][0].open().getpixel((0, 0)) == (255, 0, 0)
    assert {(p.file, p.label) for p in dataset.splits["test"]} == {
        ("test/a.jpg", None), ("test/b.jpg", None), ("test/10/c.jpg", "10"),
    }  # fmt: skip


def test_a_relative_folder_is_looked_for_from_the_project_not_from_notebooks(tree, hub, monkeypatch):
    """JupyterLab starts in notebooks/."""
    for folder in ("vitlib", "params", "notebooks", "someone/flowers"):
        (tree.parent / folder).mkdir(parents=True)
    monkeypatch.chdir(tree.parent / "notebooks")
    assert len(load("flowers").splits["train"]) == 8
    load("hub:someone/flowers")
    load("hub:someone/other")
    assert hub.asked == [str(tree.parent / "someone/flowers"), "someone/other"]


@pytest.mark.parametrize("place", [".", ".."])
def test_names_come_from_cat_to_name_in_the_folder_or_above(tree, place):
    (tree / place / "cat_to_name.json").write_text(json.dumps({"1": "pink primrose", "10": "globe thistle"}))
    labels = sources.new_labels(load(tree))
    assert labels.folders == ("1", "2", "10", "100")  # in natural order, not as text
    assert labels.names == ("pink primrose", "2", "globe thistle", "100")  # the folder where no name is given
    for content in ("{", "[]", '{"1": 1}', "\xff"):
        (tree / place / "cat_to_name.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(DataError, match=r"cat_to_name\.json must map class folders to names"):
            load(tree)


class FakeTable:
    """A split of a Hub data set, as far as it is used: columns, rows, and pictures as bytes."""

    def __init__(self, features: dict, columns: dict):
        self.features, self.columns = features, columns

    def cast_column(self, name: str, feature: object) -> "FakeTable":
        assert not feature.decode  # the limits of open_picture apply to the Hub's pictures too
        return FakeTable({**self.features, name: feature}, self.columns)

    def __getitem__(self, key: int | str) -> object:
        if isinstance(key, str):
            return self.columns[key]
        return {name: values[key] for name, values in self.columns.items()}


@pytest.fixture
def hub(monkeypatch):
    """`datasets` replaced by one whose `load_dataset` gives three labelled rows a split."""
    module = types.ModuleType("datasets")
    module.Image = type("Image", (), {"__init__": lambda self, decode=True: setattr(self, "decode", decode)})
    module.ClassLabel = type("ClassLabel", (), {"names": ["globe_thistle", "anthurium"]})
    module.features = {"image": module.Image(), "label": module.ClassLabel()}
    encoded = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(encoded, "PNG")
    module.columns = {"image": [{"bytes": encoded.getvalue(), "path": None}] * 3, "label": [1, 0, 1]}
    module.asked = []

    def load_dataset(name: str) -> dict:
        module.asked.append(name)
        return {split: FakeTable(module.features, module.columns) for split in ("train", "validation")}

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_a_hub_data_set_brings_its_own_splits_and_classes(hub):
    dataset = load("hub:someone/flowers")
    assert list(dataset.splits) == ["train", "valid"]
    assert [p.label for p in dataset.splits["train"]] == ["anthurium", "globe_thistle", "anthurium"]
    assert dataset.names["globe_thistle"] == "globe thistle"
    assert dataset.splits["valid"][0].open().getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(BadPicture, match="megapixels"):  # the same limit as in folders
        load("hub:someone/flowers", max_megapixels=0.00001).splits["train"][0].open()


@pytest.mark.parametrize("unlabelled", [-1, None])
@pytest.mark.parametrize("cell", [None, {"bytes": b"no picture", "path": None}])
def test_rows_of_the_hub_may_have_no_class_or_no_picture(hub, unlabelled, cell):
    hub.columns["label"], hub.columns["image"] = [0, 1, unlabelled], [cell] * 3
    pictures = sources.from_hub("someone/flowers", 1).splits["valid"]
    assert [p.label for p in pictures] == ["globe_thistle", "anthurium", None]
    with pytest.raises(BadPicture):
        pictures[0].open()


def test_a_hub_data_set_without_classes_says_what_it_has(hub):
    del hub.features["label"]
    with pytest.raises(DataError, match="needs an image and a class-label column, it has image"):
        load("hub:someone/flowers")


def test_the_real_datasets_package_reads_an_image_folder(tree, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    dataset = load(f"hub:{tree}")
    assert [len(dataset.splits[split]) for split in ("train", "valid")] == [8, 4]
    assert {p.label for p in dataset.splits["train"]} == {"1", "2", "10", "100"}


@pytest.mark.parametrize(("source", "package"), [("hub:someone/flowers", "datasets"), ("torchvision:x", "torchvision")])
def test_a_missing_package_is_one_line_that_says_what_to_do(monkeypatch, source, package):
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match=r"pip install|use class folders") as told:
        load(source)
    assert package in str(told.value)
    assert len(str(told.value).splitlines()) == 1


def test_a_torchvision_that_does_not_fit_torch_is_one_line_too(tmp_path, monkeypatch):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text("raise RuntimeError('torchvision::nms does not exist\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(DataError, match=r"\(torchvision::nms does not exist\): use class folders"):
        load("torchvision:x")


def test_torchvision_classes_are_called_as_in_the_class_folders(tmp_path, monkeypatch):
    """Its ids start at 0 where the folders start at 1; the names keep their order."""

    class Flowers102:
        classes = ("pink primrose", "hard-leaved pocket orchid")

        def __init__(self, root, *, split, download):
            assert root == files.project_root() / "x"
            self._image_files, self._labels = [save(tmp_path / split / "image_1.jpg")] * 2, [1, 0]

    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    fake = types.SimpleNamespace(Flowers102=Flowers102)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", fake)
    dataset = load("torchvision:x")
    assert [p.label for p in dataset.splits["valid"]] == ["2", "1"]
    assert sources.new_labels(dataset) == Labels(("1", "2"), Flowers102.classes)


# Class ids


def test_ids_are_positions_in_the_checkpoints_labels_whatever_the_data_holds():
    labels = Labels(("10", "2", "100", "1"), ("a", "b", "c", "d"))
    assert labels.ids(map(picture, ("1", "2", "10", "100", None))).tolist() == [3, 1, 0, 2, -1]
    assert labels.ids([picture("100")]).tolist() == [2]
    with pytest.raises(DataError, match=r"rose\.png: the checkpoint knows no class 'rose'"):
        labels.ids([picture("rose", "rose.png")])


def test_folders_that_are_the_same_number_keep_one_order_and_an_unusual_digit_is_text():
    """Of a set, whose order changes from process to process."""
    spellings = ["7", "07", "007", "0007", "00007", "000007", "0000007", "²"]
    orders = {
        tuple(Dataset({"train": [picture(s) for s in spellings[i:] + spellings[:i]]}, {}).classes("train"))
        for i in range(8)
    }
    assert orders == {(*sorted(spellings[:-1]), "²")}


# Faults of a whole data set


def test_a_missing_folder_says_what_to_put_where(tmp_path):
    with pytest.raises(DataError, match=r"no data folder .*nowhere.*train/<class>/"):
        load(tmp_path / "nowhere")


def test_what_is_missing_from_a_data_set_is_named_before_training(tree):
    for split in ("train", "valid"):
        (tree / split).rename(tree / "elsewhere")
        with pytest.raises(DataError, match=f"no split '{split}' .*make folders train/<class>/"):
            load(tree)
        (tree / "elsewhere").rename(tree / split)
    (tree / "train/3").mkdir()
    for stray in ("", ".DS_Store", "Thumbs.db"):
        if stray:
            (tree / "train/3" / stray).write_bytes(b"x")
        with pytest.raises(DataError, match="class folder train/3 holds no picture: add pictures or remove the folder"):
            load(tree)
    shutil.rmtree(tree / "train/3")
    save(tree / "valid/3/a.png")
    with pytest.raises(DataError, match="'valid' has classes without training pictures: 3"):
        load(tree)
    for name in ("3", "10"):
        shutil.rmtree(tree / "valid" / name)
    with pytest.raises(DataError, match="'valid' has no picture of 10, which 'train' has: move some pictures"):
        load(tree)


def test_a_split_must_have_the_very_classes_of_the_checkpoint(tree):
    dataset = load(tree)
    for folders, says in (
        (("1", "2", "3", "10", "100", "101"), r"of 4 classes, the checkpoint knows 6; missing: 3, 101.*complete"),
        (("1", "2", "10"), "classes that the checkpoint does not know: 100"),
    ):
        with pytest.raises(DataError, match=says):
            Labels(folders, ("",) * len(folders)).check(dataset, "valid")
    Labels(("100", "10", "2", "1"), ("",) * 4).check(dataset, "valid")


def test_a_class_that_loses_every_picture_is_an_error(tree):
    (tree / "valid/10/a.png").write_text("no picture")
    with pytest.raises(DataError, match="no picture of class 10 in split 'valid' can be read"):
        sources.decode_splits(load(tree), ["train", "valid"], preprocess.new(16), workers=1)


@pytest.mark.parametrize("place", ["test/{}.png", "test/10/{}.png"])
def test_a_test_split_without_any_readable_picture_does_not_stop_training(tree, place):
    for name in "ab":
        save(tree / place.format(name)).write_text("no picture")
    dataset = load(tree)
    decoded = sources.decode_splits(dataset, list(dataset.splits), preprocess.new(16), workers=1)
    assert (len(decoded["test"].pictures), len(dataset.skipped)) == (0, 2)
    assert decode.duplicates(decoded).empty  # and the search passes over it


# One folder walker, for training folders and for any folder of pictures


def test_stray_files_are_skipped_by_name(tree):
    for stray in (".DS_Store", "1/.DS_Store", "1/Thumbs.db", "2/desktop.ini", "1/empty.jpg", "notes.txt"):
        (tree / "train" / stray).write_bytes(b"" if "empty" in stray else b"x")
    save(tree / "train/1/folder/deep.png")
    save(tree / "train/.ipynb_checkpoints/a-checkpoint.png")
    (tree / "train/1/gone.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(tree / "train/1/pipe.jpg")  # opening it would never return
    dataset, hidden = load(tree), "hidden file of the system"
    assert {file: reason for file, _, reason in dataset.skipped} == {
        "train/.DS_Store": hidden,
        "train/1/.DS_Store": hidden,
        "train/1/Thumbs.db": hidden,
        "train/2/desktop.ini": hidden,
        "train/1/empty.jpg": "empty file",
        "train/1/folder/deep.png": "in a folder inside a class folder",
        "train/notes.txt": "not in a class folder",
        "train/.ipynb_checkpoints": "hidden folder",
        "train/1/gone.jpg": "cannot be read: No such file or directory",
        "train/1/pipe.jpg": "not a regular file",
    }
    assert len(dataset.splits["train"]) == 8 and dataset.classes("train") == ["1", "2", "10", "100"]


def test_a_folder_of_pictures_names_hidden_folders_and_follows_links_without_end(tmp_path):
    folder = tmp_path / "pictures"
    for file in ("10/b.png", "9/c.png", ".ipynb_checkpoints/a.png", "d.png", "../elsewhere/e.png"):
        save(folder / file)
    (folder / "1").symlink_to(tmp_path / "elsewhere")  # a class folder may be a link
    (folder / "10" / "linked.png").symlink_to(tmp_path / "elsewhere" / "e.png")
    (folder / "10" / "up").symlink_to(folder)
    (folder / "0").symlink_to(folder / "10")  # the real folder keeps its own name, though it comes later
    (folder / "itself").symlink_to(folder / "itself")
    pictures, skipped = sources.pictures_below(folder, 1.0, follow_links=True)
    assert [(p.file, p.label) for p in pictures] == [
        ("1/e.png", "1"), ("9/c.png", "9"), ("10/b.png", "10"), ("10/linked.png", "10"), ("d.png", None),
    ]  # fmt: skip
    found = dict(skipped)
    assert found.pop("itself")  # the reason is the operating system's
    again = "a link to a folder that is listed already"
    assert found == {".ipynb_checkpoints": "hidden folder", "10/up": again, "0": again}


def test_links_out_of_the_folder_are_named_and_not_followed(tree, tmp_path_factory):
    """Those of the splits are: a project may link its data, but a downloaded folder must not reach outside."""
    outside = tmp_path_factory.mktemp("outside")
    save(outside / "private.png")
    save(outside / "valid/1/v.png")
    (tree / "train/1/file.png").symlink_to(outside / "private.png")
    (tree / "train/1/up").symlink_to("../../..")
    (tree / "train/2/inside.png").symlink_to(tree / "train/1/a.png")
    save(tree / "train/1/a.png")
    shutil.rmtree(tree / "valid")
    (tree / "valid").symlink_to(outside / "valid")
    dataset = sources.from_folder(tree, 1.0)
    out = "a link out of the folder: set `follow_links` to read it"
    assert {file: reason for file, _, reason in dataset.skipped} == {"train/1/file.png": out, "train/1/up": out}
    assert {"train/2/inside.png"} <= {one.file for one in dataset.splits["train"]}
    assert [one.file for one in dataset.splits["valid"]] == ["valid/1/v.png"]
    (tree / "train/3").symlink_to(outside)
    with pytest.raises(DataError, match=r"train/3 holds no picture \(a link out of the folder: set `follow_links`"):
        sources.from_folder(tree, 1.0)
    found = sources.from_folder(tree, 1.0, follow_links=True).splits["train"]
    assert {"train/1/file.png", "train/3/private.png"} <= {one.file for one in found}


# Choosing and counting


def test_evenly_takes_classes_in_turn_and_keeps_the_order(tree):
    pictures = [picture(label, str(i)) for i, label in enumerate("aaaabbc")]
    assert "".join(p.label for p in sources.evenly(pictures, 5)) == "aabbc"
    assert [p.file for p in sources.evenly(pictures, 4)] == ["0", "1", "4", "6"]
    assert all(sources.evenly(pictures, limit) == pictures for limit in (0, 7, 100))
    assert [len(pictures) for pictures in load(tree, limit=3).splits.values()] == [3, 3]
    assert [len(pictures) for pictures in load(tree, limit=3, valid_limit=2).splits.values()] == [3, 2]


def test_what_cannot_be_decoded_joins_the_problems_of_its_split(tree):
    (tree / "train/1/bad.jpg").write_text("no picture")
    dataset = load(tree)
    decoded = sources.decode_splits(dataset, ["train", "valid"], preprocess.new(8), workers=1)
    assert dataset.problems().to_dict("records") == [
        {"file": "train/1/bad.jpg", "split": "train", "reason": "not a picture in a known format"}
    ]
    assert dataset.splits["train"] == decoded["train"].pictures
    assert len(decoded["train"].pixels) == 8


def test_summary_counts_what_each_split_holds(tree):
    save(tree / "train/1/c.png")
    (tree / "valid/1/Thumbs.db").write_bytes(b"x")
    save(tree / "test/a.png")
    summary = load(tree).summary()
    assert summary.loc["train"].to_dict() == {
        "pictures": 9, "classes": 4, "fewest of a class": 2, "most of a class": 3, "unlabelled": 0, "skipped": 0,
    }  # fmt: skip
    assert summary.loc["valid", ["pictures", "skipped"]].tolist() == [4, 1]
    assert summary.loc["test", ["pictures", "classes", "fewest of a class", "unlabelled"]].tolist() == [1, 0, 0, 1]


def test_one_of_each_shows_the_first_picture_of_each_class_by_id():
    pixels = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    decoded = decode.Decoded(pixels, [picture(label) for label in ("2", "1", "1", "10")], [])
    labels = Labels(("1", "2", "3", "10"), ("one", "two", "three", "ten"))
    shown, names = sources.one_of_each(decoded, labels, 2)
    assert [image[0, 0, 0] for image in shown] == [1, 0]
    assert names == ["one", "two"]
