"""Pictures from any source behind one interface: splits, labels, and what was wrong with them. Level 1.

A source gives `Dataset`: per split a list of `Picture` with its class folder's name, and the display name of each
class. Integer class ids never come from here once a checkpoint exists: `Labels` maps folder names to the ids that
the checkpoint was trained with.
"""

import hashlib
import io
import json
import re
import stat
import struct
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm import tqdm

from vitlib import files, synthetic
from vitlib.params import Parameters
from vitlib.preprocess import Preprocess

# Decoders that are opened at all: the formats people photograph in. Others (EPS runs a program, for one) are refused.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # JPEG reads MPO too: phones store two JPEGs in one file
SPLITS = {"train": ("train",), "valid": ("valid", "validation", "val"), "test": ("test",)}
# What Pillow raises for damaged files, beside its own UnidentifiedImageError (an OSError).
DAMAGED = (
    *(OSError, ValueError, SyntaxError, MemoryError, TypeError, EOFError, ArithmeticError, LookupError),
    *(struct.error, zlib.error, AttributeError, NotImplementedError),
)
ORIENTATION = 0x0112  # EXIF tag; UPRIGHT is what undoes each of its values
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
NEAR_DUPLICATE = 0.998  # correlation of 16 × 16 grey thumbnails; below it different pictures of one plant appear


class DataError(ValueError):
    """A data set that cannot be used; the message says what to do."""


class BadPicture(ValueError):
    """A file that is skipped; the message is the reason."""


@dataclass(frozen=True)
class Picture:
    """One picture: `file` names it in records, `label` is its class folder (None: unlabelled), `open()` decodes it.

    `jpeg()` gives the bytes for another decoder, or none and the reason; None where there is no file to read.
    """

    file: str
    label: str | None
    open: Callable[[], Image.Image] = field(repr=False, compare=False)
    jpeg: Callable[[], tuple[bytes, str]] | None = field(default=None, repr=False, compare=False)


@dataclass
class Dataset:
    """Splits of pictures, display names by class, and what was skipped (file, split, reason)."""

    splits: dict[str, list[Picture]]
    names: dict[str, str]
    skipped: list[tuple[str, str, str]] = field(default_factory=list)

    def classes(self) -> list[str]:
        """Class folders of the training split, in natural order ('2' before '10')."""
        return sorted({picture.label for picture in self.splits["train"] if picture.label}, key=_natural)

    def summary(self) -> pd.DataFrame:
        """A row a split: pictures, classes, fewest and most pictures of a class, unlabelled and skipped ones."""
        rows = []
        for split, pictures in self.splits.items():
            counts = pd.Series([p.label for p in pictures if p.label is not None], dtype=object).value_counts()
            skipped = sum(where == split for _, where, _ in self.skipped)
            rows.append(
                {
                    "split": split,
                    "pictures": len(pictures),
                    "classes": len(counts),
                    "fewest of a class": int(counts.min()) if len(counts) else 0,
                    "most of a class": int(counts.max()) if len(counts) else 0,
                    "unlabelled": sum(p.label is None for p in pictures),
                    "skipped": skipped,
                }
            )
        return pd.DataFrame(rows).set_index("split")

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
        known = {folder: number for number, folder in enumerate(self.folders)}
        ids = []
        for picture in pictures:
            if picture.label is not None and picture.label not in known:
                raise DataError(f"{picture.file}: the checkpoint knows no class {picture.label!r}")
            ids.append(-1 if picture.label is None else known[picture.label])
        return torch.tensor(ids, dtype=torch.int64)

    def check(self, dataset: Dataset, split: str) -> None:
        """DataError unless `split` holds a picture of every class that the checkpoint knows, and no other class."""
        found = {picture.label for picture in dataset.splits[split] if picture.label is not None}
        if missing := [folder for folder in self.folders if folder not in found]:
            raise DataError(
                f"split {split!r} has pictures of {len(found)} classes, the checkpoint knows {len(self.folders)}; "
                f"missing: {_some(missing)}. Accuracy over a part of the classes is another number: complete the "
                "data, or fine-tune on these classes first."
            )
        if extra := sorted(found - set(self.folders), key=_natural):
            raise DataError(f"split {split!r} has classes that the checkpoint does not know: {_some(extra)}")


