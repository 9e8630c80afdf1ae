"""Pictures from any source behind one interface: splits, labels, and what was skipped.

A class is known by its folder's name. Integer ids come from a checkpoint's `Labels`, once there is a checkpoint.
"""

from __future__ import annotations

import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from vitlib.pictures import synthetic
from vitlib.pictures.decode import BadPicture, Decoded, Picture, decode, not_a_picture, open_picture, plain_jpeg
from vitlib.pictures.preprocess import Preprocess
from vitlib.study import files, params
from vitlib.study.params import Parameters

SPLITS = {"train": ("train",), "valid": ("valid", "validation", "val"), "test": ("test",)}


class DataError(ValueError):
    """A data set that cannot be used; the message says what to do."""


@dataclass
class Dataset:
    """Splits of pictures, display names by class, and what was skipped (file, split, reason)."""

    splits: dict[str, list[Picture]]
    names: dict[str, str]
    skipped: list[tuple[str, str, str]] = field(default_factory=list)

    def classes(self, split: str) -> list[str]:
        """Class folders of a split, in natural order ('2' before '10')."""
        return sorted({picture.label for picture in self.splits[split]} - {None}, key=_natural)

    def summary(self) -> pd.DataFrame:
        """A row a split: pictures, classes, fewest and most pictures of a class, unlabelled and skipped ones."""
        rows = {}
        for split, pictures in self.splits.items():
            sizes = Counter(picture.label for picture in pictures)
            unlabelled, skipped = sizes.pop(None, 0), sum(where == split for _, where, _ in self.skipped)
            fewest, most = min(sizes.values(), default=0), max(sizes.values(), default=0)
            rows[split] = len(pictures), len(sizes), fewest, most, unlabelled, skipped
        columns = ["pictures", "classes", "fewest of a class", "most of a class", "unlabelled", "skipped"]
        return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("split")

    def problems(self) -> pd.DataFrame:
        """The skipped files with their reasons."""
        return pd.DataFrame(self.skipped, columns=["file", "split", "reason"])


@dataclass(frozen=True)
class Labels:
    """A checkpoint's classes: position is the id, `folders` the class folders, `names` what a person reads."""

    folders: tuple[str, ...]
    names: tuple[str, ...]

    def ids(self, pictures: Iterable[Picture]) -> torch.Tensor:
        """int64 ids (n,) of the pictures' classes; −1 for an unlabelled one. DataError for an unknown class."""
        known = {None: -1} | {folder: number for number, folder in enumerate(self.folders)}
        pictures = list(pictures)
        if odd := [picture for picture in pictures if picture.label not in known]:
            raise DataError(f"{odd[0].file}: the checkpoint knows no class {odd[0].label!r}")
        return torch.tensor([known[picture.label] for picture in pictures], dtype=torch.int64)

    def check(self, dataset: Dataset, split: str) -> None:
        """DataError unless `split` holds a picture of every class that the checkpoint knows, and no other class."""
        found = dataset.classes(split)
        if missing := _without(self.folders, found):
            counts = f"split {split!r} has pictures of {len(found)} classes, the checkpoint knows {len(self.folders)}"
            advice = "complete the data, or fine-tune on these classes first"
            raise DataError(f"{counts}; missing: {missing}. Accuracy over a part is another number: {advice}.")
        if extra := _without(found, self.folders):
            raise DataError(f"split {split!r} has classes that the checkpoint does not know: {extra}")


def load(settings: Parameters) -> Dataset:
    """The data set that `settings.data_source` names, checked and cut to `limit` and `valid_limit`."""
    kind, _, rest = settings.data_source.partition(":")
    if kind == "synthetic":
        dataset = from_synthetic(synthetic.classes("in the study"), settings)
    elif kind in ("hub", "torchvision"):
        dataset = (from_hub if kind == "hub" else from_torchvision)(rest, settings.max_megapixels)
    else:
        dataset = from_folder(existing_folder(settings.data_source), settings.max_megapixels, settings.follow_links)
    check(dataset)
    for split, pictures in dataset.splits.items():
        limit = settings.limit if split == "train" else settings.valid_limit or settings.limit
        dataset.splits[split] = evenly(pictures, limit)
    return dataset


