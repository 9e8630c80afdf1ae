"""Pictures from every source, odd files among them: read, or skipped by name with the reason."""

import io
import json
import os
import random
import signal
import struct
import sys
import types
import zlib
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from vitlib import data, files, params, preprocess, synthetic
from vitlib.data import BadPicture, DataError, Dataset, Labels, Picture


def save(path: Path, colour: object = "red", *, mode: str = "RGB", size: tuple[int, int] = (8, 8), **options) -> Path:
    """A picture of one colour at `path`, its folders made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)
    return path


def load(folder: object, **more) -> Dataset:
    return data.load(params.check({"data_source": str(folder), **more}))


def read(path: Path) -> Image.Image:
    return data.open_picture(path, max_megapixels=1)


def picture(label: str | None, file: str = "picture.png") -> Picture:
    return Picture(file, label, lambda: Image.new("RGB", (8, 8)))


def reasons(dataset: Dataset) -> dict[str, str]:
    return {file: reason for file, _, reason in dataset.skipped}


@contextmanager
def within(seconds: float):
    """TimeoutError where the block takes longer: a test of what must not hang should not hang either."""

    def late(*_):
        raise TimeoutError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def tree(tmp_path) -> Path:
    """Class folders '1', '2', '10', '100' with two training pictures and one validation picture each."""
    for name in ("1", "2", "10", "100"):
        for file in ("train/{}/a.png", "train/{}/b.png", "valid/{}/a.png"):
            save(tmp_path / "flowers" / file.format(name))
    return tmp_path / "flowers"


# Sources


def test_synthetic_pictures_are_drawn_when_opened():
    dataset = load("synthetic", pictures_per_class=4, image_size=16)
    classes = len(synthetic.TARGET_CLASSES)
    assert {split: len(pictures) for split, pictures in dataset.splits.items()} == {
        "train": 4 * classes,
        "valid": 2 * classes,
        "test": 2 * classes,
    }
    assert dataset.splits["train"][0].open().size == (16, 16)
    assert set(dataset.names) == set(dataset.classes())


def test_synthetic_pictures_follow_the_seed():
    first, again, other = (
        np.asarray(load("synthetic", pictures_per_class=4, image_size=16, seed=seed).splits["valid"][0].open())
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_a_folder_of_class_folders_gives_pictures_with_their_class(tree):
    dataset = load(tree)
    assert [(p.file, p.label) for p in dataset.splits["valid"]] == [
        (f"valid/{name}/a.png", name) for name in ("1", "2", "10", "100")
    ]
    assert dataset.splits["valid"][0].open().getpixel((0, 0)) == (255, 0, 0)


def test_a_flat_test_split_is_unlabelled(tree):
    save(tree / "test/b.jpg")
    save(tree / "test/a.jpg")
    assert [(p.file, p.label) for p in load(tree).splits["test"]] == [("test/a.jpg", None), ("test/b.jpg", None)]


def test_a_test_split_in_class_folders_is_labelled(tree):
    save(tree / "test/10/a.jpg")
    assert [p.label for p in load(tree).splits["test"]] == ["10"]


def test_a_relative_folder_is_looked_for_from_the_project_not_from_notebooks(tree, monkeypatch):
    """JupyterLab starts in notebooks/."""
    for folder in ("vitlib", "params", "notebooks"):
        (tree.parent / folder).mkdir()
    monkeypatch.chdir(tree.parent / "notebooks")
    assert len(load("flowers").splits["train"]) == 8


@pytest.mark.parametrize("spelling", ["validation", "val"])
def test_other_spellings_of_valid_are_known(tree, spelling):
    (tree / "valid").rename(tree / spelling)
    assert len(load(tree).splits["valid"]) == 4


@pytest.mark.parametrize("place", [".", ".."])
def test_names_come_from_cat_to_name_in_the_folder_or_above(tree, place):
    (tree / place / "cat_to_name.json").write_text(json.dumps({"1": "pink primrose", "10": "globe thistle"}))
    labels = data.new_labels(load(tree))
    assert labels.names == ("pink primrose", "2", "globe thistle", "100")  # the folder where no name is given


@pytest.mark.parametrize("content", ["{", "[]", '{"1": 1}', "\xff"])
def test_names_that_are_no_mapping_to_text_are_refused(tree, content):
    (tree / "cat_to_name.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=r"cat_to_name\.json"):
        load(tree)


class FakeTable:
    """A split of a Hub data set, as far as it is used: columns, rows, and pictures as bytes."""

    def __init__(self, features: dict, columns: dict):
        self.features, self.columns = features, columns

    def cast_column(self, name: str, feature: object) -> "FakeTable":
        assert not feature.decode  # the limits of open_picture hold for the Hub's pictures too
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
    row = {"bytes": encoded.getvalue(), "path": None}
    module.columns = {"image": [row] * 3, "label": [1, 0, 1]}
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


def test_a_local_folder_of_a_hub_data_set_is_looked_for_from_the_project(hub, tmp_path, monkeypatch):
    for folder in ("vitlib", "params", "notebooks", "someone/flowers"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "notebooks")
    load("hub:someone/flowers")
    load("hub:someone/other")
    assert hub.asked == [str(tmp_path / "someone/flowers"), "someone/other"]


@pytest.mark.parametrize("unlabelled", [-1, None])
def test_unlabelled_rows_of_the_hub_get_no_class(hub, unlabelled):
    hub.columns["label"] = [0, 1, unlabelled]
    assert [p.label for p in data.from_hub("someone/flowers", 1).splits["valid"]] == [
        "globe_thistle",
        "anthurium",
        None,
    ]


@pytest.mark.parametrize("cell", [None, {"bytes": b"no picture", "path": None}])
def test_bad_rows_of_the_hub_are_bad_pictures(hub, cell):
    hub.columns["image"] = [cell] * 3
    with pytest.raises(BadPicture):
        load("hub:someone/flowers").splits["train"][0].open()


def test_pictures_of_the_hub_have_the_same_limit_of_megapixels(hub):
    with pytest.raises(BadPicture, match="megapixels"):
        load("hub:someone/flowers", max_megapixels=0.00001).splits["train"][0].open()


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
    assert dataset.splits["train"][0].open().getpixel((0, 0)) == (255, 0, 0)


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
    assert data.new_labels(dataset) == Labels(("1", "2"), Flowers102.classes)


# Class ids


def test_a_new_head_takes_folders_in_natural_order_not_as_text(tree):
    assert data.new_labels(load(tree)).folders == ("1", "2", "10", "100")


def test_ids_are_positions_in_the_checkpoints_labels_whatever_the_order_there():
    labels = Labels(("10", "2", "100", "1"), ("a", "b", "c", "d"))
    assert labels.ids(map(picture, ("1", "2", "10", "100", None))).tolist() == [3, 1, 0, 2, -1]


def test_ids_do_not_depend_on_which_classes_a_data_set_has():
    labels = Labels(("1", "2", "10"), ("a", "b", "c"))
    assert labels.ids([picture("10")]).tolist() == [2]


def test_folders_that_are_the_same_number_keep_one_order():
    """Of a set, whose order changes from process to process."""
    spellings = ["7", "07", "007", "0007", "00007", "000007", "0000007"]
    orders = {
        tuple(Dataset({"train": [picture(s) for s in spellings[i:] + spellings[:i]]}, {}).classes()) for i in range(7)
    }
    assert orders == {tuple(sorted(spellings))}


def test_a_class_named_by_an_unusual_digit_is_text(tree):
    save(tree / "train/²/a.png")
    save(tree / "valid/²/a.png")
    assert data.new_labels(load(tree)).folders[-1] == "²"


def test_an_unknown_class_has_no_id():
    with pytest.raises(DataError, match=r"rose\.png: the checkpoint knows no class 'rose'"):
        Labels(("1",), ("a",)).ids([picture("rose", "rose.png")])


# Faults of a whole data set


def test_a_missing_folder_says_what_to_put_where(tmp_path):
    with pytest.raises(DataError, match=r"no data folder .*nowhere.*train/<class>/"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_missing_split_says_what_to_make(tree, split):
    (tree / split).rename(tree / "elsewhere")
    with pytest.raises(DataError, match=f"no split '{split}' .*make folders train/<class>/"):
        load(tree)


@pytest.mark.parametrize("stray", [None, ".DS_Store", "Thumbs.db"])
def test_an_empty_class_says_what_to_do(tree, stray):
    (tree / "train/3").mkdir()
    if stray:
        (tree / "train/3" / stray).write_bytes(b"x")
    with pytest.raises(DataError, match="class folder train/3 holds no picture: add pictures or remove the folder"):
        load(tree)


def test_a_validation_class_that_training_never_saw_is_named(tree):
    save(tree / "valid/3/a.png")
    with pytest.raises(DataError, match="'valid' has classes without training pictures: 3"):
        load(tree)


def test_a_training_class_without_validation_pictures_is_said_before_training(tree):
    (tree / "valid/10/a.png").unlink()
    (tree / "valid/10").rmdir()
    with pytest.raises(DataError, match="'valid' has no picture of 10, which 'train' has: move some pictures"):
        load(tree)


def test_fewer_classes_than_the_checkpoint_knows_is_an_error(tree):
    labels = Labels(("1", "2", "3", "10", "100", "101"), ("",) * 6)
    with pytest.raises(DataError, match=r"of 4 classes, the checkpoint knows 6; missing: 3, 101.*complete the data"):
        labels.check(load(tree), "valid")


def test_a_class_that_the_checkpoint_does_not_know_is_an_error(tree):
    with pytest.raises(DataError, match="classes that the checkpoint does not know: 100"):
        Labels(("1", "2", "10"), ("",) * 3).check(load(tree), "valid")


def test_the_very_classes_of_the_checkpoint_pass(tree):
    Labels(("100", "10", "2", "1"), ("",) * 4).check(load(tree), "valid")


def test_a_class_that_loses_every_picture_is_an_error(tree):
    (tree / "valid/10/a.png").write_text("no picture")
    with pytest.raises(DataError, match="no picture of class 10 in split 'valid' can be read"):
        data.decode_splits(load(tree), ["train", "valid"], preprocess.new(16), workers=1)


@pytest.mark.parametrize("place", ["test/{}.png", "test/10/{}.png"])
def test_a_test_split_without_any_readable_picture_does_not_stop_training(tree, place):
    for name in "ab":
        save(tree / place.format(name)).write_text("no picture")
    dataset = load(tree)
    decoded = data.decode_splits(dataset, list(dataset.splits), preprocess.new(16), workers=1)
    assert (len(decoded["test"].pictures), len(dataset.skipped)) == (0, 2)
    assert data.duplicates(decoded).empty  # and the search passes over it


# Odd files in the folders


def test_stray_files_are_skipped_by_name(tree):
    for stray in (".DS_Store", "1/.DS_Store", "1/Thumbs.db", "2/desktop.ini", "1/empty.jpg", "notes.txt"):
        (tree / "train" / stray).write_bytes(b"" if "empty" in stray else b"x")
    (tree / "train/1/folder").mkdir()
    dataset = load(tree)
    hidden = "hidden file of the system"
    assert reasons(dataset) == {
        "train/.DS_Store": hidden,
        "train/1/.DS_Store": hidden,
        "train/1/Thumbs.db": hidden,
        "train/2/desktop.ini": hidden,
        "train/1/empty.jpg": "empty file",
        "train/1/folder": "a folder inside a class folder",
        "train/notes.txt": "not in a class folder",
    }
    assert len(dataset.splits["train"]) == 8


def test_a_hidden_folder_is_no_class(tree):
    save(tree / "train/.ipynb_checkpoints/a-checkpoint.png")
    dataset = load(tree)
    assert dataset.classes() == ["1", "2", "10", "100"]
    assert reasons(dataset) == {"train/.ipynb_checkpoints": "hidden file of the system"}


def test_a_dangling_link_is_skipped(tree):
    (tree / "train/1/gone.jpg").symlink_to("nowhere.jpg")
    assert reasons(load(tree)) == {"train/1/gone.jpg": "cannot be read: No such file or directory"}


def test_a_fifo_is_skipped_and_never_opened(tree):
    fifo = tree / "train/1/pipe.jpg"
    os.mkfifo(fifo)
    with within(5):
        assert reasons(load(tree)) == {"train/1/pipe.jpg": "not a regular file"}
        with pytest.raises(BadPicture, match="not a regular file"):
            read(fifo)


def test_a_file_without_permission_is_named_as_such(tmp_path, monkeypatch):
    def forbidden(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Image, "open", forbidden)
    file = tmp_path / "a.jpg"
    file.write_bytes(b"x")
    with pytest.raises(BadPicture, match=r"^cannot be read: Permission denied$"):
        read(file)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif"])
def test_text_with_the_suffix_of_a_picture_is_not_a_picture(tmp_path, suffix):
    file = tmp_path / f"a.{suffix}"
    file.write_text("404 Not Found")
    with pytest.raises(BadPicture, match="not a picture in a known format"):
        read(file)


def test_a_format_that_runs_a_program_is_not_opened(tmp_path):
    with pytest.raises(BadPicture, match="not a picture in a known format"):
        read(save(tmp_path / "a.eps"))


def test_a_truncated_jpeg_is_damaged_not_half_grey(tmp_path):
    file = save(tmp_path / "a.jpg", size=(64, 64))
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(BadPicture, match=r"damaged: .*truncated"):
        read(file)


def test_a_picture_of_one_pixel_is_too_small(tmp_path):
    with pytest.raises(BadPicture, match="1 × 1 pixels are too small"):
        read(save(tmp_path / "a.png", size=(1, 1)))


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises `width` × `height` pixels and holds none: opened any further, it would be damaged."""
    parts = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b"")
    chunks = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    ("side", "says"), [(1001, "1001 × 1001 pixels are more than 1 megapixels"), (60_000, "too large: .*bomb")]
)
def test_too_many_pixels_are_refused_from_the_header(tmp_path, side, says):
    file = tmp_path / "a.png"
    file.write_bytes(png_header(side, side))
    with pytest.raises(BadPicture, match=says):
        read(file)