def load(settings: Parameters) -> Dataset:
    """The data set that `settings.data_source` names, checked and cut to `settings.limit`."""
    kind, _, rest = settings.data_source.partition(":")
    if settings.data_source == "synthetic":
        dataset = from_synthetic(synthetic.TARGET_CLASSES, settings)
    elif kind == "hub":
        dataset = from_hub(rest, settings.max_megapixels)
    elif kind == "torchvision":
        dataset = from_torchvision(rest, settings.max_megapixels)
    else:
        dataset = from_folder(files.resolve(settings.data_source), settings.max_megapixels)
    check(dataset)
    for split, pictures in dataset.splits.items():
        dataset.splits[split] = evenly(pictures, settings.limit)
    return dataset


def check(dataset: Dataset) -> None:
    """DataError for a missing split, and where training and validation do not have the same classes."""
    for split in ("train", "valid"):
        if not dataset.splits.get(split):
            raise DataError(
                f"there is no split {split!r} with labelled pictures: make folders train/<class>/ and valid/<class>/"
            )
    found = {
        split: {picture.label for picture in pictures if picture.label is not None}
        for split, pictures in dataset.splits.items()
    }
    for split in ("valid", "test"):
        if unknown := sorted(found.get(split, set()) - found["train"], key=_natural):
            raise DataError(f"split {split!r} has classes without training pictures: {_some(unknown)}")
    if missing := sorted(found["train"] - found["valid"], key=_natural):  # said now, not after hours of training
        raise DataError(
            f"split 'valid' has no picture of {_some(missing)}, which 'train' has: move some pictures of each class "
            "there, or remove the class from 'train'"
        )


def evenly(pictures: list[Picture], limit: int) -> list[Picture]:
    """At most `limit` pictures (0: all), one of each class in turn, in the given order within a class."""
    if not limit or len(pictures) <= limit:
        return pictures
    by_class = defaultdict(list)
    for position, picture in enumerate(pictures):
        by_class[picture.label].append(position)
    turns = sorted((turn, position) for group in by_class.values() for turn, position in enumerate(group))
    return [pictures[position] for position in sorted(position for _, position in turns[:limit])]


def from_synthetic(flowers: tuple, settings: Parameters) -> Dataset:
    """Flower pictures drawn when they are opened; valid and test hold half as many of a class as train."""
    counts = {"train": settings.pictures_per_class}
    counts["valid"] = counts["test"] = settings.pictures_per_class // 2
    splits = {
        split: [
            Picture(f"{split}/{flower.key}/{index:04d}", flower.key, partial(_draw, flower, index, split, settings))
            for flower in flowers
            for index in range(count)
        ]
        for split, count in counts.items()
    }
    return Dataset(splits, {flower.key: flower.name for flower in flowers})


def _draw(flower: synthetic.FlowerClass, index: int, split: str, settings: Parameters) -> Image.Image:
    size = settings.image_size
    return Image.fromarray(synthetic.render(flower, index=index, split=split, seed=settings.seed, size=size))


def from_folder(folder: Path, max_megapixels: float) -> Dataset:
    """The class-folder layout: train/<class>/, valid/<class>/, test/ flat or in classes, cat_to_name.json beside."""
    if not folder.is_dir():
        raise DataError(
            f"there is no data folder {str(folder)!r} (looked from the project's root): put or link the pictures "
            "there as train/<class>/ and valid/<class>/, or set `data_source: synthetic`"
        )
    splits, skipped = {}, []
    for split, spellings in SPLITS.items():
        found = next((folder / name for name in spellings if (folder / name).is_dir()), None)
        if found is not None:
            splits[split] = list(_walk(found, folder, split, skipped, max_megapixels))
    return Dataset(splits, _read_names(folder), skipped)


def _walk(root: Path, folder: Path, split: str, skipped: list, max_megapixels: float) -> Iterable[Picture]:
    for entry in sorted(root.iterdir(), key=lambda path: _natural(path.name)):
        if not entry.is_dir() or entry.name.startswith("."):  # .ipynb_checkpoints is no class
            if reason := not_a_picture(entry):
                skipped.append((shown(entry, folder), split, reason))
            elif split == "test":
                yield picture_of(entry, folder, None, max_megapixels)
            else:
                skipped.append((shown(entry, folder), split, "not in a class folder"))
            continue
        usable = 0
        for file in sorted(entry.iterdir(), key=lambda path: _natural(path.name)):
            if reason := not_a_picture(file):
                skipped.append((shown(file, folder), split, reason))
            else:
                usable += 1
                yield picture_of(file, folder, entry.name, max_megapixels)
        if not usable:
            raise DataError(
                f"the class folder {entry.relative_to(folder)} holds no picture: add pictures or remove the folder "
                "(and the class from the other splits)"
            )


def shown(path: Path, root: Path) -> str:
    """A path below `root` as records name it; bytes that are no Unicode text are escaped."""
    return path.relative_to(root).as_posix().encode("utf-8", "backslashreplace").decode("utf-8")


