"""From a file to an upright RGB picture, or the reason why there is none; many files in threads.

Cameras, phones and scrapers leave odd files: 16-bit grey, CMYK, transparency, EXIF rotation, cut-off downloads, text
named .jpg, FIFOs. Each is read as a viewer would show it, or skipped with its reason in a record.
"""

from __future__ import annotations

import hashlib
import io
import stat
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm import tqdm

from vitlib import files
from vitlib.preprocess import Preprocess

# The formats that people photograph in. Others are refused: EPS, for one, runs a program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # JPEG reads MPO too: phones store two JPEGs in one file
# What Pillow raises for damaged files, beside its own UnidentifiedImageError (an OSError).
DAMAGED = (
    *(OSError, ValueError, SyntaxError, MemoryError, TypeError, EOFError, ArithmeticError, LookupError),
    *(struct.error, zlib.error, AttributeError, NotImplementedError),
)
ORIENTATION = 0x0112  # EXIF tag; UPRIGHT undoes each of its values
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
R = TypeVar("R")


class BadPicture(ValueError):
    """A file that is skipped; the message is the reason."""


@dataclass(frozen=True)
class Picture:
    """One picture: `file` names it in records, `label` is its class folder (None: unlabelled), `open()` decodes it.

    `jpeg()` gives the bytes for another decoder, or b'' and the reason; None where there is no file to read.
    """

    file: str
    label: str | None
    open: Callable[[], Image.Image] = field(repr=False, compare=False)
    jpeg: Callable[[], tuple[bytes, str]] | None = field(default=None, repr=False, compare=False)


# ------------------------------------------------------------------------------------------------------------ one file


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


def open_picture(path: Path, max_megapixels: float) -> Image.Image:
    """The picture as an upright RGB image. BadPicture with the reason where that is impossible."""
    if reason := not_a_picture(path):
        raise BadPicture(reason)
    return decode_file(path, max_megapixels)


def decode_file(file: Path | BinaryIO, max_megapixels: float) -> Image.Image:
    """As `open_picture`, for a path that was checked or for a file in memory."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            # The compressed size says nothing: a 12 KB PNG can take half a gigabyte. The header says it in advance.
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


def plain_jpeg(path: Path, max_megapixels: float) -> tuple[bytes, str]:
    """The bytes of a plain JPEG file and '', or b'' and the reason why only `open_picture` may read it.

    Decoders differ on a plain one by rounding only: it is complete, RGB stored as YCbCr, upright, a single picture, and
    within the limits.
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


# ---------------------------------------------------------------------------------------------------------- many files


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
    good = [position for position, reason in enumerate(reasons) if not reason]
    if len(good) < len(pictures):
        pixels = pixels[good]
    skipped = [(pictures[i].file, reason) for i, reason in enumerate(reasons) if reason]
    return Decoded(pixels, [pictures[i] for i in good], skipped)


def read_batches(
    pictures: list[Picture],
    read: Callable[[Picture, torch.Tensor], R],
    buffers: Sequence[torch.Tensor],
    workers: int,
    together: int = 1,
) -> Iterator[tuple[list[Picture], torch.Tensor, list[R]]]:
    """Batches in order: their pictures, their buffer, and what `read(picture, row of the buffer)` returned in a thread.

    A batch has as many pictures as a buffer has rows; the last one may have fewer. Threads fill every free buffer.
    A buffer is free again when the caller asks for the second batch after its own, so there must be two, or one for
    each batch. `together` pictures are one task: more than 1 where reading takes less time than starting a task.
    """
    size = len(buffers[0])
    groups = deque(pictures[start : start + size] for start in range(0, len(pictures), size))
    if len(groups) > len(buffers) < 2:
        raise ValueError("more than one batch needs at least two buffers: one is read while the other is used")
    free, lent, filling = deque(buffers), deque(), deque()
    pool = ThreadPoolExecutor(workers)
    try:
        while groups or filling:
            while groups and free:
                group, buffer = groups.popleft(), free.popleft()
                rows = list(zip(group, buffer, strict=False))
                tasks = [rows[start : start + together] for start in range(0, len(rows), together)]
                futures = [pool.submit(lambda task: [read(*one) for one in task], task) for task in tasks]
                filling.append((group, buffer, futures))
            group, buffer, futures = filling.popleft()
            lent.append(buffer)
            yield group, buffer[: len(group)], [result for future in futures for result in future.result()]
            if len(lent) == 2:
                free.append(lent.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def duplicates(decoded: dict[str, Decoded]) -> pd.DataFrame:
    """Pairs of pictures that appear in two splits: file, other_file, correlation, kind (exact or near).

    Exact: the same pixels after resizing. Near: 16 × 16 grey thumbnails that correlate over `NEAR_DUPLICATE`,
    which finds re-encoded and rescaled copies, not two photographs of one flower.
    """
    rows, names = [], list(decoded)
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
    """Normalised grey thumbnails (n, 256): their scalar products are correlations."""
    if not len(pixels):
        return torch.empty(0, 256)
    rows = []
    for chunk in pixels.split(512):
        grey = chunk.to(torch.float32).mean(dim=1, keepdim=True)
        small = torch.nn.functional.interpolate(grey, size=(16, 16), mode="area").flatten(1)
        rows.append(torch.nn.functional.normalize(small - small.mean(dim=1, keepdim=True), dim=1))
    return torch.cat(rows)