def test_the_limit_of_megapixels_itself_is_allowed(tmp_path):
    file = save(tmp_path / "a.png", size=(100, 100))
    assert data.open_picture(file, 0.01).size == (100, 100)
    with pytest.raises(BadPicture):
        data.open_picture(file, 0.0099)


# What a viewer would show


@pytest.mark.parametrize(("level", "shown"), [(0, 0), (200, 1), (32_768, 128), (65_535, 255)])
def test_16_bit_grey_is_scaled_by_its_format(tmp_path, level, shown):
    """A plain convert("RGB") makes everything over 255 white; scaling by the brightest pixel makes dark bright."""
    file = tmp_path / "a.png"
    Image.fromarray(np.full((8, 8), level, dtype=np.uint16)).save(file)
    assert read(file).getpixel((0, 0)) == (shown,) * 3


@pytest.mark.parametrize(
    ("suffix", "mode", "colour"),
    [
        ("png", "RGBA", (0, 0, 0, 0)),
        ("png", "LA", (0, 0)),
        ("webp", "RGBA", (0, 0, 0, 0)),
        ("tif", "RGBA", (0, 0, 0, 0)),
    ],
)
def test_transparency_lies_on_white(tmp_path, suffix, mode, colour):
    options = {"lossless": True} if suffix == "webp" else {}
    assert read(save(tmp_path / f"a.{suffix}", colour, mode=mode, **options)).getpixel((0, 0)) == (255, 255, 255)