def picture_of(file: Path, root: Path, label: str | None, max_megapixels: float) -> Picture:
    """A picture in a file, named by its path below `root`."""
    opening = (partial(function, file, max_megapixels) for function in (open_picture, plain_jpeg))
    return Picture(shown(file, root), label, *opening)


def not_a_picture(path: Path) -> str:
    """Why a path is not worth opening ('' if it is): folders, hidden files, FIFOs and devices, empty files."""
    try:
        status = path.stat()
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if path.name.startswith(".") or path.name in ("Thumbs.db", "desktop.ini"):
        return "hidden file of the system"
    if stat.S_ISDIR(status.st_mode):
        return "a folder inside a class folder"
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"
    return "" if status.st_size else "empty file"


def open_picture(path: Path, max_megapixels: float) -> Image.Image:
    """The picture as an upright RGB image. BadPicture with the reason where that cannot be had."""
    if reason := not_a_picture(path):
        raise BadPicture(reason)
    return _decode(path, max_megapixels)


def _decode(file: Path | BinaryIO, max_megapixels: float) -> Image.Image:
    try:
        with Image.open(file, formats=FORMATS) as image:
            # Compressed size says nothing: a 12 KB PNG can take half a gigabyte. The header tells before decoding.
            if image.width * image.height > max_megapixels * 1e6:
                raise BadPicture(f"{image.width} × {image.height} pixels are more than {max_megapixels:g} megapixels")
            if min(image.size) < 2:
                raise BadPicture(f"{image.width} × {image.height} pixels are too small")
            return to_rgb(_upright(image))
    except BadPicture:
        raise
    except Image.UnidentifiedImageError:
        raise BadPicture("not a picture in a known format") from None
    except PermissionError as error:
        raise BadPicture(f"cannot be read: {error.strerror}") from None
    except Image.DecompressionBombError as error:
        raise BadPicture(f"too large: {error}") from None
    except DAMAGED as error:
        raise BadPicture(f"damaged: {files.first_line(error)}") from error


def plain_jpeg(path: Path, max_megapixels: float) -> tuple[bytes, str]:
    """The bytes of a JPEG file and '', or b'' and why only `open_picture` may read it (or say what is wrong).

    Plain is what every decoder shows alike but for rounding: complete, RGB stored as YCbCr, upright, one picture, not
    over the limits.
    """
    if reason := not_a_picture(path):
        return b"", reason
    try:
        if path.stat().st_size > 3e6 * max_megapixels:  # more bytes than pixels take uncompressed
            return b"", "a file larger than its picture may be"
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
            reason = _odd_jpeg(image, max_megapixels)
    except Image.UnidentifiedImageError:
        return b"", "not a JPEG picture"
    except (*DAMAGED, Image.DecompressionBombError):
        return b"", "a header that cannot be read"
    if not reason and b"\xff\xd9" not in content[-1024:]:  # some cameras append a few bytes
        reason = "no end of the picture"
    return (b"", reason) if reason else (content, "")


def _odd_jpeg(image: Image.Image, max_megapixels: float) -> str:
    if image.format != "JPEG":
        return f"{image.format} (several pictures in one file)"
    if image.mode != "RGB" or image.info.get("adobe_transform") == 0:
        return f"colours stored as {image.mode}"
    if image.getexif().get(ORIENTATION, 1) != 1:
        return "turned by its EXIF orientation"
    if image.width * image.height > max_megapixels * 1e6 or min(image.size) < 2:
        return "too many or too few pixels"
    return ""


