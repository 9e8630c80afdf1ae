"""From a file to an upright RGB picture, or the reason why there is none; many files in threads.

Cameras, phones and scrapers leave odd files: 16-bit grey, CMYK, transparency, EXIF rotation, cut-off downloads, text
named .jpg, FIFOs. Each is read as a viewer would show it, or skipped with its reason in a record.
"""

from __future__ import annotations

import hashlib
import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd
import torch
from PIL import Image
from PIL.Image import Transpose
from tqdm import tqdm

from vitlib.pictures.preprocess import Preprocess
from vitlib.study import files

# The formats that people photograph in. Others are refused: EPS, for one, runs a program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # JPEG reads MPO too: phones store two JPEGs in one file
# What Pillow raises for damaged files, beside its own UnidentifiedImageError (an OSError).
DAMAGED = (
    *(OSError, ValueError, SyntaxError, MemoryError, TypeError, EOFError, ArithmeticError, LookupError),
    *(struct.error, zlib.error, AttributeError, NotImplementedError),
)
ORIENTATION = 0x0112  # EXIF tag; UPRIGHT undoes each of its values
UPRIGHT = {
    **{2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE},
    **{6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90},
}
NEAR_DUPLICATE = 0.998  # correlation of 16 × 16 grey thumbnails; below it different pictures of one plant appear


class BadPicture(ValueError):
    """A file that is skipped; the message is the reason."""


@dataclass(frozen=True)
class Picture:
    """One picture: `file` names it in records, `label` is its class folder (None: unlabelled), `open()` decodes it.

    `jpeg()` gives the bytes for another decoder; None where there is no file to read. Both raise BadPicture.
    """

    file: str
    label: str | None
    open: Callable[[], Image.Image] = field(repr=False, compare=False)
    jpeg: Callable[[], bytes] | None = field(default=None, repr=False, compare=False)


def not_a_picture(path: Path) -> str:
    """Why a path is not worth opening ('' if it is): folders, hidden files, FIFOs and devices, empty files."""
    try:
        status = path.stat()
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if path.name.startswith(".") or path.name in ("Thumbs.db", "desktop.ini"):
        return "hidden file of the system"
    if stat.S_ISDIR(status.st_mode):
        return "a folder"
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"
    return "" if status.st_size else "empty file"


def open_picture(file: Path | BinaryIO, max_megapixels: float) -> Image.Image:
    """The picture in a file, on disk or in memory, as an upright RGB image. BadPicture where that is impossible."""
    with _opened(file, max_megapixels) as image:
        return to_rgb(_upright(image))


@contextmanager
def _opened(file: Path | BinaryIO, max_megapixels: float) -> Iterator[Image.Image]:
    """A file whose header is acceptable; whatever Pillow raises for it in the context becomes BadPicture."""
    if isinstance(file, Path) and (reason := not_a_picture(file)):
        raise BadPicture(reason)
    try:
        with Image.open(file, formats=FORMATS) as image:
            # The size of the file says nothing: a 12 KB PNG can take half a gigabyte.
            if image.width * image.height > max_megapixels * 1e6:
                raise BadPicture(f"{image.width} × {image.height} pixels are more than {max_megapixels:g} megapixels")
            if min(image.size) < 2:
                raise BadPicture(f"{image.width} × {image.height} pixels are too small")
            yield image
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


def _upright(image: Image.Image) -> Image.Image:
    """The picture as its EXIF orientation says, or as it is stored where those tags are damaged.

    `ImageOps.exif_transpose` also rewrites the tags, which fails for pictures that are fine except for some tag.
    """
    image.load()  # here, so that damaged pixels are not taken for damaged tags
    try:
        step = UPRIGHT.get(image.getexif().get(ORIENTATION))
    except DAMAGED:
        return image
    return image if step is None else image.transpose(step)


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB as a viewer shows it: 16-bit grey is scaled (PIL would clip it to white), transparency becomes white."""
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


def plain_jpeg(path: Path, max_megapixels: float) -> bytes:
    """The content of a JPEG file on which decoders differ by rounding only. BadPicture with the reason for others.

    It is one complete, upright picture with RGB stored as YCbCr.
    """
    with _opened(path, max_megapixels) as image:
        if image.format != "JPEG":  # MPO holds several pictures
            raise BadPicture(f"stored as {image.format}")
        if image.mode != "RGB" or image.info.get("adobe_transform") == 0:
            raise BadPicture(f"colours stored as {image.mode}")
        if image.getexif().get(ORIENTATION, 1) != 1:
            raise BadPicture("turned by its EXIF orientation")
        if path.stat().st_size > 3e6 * max_megapixels:
            raise BadPicture("a file larger than its pixels may be")
        content = path.read_bytes()
        if b"\xff\xd9" not in content[-1024:]:  # some cameras append a few bytes
            raise BadPicture("no end of the picture")
        return content


@dataclass
class Decoded:
    """Pictures that could be read (uint8 (n, 3, h, w), one row for each of `pictures`) and those that could not."""

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


def decode(pictures: list[Picture], preprocess: Preprocess, *, workers: int = 2, what: str = "pictures") -> Decoded:
    """Read and resize every picture in threads, in order, with a progress bar; unreadable ones are in `skipped`."""
    pixels = torch.empty(len(pictures), 3, *preprocess.side, dtype=torch.uint8)
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(lambda picture, row: read_picture(picture, preprocess, row), pictures, pixels)
        reasons = list(tqdm(results, f"decoding {what}", len(pictures), unit="img"))
    skipped = [(picture.file, reason) for picture, reason in zip(pictures, reasons, strict=True) if reason]
    if not skipped:
        return Decoded(pixels, list(pictures), skipped)
    good = [position for position, reason in enumerate(reasons) if not reason]
    return Decoded(pixels[good], [pictures[position] for position in good], skipped)


def checksum(decoded: Decoded) -> str:
    """sha256 of the decoded pictures with their names and labels."""
    digest = hashlib.sha256(decoded.pixels.numpy().tobytes())
    for picture in decoded.pictures:
        digest.update(f"{picture.file}\0{picture.label}\n".encode())
    return digest.hexdigest()


def duplicates(decoded: dict[str, Decoded]) -> pd.DataFrame:
    """Pairs of pictures that appear in two splits: file, other_file, correlation, kind (exact or near).

    Exact: the same pixels after resizing. Near: 16 × 16 grey thumbnails that correlate over `NEAR_DUPLICATE`, which
    finds re-encoded and rescaled copies, not two photographs of one flower.
    """
    rows = []
    thumbnails = {split: _thumbnails(part.pixels) for split, part in decoded.items() if part.pictures}
    for first, second in combinations(thumbnails, 2):
        likeness = thumbnails[second] @ thumbnails[first].T
        for row, column in (likeness > NEAR_DUPLICATE).nonzero().tolist():
            kind = "exact" if decoded[second].pixels[row].equal(decoded[first].pixels[column]) else "near"
            both = (decoded[second].pictures[row].file, decoded[first].pictures[column].file)
            rows.append((*both, round(likeness[row, column].item(), 4), kind))
    return pd.DataFrame(rows, columns=["file", "other_file", "correlation", "kind"])


def _thumbnails(pixels: torch.Tensor) -> torch.Tensor:
    """Normalised grey thumbnails (n, 256): their scalar products are correlations."""
    grey = (chunk.to(torch.float32).mean(dim=1, keepdim=True) for chunk in pixels.split(512))
    small = torch.cat([torch.nn.functional.interpolate(one, size=(16, 16), mode="area").flatten(1) for one in grey])
    return torch.nn.functional.normalize(small - small.mean(dim=1, keepdim=True), dim=1)