def test_a_transparent_colour_of_a_palette_lies_on_white(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "a.png", transparency=0)
    shown = read(tmp_path / "a.png")
    assert (shown.getpixel((0, 0)), shown.getpixel((1, 0))) == ((255, 255, 255), (0, 0, 255))


@pytest.mark.parametrize(
    ("file", "mode", "colour", "shown"),
    [
        ("a.gif", "P", None, (10, 200, 30)),
        ("a.jpg", "CMYK", (255, 0, 0, 0), (0, 255, 255)),
        ("a.jpg", "L", 128, (128, 128, 128)),
        ("a.png", "1", 1, (255, 255, 255)),
        ("a.bmp", "RGB", (10, 200, 30), (10, 200, 30)),
        ("a.tif", "F", 0.5, (128, 128, 128)),
    ],
)
def test_every_colour_mode_becomes_rgb(tmp_path, file, mode, colour, shown):
    if mode == "P":
        Image.new("RGB", (8, 8), shown).quantize(4).save(tmp_path / file)
    else:
        save(tmp_path / file, colour, mode=mode)
    found = read(tmp_path / file)
    assert found.mode == "RGB"
    np.testing.assert_allclose(found.getpixel((4, 4)), shown, atol=2)


def test_a_picture_with_exif_rotation_stands_upright(tmp_path):
    image = Image.new("RGB", (40, 20), "blue")
    image.paste("red", (0, 0, 20, 20))  # the left half, which orientation 6 turns to the top
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    upright = read(tmp_path / "a.jpg")
    assert upright.size == (20, 40)
    np.testing.assert_allclose(
        [upright.getpixel((10, 5)), upright.getpixel((10, 35))], [(255, 0, 0), (0, 0, 255)], atol=5
    )