def _upright(image: Image.Image) -> Image.Image:
    """The picture as its EXIF orientation says, or as it is stored where those tags are damaged.

    `ImageOps.exif_transpose` also writes the tags anew, which fails for pictures that are fine but for some tag.
    """
    image.load()  # here, so that damaged pixels are not taken for damaged tags
    try:
        step = UPRIGHT.get(image.getexif().get(ORIENTATION))
    except DAMAGED:
        return image
    return image if step is None else image.transpose(step)


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB as a viewer shows it: 16-bit grey is scaled (PIL would clip it to white), transparency lies on white."""
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N", "I", "F"):
        values = np.asarray(image, dtype=np.float64)
        if image.mode.startswith("I;16"):
            scale = 255 / 65535  # by the format, not by the values: a dark picture stays dark
        else:
            scale = 255.0 if image.mode == "F" and values.max() <= 1 else 255 / 65535 if values.max() > 255 else 1.0
        return Image.fromarray((values * scale).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


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
    names = features[label].names
    splits = {}
    for split, spellings in SPLITS.items():
        if (key := next((key for key in spellings if key in loaded), None)) is not None:
            table = loaded[key].cast_column(image, datasets.Image(decode=False))  # opened here, with our limits
            splits[split] = [
                Picture(
                    f"{split}/{row:06d}",
                    None if number is None or number < 0 else names[number],  # −1: unlabelled, by the Hub's custom
                    partial(_open_row, table, row, image, max_megapixels),
                )
                for row, number in enumerate(table[label])
            ]
    return Dataset(splits, {key: key.replace("_", " ") for key in names})


def _open_row(table: object, row: int, column: str, max_megapixels: float) -> Image.Image:
    cell = table[row][column]
    if not cell:
        raise BadPicture("no picture in this row")
    return _decode(io.BytesIO(cell["bytes"]) if cell["bytes"] else Path(cell["path"]), max_megapixels)


def from_torchvision(folder: str, max_megapixels: float) -> Dataset:
    """torchvision's Flowers102 (official splits, downloaded to `folder`); classes '1'…'102' as in the class folders."""
    try:
        from torchvision.datasets import Flowers102
    except (ImportError, RuntimeError) as error:  # beside a CPU-only torch its import fails at run time
        raise DataError(
            f"`data_source: torchvision:…` needs a working torchvision ({files.first_line(error)}): use class folders"
        ) from None
    splits = {}
    for split, theirs in (("train", "train"), ("valid", "val"), ("test", "test")):
        table = Flowers102(files.resolve(folder or "data"), split=theirs, download=True)
        pairs = zip(table._image_files, table._labels, strict=True)
        splits[split] = [
            Picture(f"{split}/{Path(file).name}", str(number + 1), partial(open_picture, Path(file), max_megapixels))
            for file, number in pairs
        ]
    return Dataset(splits, {str(number + 1): name for number, name in enumerate(Flowers102.classes)})


def _read_names(folder: Path) -> dict[str, str]:
    for candidate in (folder / "cat_to_name.json", folder.parent / "cat_to_name.json"):
        if candidate.is_file():
            try:
                names = json.loads(candidate.read_text(encoding="utf-8"))
            except (ValueError, UnicodeDecodeError) as error:
                raise DataError(f"{candidate.name} is not JSON: {error}") from None
            if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
                raise DataError(f'{candidate.name} must map class folders to names: {{"1": "pink primrose"}}')
            return names
    return {}


def new_labels(dataset: Dataset) -> Labels:
    """Labels for a new head: ids in natural order of the class folders; kept from then on by the checkpoint."""
    folders = dataset.classes()
    return Labels(tuple(folders), tuple(dataset.names.get(folder, folder) for folder in folders))


@dataclass
class Decoded:
    """Pictures that could be read (uint8 (n, 3, h, w), one a row of `pictures`) and those that could not."""

    pixels: torch.Tensor
    pictures: list[Picture]
    skipped: list[tuple[str, str]]


def read_picture(picture: Picture, preprocess: Preprocess, row: torch.Tensor) -> str:
    """Decode and resize one picture into `row` (uint8 (3, h, w)); the reason where it cannot be read, else ''."""
    try:
        row.copy_(preprocess.resize(picture.open()))
    except BadPicture as error:
        return str(error)
    except Exception as error:
        error.add_note(f"while reading the picture {picture.file}")
        raise
    return ""


Read = Callable[[Picture, torch.Tensor], object]


def read_batches(
    pictures: list[Picture], read: Read, buffers: Sequence[torch.Tensor], workers: int, together: int = 1
) -> Iterator[tuple[list[Picture], torch.Tensor, list]]:
    """Batches in order: their pictures, their buffer, and what `read(picture, row of the buffer)` gave, from threads.

    A batch has as many pictures as a buffer has rows, the last one may have fewer. Threads work ahead as far as there
    are buffers: these are used in turn, and whoever asks for the next batch still has the last one and gives the one
    before it back. So there must be two, or one for each batch. `together` pictures are one task for a thread: more
    where reading one takes less time than handing it over.
    """
    size = len(buffers[0])
    groups = [pictures[start : start + size] for start in range(0, len(pictures), size)]
    if len(groups) > len(buffers) < 2:
        raise ValueError("more than one batch needs at least two buffers: one is read while the other is used")
    pool, waiting, submitted = ThreadPoolExecutor(workers), deque(), 0
    try:
        for number, group in enumerate(groups):
            while submitted < min(len(groups), len(buffers) + max(0, number - 1)):
                rows = list(zip(groups[submitted], buffers[submitted % len(buffers)], strict=False))
                tasks = [rows[start : start + together] for start in range(0, len(rows), together)]
                waiting.append([pool.submit(lambda task: [read(*one) for one in task], task) for task in tasks])
                submitted += 1
            results = [result for future in waiting.popleft() for result in future.result()]
            yield group, buffers[number % len(buffers)][: len(group)], results
    finally:
        pool.shutdown(cancel_futures=True)


