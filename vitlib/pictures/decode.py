"""From a file to an upright RGB picture, or the reason why there is none; many files in threads.

Cameras, phones and scrapers leave odd files: 16-bit grey, CMYK, transparency, EXIF rotation, cut-off downloads, text
named .jpg, FIFOs. Each is read as a viewer would show it, or skipped with its reason in a record.
"""

from __future__ import annotations

import hashlib
import stat
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, BinaryIO

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
BITS, PHOTOMETRIC, SAMPLE_FORMAT, MOST = 258, 262, 339, (281, 341)  # TIFF tags; MOST holds the largest value
DEPTHS = [2**bits - 1 for bits in range(8, 33)]  # a largest value that is none of these may be that of the picture
LONGEST = 65_535  # pixels on a side, as in JPEG
BYTES = 8  # a pixel that decoding may take at most in a picture of `max_megapixels`; simpler ones take 4
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


class Memory:
    """Bytes that the pictures in work take, of all threads together: one that does not fit waits for others to end."""

    def __init__(self, size: int) -> None:
        self.size = self.free = size
        self._changed, self._thread = threading.Condition(), threading.local()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """What this thread takes in the context is free again at its end. Outside of one, nobody waits."""
        self._thread.taken = 0
        try:
            yield
        finally:
            with self._changed:
                self.free += vars(self._thread).pop("taken")
                self._changed.notify_all()

    def take(self, count: int) -> None:
        """Wait for `count` bytes, or for all of them if it is more."""
        if getattr(self._thread, "taken", None) == 0:  # a thread that waits again for more could wait forever
            count = min(count, self.size)
            with self._changed:
                self._changed.wait_for(lambda: self.free >= count)
                self.free -= count
            self._thread.taken = count


MEMORY = Memory(400_000_000)
Image.core.set_block_size(2**26)  # of what Pillow asks for; glibc keeps smaller blocks for their thread when freed


def open_picture(file: Path | BinaryIO, max_megapixels: float) -> Image.Image:
    """The picture in a file, on disk or in memory, as an upright RGB image. BadPicture where that is impossible."""
    with _opened(file, max_megapixels) as image:
        each, most = _bytes(image), BYTES * max_megapixels * 1e6
        if each * image.width * image.height > most:
            raise BadPicture(f"takes {each:g} bytes a pixel to decode, and so more than {most / 1e6:,g} MB")
        MEMORY.take(int(each * image.width * image.height))
        image.load()  # here, so that damaged pixels are not taken for damaged tags
        turn, shown = _turn(image), _in_8_bits(image)
        if shown is not image:
            image.close()  # its pixels are not needed while others are made
        shown = shown if turn is None else shown.transpose(turn)
        return shown if shown.mode == "RGB" else shown.convert("RGB")


def _bytes(image: Image.Image) -> float:
    """Bytes a pixel that it takes at most to decode a file and to make it upright RGB, which Pillow keeps in four."""
    if image.format == "WEBP":  # its decoder keeps two RGBA pictures, and hands over a third
        return 16
    inside = 0.0  # of the decoder, beside the picture
    if image.format in ("JPEG", "MPO") and image.info.get("progressive"):  # coefficients of 2 bytes
        areas = [across * down for _, across, down, _ in image.layer]
        inside = 2 * sum(areas) / max(areas)
    elif image.format == "TIFF" and image.info.get("compression") != "raw":  # a strip may be the whole picture
        inside = sum(image.tag_v2.get(BITS, (1,))) / 8
    known = image.format in ("JPEG", "MPO") and image.mode == "RGB" and _turn(image) is None
    return max(4 + inside, 4 if known else BYTES)  # a second picture where it is turned or converted


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
            if max(image.size) > LONGEST:  # resizing goes through a picture as wide as the new and as high as the old
                raise BadPicture(f"{image.width} × {image.height} pixels are more than {LONGEST:,} on a side")
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


def _turn(image: Image.Image) -> Transpose | None:
    """How to turn the picture upright by its EXIF orientation; None where it is so, or where its tags are damaged.

    `ImageOps.exif_transpose` also rewrites the tags, which fails for pictures that are fine except for some tag.
    """
    try:
        return UPRIGHT.get(image.getexif().get(ORIENTATION))
    except DAMAGED:
        return None


def _in_8_bits(image: Image.Image) -> Image.Image:
    """L or RGB as a viewer shows it: transparency becomes white, more than 8 bits are scaled (Pillow would clip them).

    BadPicture where the file does not say what is white, and a guess could make it black.
    """
    tags = image.tag_v2 if image.format == "TIFF" else {}
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _grey(image, tags)
    bits, kind = tags.get(BITS, (8,)), tags.get(SAMPLE_FORMAT, (1,))
    if kind[0] == 2:
        raise BadPicture("values of 8 bits with a sign")
    if bits[0] == 16 and len(bits) > 2:  # Pillow keeps the upper 8 bits of each
        colours = image.getextrema()[: 3 if image.mode == "RGBA" else None]
        if max(high for _, high in colours) < 16:
            raise BadPicture("16 bits of which the upper four are not used: rescale it, or save it with 8 bits")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        return _by_bands(image, "RGB", _on_white)
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _on_white(band: Image.Image) -> Image.Image:
    layer = band.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The picture in bands of at most a quarter of a megapixel or a row, each with its first row."""
    rows = max(1, 2**18 // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _by_bands(image: Image.Image, mode: str, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """The picture of another mode that `convert` makes, with only a band of it in work at a time."""
    made = Image.new(mode, image.size)
    for top, band in _bands(image):
        made.paste(convert(band), (0, top))
    return made


def _grey(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """8-bit grey of a picture with one value of more than 8 bits a pixel, scaled by its format and not by its values.

    A dark picture stays dark; but a format of which less than a sixteenth is used is more likely misread.
    """
    bits, kind = tags.get(BITS, (16,))[0], tags.get(SAMPLE_FORMAT, (1,))[0]

    def values(band: Image.Image) -> np.ndarray:  # Pillow reads 32 bits without a sign as if they had one
        return np.asarray(band).view(np.uint32) if (bits, kind) == (32, 1) else np.asarray(band)

    ends = np.array([(part.min(), part.max()) for part in (values(band) for _, band in _bands(image))], dtype=float)
    low, high = ends[:, 0].min(), ends[:, 1].max()
    top = 2 ** (bits - (kind == 2)) - 1
    said = next((np.max(tags[tag]) for tag in MOST if tag in tags), 0)
    sure = image.format != "TIFF" or bits == 12 or (said in DEPTHS and high <= said)
    ranges = (1, 255, 65535) if kind == 3 else (255, 65535, top) if bits == 32 else (top,)
    limit = 1.1 if kind == 3 else 1.0  # resampling leaves values of 1.02
    white = said if said in DEPTHS and sure else next((one for one in ranges if high <= limit * one), 0)
    if not (white and low >= -0.1 * white and (sure or not 0 < high < white / 16)):  # also where one is no number
        raise BadPicture(f"{bits} bits with values of {low:,g} … {high:,g}, and it does not say which of them is white")

    def scaled(band: Image.Image) -> Image.Image:
        grey = values(band) * (255 / white)
        grey = 255 - grey if tags.get(PHOTOMETRIC) == 0 else grey
        return Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))

    return _by_bands(image, "L", scaled)


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
        with MEMORY.shared():
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