@pytest.mark.parametrize(
    "error", [struct.error, KeyError, IndexError, zlib.error, AttributeError, NotImplementedError, ZeroDivisionError]
)
def test_whatever_a_decoder_raises_for_a_damaged_file_makes_it_a_bad_picture(tmp_path, monkeypatch, error):
    def load(image):
        raise error("odd bytes")

    file = save(tmp_path / "a.png")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(BadPicture, match=r"^damaged: .*odd bytes"):
        read(file)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_undone_as_pillow_undoes_it(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(read(tmp_path / "a.png"), ImageOps.exif_transpose(image))


def test_damaged_exif_tags_do_not_cost_the_picture(tmp_path, monkeypatch):
    file = save(tmp_path / "a.jpg", size=(20, 10))

    def damaged(image):
        raise struct.error("unpack requires a buffer of 2 bytes")

    monkeypatch.setattr(Image.Image, "getexif", damaged)
    assert read(file).size == (20, 10)


def test_a_tag_that_cannot_be_written_again_keeps_the_rotation(tmp_path):
    """`ImageOps.exif_transpose` encodes all tags anew; here it fails for a width of 16 bits that is text."""
    entries = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHI", 0x0100, 2, 4) + b"abc\0"
    block = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    save(tmp_path / "a.jpg", size=(20, 10), exif=block)
    assert read(tmp_path / "a.jpg").size == (10, 20)


def test_the_two_pictures_in_one_file_of_a_phone_open_as_the_first(tmp_path):
    Image.new("RGB", (16, 8), "red").save(
        tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("L", (4, 4))]
    )
    assert read(tmp_path / "a.jpg").size == (16, 8)