def decode(pictures: list[Picture], preprocess: Preprocess, *, workers: int = 2, what: str = "pictures") -> Decoded:
    """Read and resize every picture in threads, in order, with a progress bar; unreadable ones are named, not lost."""
    pixels = torch.empty(len(pictures), 3, *preprocess.side, dtype=torch.uint8)

    def read(picture: Picture, row: torch.Tensor) -> str:
        return read_picture(picture, preprocess, row)

    batches = read_batches(pictures, read, pixels.split(1), workers)
    bar = tqdm(batches, f"decoding {what}", len(pictures), unit="img")
    reasons = [reason for _, _, results in bar for reason in results]
    good = [position for position, reason in enumerate(reasons) if not reason]
    if len(good) < len(pictures):
        pixels = pixels[good]
    skipped = [(pictures[i].file, reason) for i, reason in enumerate(reasons) if reason]
    return Decoded(pixels, [pictures[i] for i in good], skipped)


def decode_splits(dataset: Dataset, splits: Iterable[str], preprocess: Preprocess, workers: int) -> dict[str, Decoded]:
    """`decode` each split; what cannot be read joins `dataset.skipped`.

    DataError when a class loses every picture; not in the test split, from which nothing is learnt or chosen.
    """
    decoded = {}
    for split in splits:
        decoded[split] = decode(dataset.splits[split], preprocess, workers=workers, what=split)
        dataset.skipped += [(file, split, reason) for file, reason in decoded[split].skipped]
        lost = {p.label for p in dataset.splits[split]} - {p.label for p in decoded[split].pictures}
        if split != "test" and (lost := sorted(lost - {None}, key=_natural)):
            raise DataError(f"no picture of class {_some(lost)} in split {split!r} can be read")
        dataset.splits[split] = decoded[split].pictures
    return decoded


def one_of_each(decoded: Decoded, labels: Labels, count: int) -> tuple[list[np.ndarray], list[str]]:
    """The first picture (h, w, 3) of each of the first `count` classes, with the class names."""
    first = {picture.label: row for row, picture in reversed(list(enumerate(decoded.pictures)))}
    shown = [
        (first[folder], name) for folder, name in zip(labels.folders, labels.names, strict=True) if folder in first
    ]
    return [decoded.pixels[row].permute(1, 2, 0).numpy() for row, _ in shown[:count]], [n for _, n in shown[:count]]


def duplicates(decoded: dict[str, Decoded]) -> pd.DataFrame:
    """Pairs of pictures that stand in two splits: file, other_file, correlation, kind (exact or near).

    Exact: the same pixels after resizing. Near: 16 × 16 grey thumbnails that correlate over `NEAR_DUPLICATE`,
    which finds re-encoded and rescaled copies, not two photographs of one flower.
    """
    rows = []
    names = list(decoded)
    thumbnails = {split: _thumbnails(decoded[split].pixels) for split in names}
    digests = {split: [hashlib.sha256(p.numpy().tobytes()).digest() for p in decoded[split].pixels] for split in names}
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            likeness = thumbnails[second] @ thumbnails[first].T
            for row, column in (likeness > NEAR_DUPLICATE).nonzero().tolist():
                same = digests[second][row] == digests[first][column]
                both = (decoded[second].pictures[row].file, decoded[first].pictures[column].file)
                rows.append((*both, round(likeness[row, column].item(), 4), "exact" if same else "near"))
    return pd.DataFrame(rows, columns=["file", "other_file", "correlation", "kind"])


def _thumbnails(pixels: torch.Tensor) -> torch.Tensor:
    if not len(pixels):
        return torch.empty(0, 256)
    rows = []
    for chunk in pixels.split(512):
        grey = chunk.to(torch.float32).mean(dim=1, keepdim=True)
        small = torch.nn.functional.interpolate(grey, size=(16, 16), mode="area").flatten(1)
        rows.append(torch.nn.functional.normalize(small - small.mean(dim=1, keepdim=True), dim=1))
    return torch.cat(rows)


def _natural(text: str) -> list:
    parts = [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]
    return [*parts, (-1, 0, text)]  # '07' and '7' have an order too


def _some(items: list[str]) -> str:
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")