def check(dataset: Dataset) -> None:
    """DataError for a missing split, and where training and validation do not have the same classes."""
    for split in ("train", "valid"):
        if not dataset.splits.get(split):
            raise DataError(f"no split {split!r} with pictures: make folders train/<class>/ and valid/<class>/")
    trained = dataset.classes("train")
    for split in dataset.splits:
        if unknown := _without(dataset.classes(split), trained):
            raise DataError(f"split {split!r} has classes without training pictures: {unknown}")
    if missing := _without(trained, dataset.classes("valid")):  # said now, not after hours of training
        advice = "move some pictures of each class there, or remove the class from 'train'"
        raise DataError(f"split 'valid' has no picture of {missing}, which 'train' has: {advice}")


def evenly(pictures: list[Picture], limit: int) -> list[Picture]:
    """At most `limit` pictures (0: all), one of each class in turn, in the given order within a class."""
    labels = pd.Series([picture.label for picture in pictures], dtype=object)
    turns = labels.groupby(labels, dropna=False).cumcount().sort_values(kind="stable")
    return [pictures[position] for position in sorted(turns.index[: limit or None])]


def from_synthetic(flowers: tuple, settings: Parameters) -> Dataset:
    """Flower pictures drawn when they are opened; valid and test hold a third as many of a class as train."""

    def draw(flower: synthetic.FlowerClass, index: int, split: str) -> Image.Image:
        size, seed = settings.image_size, settings.seed
        return Image.fromarray(synthetic.render(flower, index=index, split=split, seed=seed, size=size))

    splits = {
        split: [
            Picture(f"{split}/{flower.key}/{index:04d}", flower.key, partial(draw, flower, index, split))
            for flower in flowers
            for index in range(settings.pictures_per_class // share)
        ]
        for split, share in (("train", 1), ("valid", 3), ("test", 3))
    }
    return Dataset(splits, {flower.key: flower.name for flower in flowers})


def existing_folder(name: str) -> Path:
    """The folder of class folders called `name`, from the project's root. DataError where there is none."""
    if reason := params.missing("data_source", name):
        raise DataError(reason)
    return files.resolve(name)


def from_folder(folder: Path, max_megapixels: float, follow_links: bool = False) -> Dataset:
    """The class-folder layout: train/<class>/, valid/<class>/, test/ flat or in classes, cat_to_name.json beside.

    The folder and its splits may be links; others that lead out of both are left out unless `follow_links`.
    """
    splits, skipped = {}, []
    for split, spellings in SPLITS.items():
        root = next((folder / name for name in spellings if (folder / name).is_dir()), None)
        if root is None:
            continue
        found, faults = pictures_below(root, max_megapixels, folder, follow_links)
        depths = {picture.file: picture.file.count("/") for picture in found}
        faults += [(file, "in a folder inside a class folder") for file, depth in depths.items() if depth > 2]
        faults += [(file, "not in a class folder") for file, depth in depths.items() if depth == 1 and split != "test"]
        skipped += [(file, split, reason) for file, reason in faults]
        left_out = dict(faults)
        splits[split] = [picture for picture in found if picture.file not in left_out]
        classes = {picture.label for picture in splits[split]}
        for empty in root.iterdir():
            if empty.is_dir() and not empty.name.startswith(".") and empty.name not in classes:
                name, advice = empty.relative_to(folder).as_posix(), "add pictures or remove the folder (and the class "
                why = f" ({left_out[name]})" if name in left_out else ""
                raise DataError(f"the class folder {name} holds no picture{why}: {advice}from the other splits)")
    return Dataset(splits, _read_names(folder), skipped)


def walk(folder: Path, inside: Iterable[Path] | None = None) -> list[tuple[str, str]]:
    """Every file below a folder by its name from there, in natural order, with the reason not to open it ('' if none).

    So are folders that are left out, and links that lead out of the folders `inside` (None: anywhere). Links are
    followed last, so that a folder reached twice keeps its own name.
    """
    found, seen, folders, links = [], set(), [""], []
    homes = [os.path.realpath(one) for one in inside or ["/"]]
    while folders or links:
        here = folders.pop() if folders else links.pop(0)
        if os.path.basename(here).startswith("."):  # .ipynb_checkpoints is no class
            found.append((here, "hidden folder"))
        elif (real := os.path.realpath(folder / here)) in seen:  # following a link upwards would never end
            found.append((here, "a link to a folder that is listed already"))
        else:
            seen.add(real)
            try:
                entries = sorted(os.listdir(folder / here))
            except OSError as error:
                found.append((here, f"cannot be read: {error.strerror}"))
                continue
            for entry in (os.path.join(here, name) for name in entries):
                path = folder / entry
                if (link := path.is_symlink()) and not _is_in(homes, path):
                    found.append((entry, "a link out of the folder: set `follow_links` to read it"))
                elif os.path.isdir(path):  # False, not an error, where it is forbidden
                    (links if link else folders).append(entry)
                else:
                    found.append((entry, not_a_picture(path)))
    return sorted(found, key=lambda pair: [_natural(part) for part in pair[0].split("/")])


def _is_in(homes: list[str], link: Path) -> bool:
    return any(Path(os.path.realpath(link)).is_relative_to(home) for home in homes)


def each(
    folder: Path, listed: Iterable[tuple[str, str]], max_megapixels: float, root: Path | None = None
) -> Iterator[Picture]:
    """A `Picture` for each file that `walk` listed, made when it is asked for; one with a reason only says that.

    The label is the folder's name, None directly in `folder`. Files are named from `root` on (by default `folder`).
    """
    for name, reason in listed:
        path = folder / name
        file = path.relative_to(root or folder).as_posix().encode("utf-8", "backslashreplace").decode("utf-8")
        opening = (partial(function, path, max_megapixels) for function in (open_picture, plain_jpeg))
        label = None if path.parent == folder else path.parent.name
        yield Picture(file, label, *([partial(_refuse, reason)] if reason else opening))


def _refuse(reason: str) -> Image.Image:
    raise BadPicture(reason)


def pictures_below(
    folder: Path, max_megapixels: float, root: Path | None = None, follow_links: bool = False
) -> tuple[list[Picture], list[tuple[str, str]]]:
    """All pictures below a folder, flat or in class folders, as `each` makes them, and what is none (file, reason)."""
    listed = walk(folder, None if follow_links else [folder, root or folder])
    found = [(one, reason) for one, (_, reason) in zip(each(folder, listed, max_megapixels, root), listed, strict=True)]
    return [one for one, reason in found if not reason], [(one.file, reason) for one, reason in found if reason]


def from_hub(name: str, max_megapixels: float) -> Dataset:
    """A Hub data set (or a local folder of one) with an image and a class-label column, through `datasets`."""
    try:
        import datasets
    except ImportError:
        raise DataError("`data_source: hub:…` needs the package datasets: pip install -e '.[hub]'") from None
    folder = files.resolve(name)
    loaded = datasets.load_dataset(str(folder) if name and folder.is_dir() else name)
    features = next(iter(loaded.values())).features
    image = next((key for key, kind in features.items() if isinstance(kind, datasets.Image)), None)
    label = next((key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None)
    if image is None or label is None:
        raise DataError(f"{name!r} needs an image and a class-label column, it has {', '.join(features)}")

    def opened(table: datasets.Dataset, row: int) -> Image.Image:
        cell = table[row][image]
        if not cell:
            raise BadPicture("no picture in this row")
        return open_picture(io.BytesIO(cell["bytes"]) if cell["bytes"] else Path(cell["path"]), max_megapixels)

    splits, names = {}, dict(enumerate(features[label].names))
    for split, spellings in SPLITS.items():
        if (key := next((key for key in spellings if key in loaded), None)) is not None:
            table = loaded[key].cast_column(image, datasets.Image(decode=False))  # opened here, with our limits
            splits[split] = [  # unlabelled rows have −1 or None
                Picture(f"{split}/{row:06d}", names.get(number), partial(opened, table, row))
                for row, number in enumerate(table[label])
            ]
    return Dataset(splits, {key: key.replace("_", " ") for key in names.values()})


def from_torchvision(folder: str, max_megapixels: float) -> Dataset:
    """torchvision's Flowers102 (official splits, downloaded to `folder`); classes '1'…'102' as in the class folders."""
    try:
        from torchvision.datasets import Flowers102
    except (ImportError, RuntimeError) as why:  # beside a CPU-only torch its import fails at run time
        needs = f"a working torchvision ({files.first_line(why)})"
        raise DataError(f"`torchvision:…` needs {needs}: use class folders") from None
    splits = {}
    for split, theirs in (("train", "train"), ("valid", "val"), ("test", "test")):
        table = Flowers102(files.resolve(folder or "data"), split=theirs, download=True)
        splits[split] = [
            Picture(f"{split}/{Path(file).name}", str(number + 1), partial(open_picture, Path(file), max_megapixels))
            for file, number in zip(table._image_files, table._labels, strict=True)
        ]
    return Dataset(splits, {str(number): name for number, name in enumerate(Flowers102.classes, start=1)})


def _read_names(folder: Path) -> dict[str, str]:
    """Display names by class folder from `cat_to_name.json`, in the folder or beside it."""
    for candidate in (folder / "cat_to_name.json", folder.parent / "cat_to_name.json"):
        if candidate.is_file():
            try:
                return TypeAdapter(dict[str, str]).validate_json(candidate.read_bytes())
            except ValidationError as error:
                say = f'{candidate.name} must map class folders to names, {{"1": "pink primrose"}}'
                raise DataError(f"{say}: {error.errors()[0]['msg']}") from None
    return {}


def new_labels(dataset: Dataset) -> Labels:
    """Labels for a new head: ids in natural order of the class folders; kept from then on by the checkpoint."""
    folders = dataset.classes("train")
    return Labels(tuple(folders), tuple(dataset.names.get(folder, folder) for folder in folders))


def decode_splits(dataset: Dataset, splits: Iterable[str], preprocess: Preprocess, workers: int) -> dict[str, Decoded]:
    """`decode` each split; what cannot be read joins `dataset.skipped`.

    DataError when a class loses every picture; not in the test split, from which nothing is learnt or chosen.
    """
    decoded = {}
    for split in splits:
        decoded[split] = decode(dataset.splits[split], preprocess, workers=workers, what=split)
        dataset.skipped += [(file, split, reason) for file, reason in decoded[split].skipped]
        found, dataset.splits[split] = dataset.classes(split), decoded[split].pictures
        if split != "test" and (lost := _without(found, dataset.classes(split))):
            raise DataError(f"no picture of class {lost} in split {split!r} can be read")
    return decoded


def one_of_each(decoded: Decoded, labels: Labels, count: int) -> tuple[list[np.ndarray], list[str]]:
    """The first picture (h, w, 3) of each of the first `count` classes, with the class names."""
    first = {picture.label: row for row, picture in reversed(list(enumerate(decoded.pictures)))}
    named = dict(zip(labels.folders, labels.names, strict=True))
    folders = [folder for folder in labels.folders if folder in first][:count]
    images = [decoded.pixels[first[folder]].permute(1, 2, 0).numpy() for folder in folders]
    return images, [named[folder] for folder in folders]


def _natural(text: str) -> str:
    """A sort key in which numbers have their value and come before letters: 2, 10, a2, a10; 07 and 7 differ too."""
    number = re.compile(r"\d+")  # written with its length first; no file name has a \0
    return number.sub(lambda found: f"\0{chr(len(str(int(found[0]))))}{int(found[0])}", text) + f"\0\0{text}"


def _without(folders: Iterable[str], others: Iterable[str]) -> str:
    """The first five of `folders` that are not among `others`, as text ('' for none)."""
    left = [folder for folder in folders if folder not in others]
    return ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