# Mutated files


def encode(form: str, **options) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (12, 17, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, form, **options)
    return file.getvalue()


def mutate(content: bytes, chance: random.Random) -> bytes:
    """Bytes changed, removed or added, more often near the beginning, where formats keep their structure."""
    mutated = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        place = chance.randrange(len(mutated) if chance.random() < 0.5 else min(len(mutated), 100))
        mutated[place : place + chance.choice((1, 1, 1, 0, 5))] = chance.randbytes(chance.choice((1, 1, 1, 0, 5)))
    return bytes(mutated[: chance.randrange(8, len(mutated))] if chance.random() < 0.1 else mutated)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("GIF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
@pytest.mark.filterwarnings("ignore")  # Pillow warns of many oddities that it can read over
def test_mutated_files_are_read_or_skipped_one_row_each(tmp_path, form, options):
    original, chance = encode(form, **options), random.Random(0)
    pictures = []
    for number in range(300):
        file = tmp_path / f"{number:03d}"
        file.write_bytes(mutate(original, chance))
        pictures.append(data.picture_of(file, tmp_path, None, 1.0))
    with within(20):
        decoded = data.decode(pictures, preprocess.new(8), workers=2)
    rows = [p.file for p in decoded.pictures] + [file for file, _ in decoded.skipped]
    assert sorted(rows) == [p.file for p in pictures]
    assert len(decoded.pictures) == len(decoded.pixels)
    assert 10 < len(decoded.skipped) < 300  # the mutations hurt, and not all of them
    assert all(reason and "\n" not in reason for _, reason in decoded.skipped)


# Choosing, decoding, comparing


def test_evenly_takes_classes_in_turn_and_keeps_the_order():
    pictures = [picture(label, str(i)) for i, label in enumerate("aaaabbc")]
    assert "".join(p.label for p in data.evenly(pictures, 5)) == "aabbc"
    assert [p.file for p in data.evenly(pictures, 4)] == ["0", "1", "4", "6"]


@pytest.mark.parametrize("limit", [0, 7, 100])
def test_evenly_leaves_alone_what_is_within_the_limit(limit):
    pictures = [picture(label) for label in "aaaabbc"]
    assert data.evenly(pictures, limit) == pictures


def test_limit_holds_for_every_split(tree):
    assert [len(pictures) for pictures in load(tree, limit=3).splits.values()] == [3, 3]


def test_decode_keeps_the_order_and_names_what_it_skipped(tmp_path):
    colours = {"a": "red", "c": "lime", "e": "blue", "f": "white"}
    files = [save(tmp_path / f"{name}.png", colours[name]) if name in colours else tmp_path / name for name in "abcdef"]
    (tmp_path / "b").write_text("no picture")
    (tmp_path / "d").mkdir()
    decoded = data.decode([data.picture_of(f, tmp_path, None, 1) for f in files], preprocess.new(8), workers=3)
    assert [p.file for p in decoded.pictures] == ["a.png", "c.png", "e.png", "f.png"]
    assert decoded.pixels[:, :, 0, 0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]
    assert decoded.skipped == [("b", "not a picture in a known format"), ("d", "a folder inside a class folder")]


def test_a_fault_of_the_code_is_not_taken_for_a_bad_picture():
    def broken():
        raise AttributeError("a mistake")

    with pytest.raises(AttributeError, match="a mistake") as raised:
        data.decode([Picture("a.png", None, broken)], preprocess.new(8))
    assert raised.value.__notes__ == ["while reading the picture a.png"]


def test_what_cannot_be_decoded_joins_the_problems_of_its_split(tree):
    (tree / "train/1/bad.jpg").write_text("no picture")
    dataset = load(tree)
    decoded = data.decode_splits(dataset, ["train", "valid"], preprocess.new(8), workers=1)
    assert dataset.problems().to_dict("records") == [
        {"file": "train/1/bad.jpg", "split": "train", "reason": "not a picture in a known format"}
    ]
    assert dataset.splits["train"] == decoded["train"].pictures
    assert len(decoded["train"].pixels) == 8


@pytest.fixture
def flowers() -> list[Image.Image]:
    """Six different pictures, two each of three classes."""
    return [
        Image.fromarray(synthetic.render(flower, index=index, split="train", seed=0, size=96))
        for flower in synthetic.TARGET_CLASSES[:3]
        for index in range(2)
    ]


def test_duplicates_are_exact_or_near_and_different_pictures_are_neither(tmp_path, flowers):
    same, again, smaller, *others = flowers
    copies = {
        "train": {
            "same.png": (same, {}),
            "again.png": (again, {}),
            "smaller.png": (smaller, {}),
            "x.png": (others[0], {}),
        },
        "valid": {
            "copy.png": (same, {}),
            "saved.jpg": (again, {"quality": 75}),
            "small.webp": (smaller.resize((72, 72)), {"quality": 80}),
            "y.png": (others[1], {}),
        },
        "test": {"z.png": (others[2], {})},
    }
    decoded = {}
    for split, content in copies.items():
        for name, (image, options) in content.items():
            (tmp_path / split).mkdir(exist_ok=True)
            image.save(tmp_path / split / name, **options)
        pictures = [data.picture_of(tmp_path / split / name, tmp_path, None, 1) for name in content]
        decoded[split] = data.decode(pictures, preprocess.new(64))
    found = data.duplicates(decoded)
    assert list(found[["file", "other_file", "kind"]].itertuples(index=False, name=None)) == [
        ("valid/copy.png", "train/same.png", "exact"),
        ("valid/saved.jpg", "train/again.png", "near"),
        ("valid/small.webp", "train/smaller.png", "near"),
    ]
    assert found["correlation"].between(data.NEAR_DUPLICATE, 1.0001).all()


def test_no_duplicates_is_an_empty_table_with_its_columns(flowers):
    decoded = {
        split: data.decode([Picture(split, None, partial(Image.Image.copy, image))], preprocess.new(16))
        for split, image in zip(("train", "valid"), flowers[::2], strict=False)
    }
    found = data.duplicates(decoded)
    assert found.empty
    assert list(found.columns) == ["file", "other_file", "correlation", "kind"]


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
    decoded = data.Decoded(pixels, [picture(label) for label in ("2", "1", "1", "10")], [])
    labels = Labels(("1", "2", "3", "10"), ("one", "two", "three", "ten"))
    shown, names = data.one_of_each(decoded, labels, 2)
    assert [image[0, 0, 0] for image in shown] == [1, 0]
    assert names == ["one", "two"]
