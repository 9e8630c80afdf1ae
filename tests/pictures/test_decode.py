"""Odd files are read as a viewer shows them, or skipped by name with the reason."""

import io
import os
import random
import signal
import struct
import subprocess
import sys
import zlib
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from vitlib.pictures import decode, preprocess, synthetic
from vitlib.pictures.decode import BadPicture, Picture


def save(path: Path, colour: object = "red", *, mode: str = "RGB", size: tuple[int, int] = (8, 8), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)
    return path


def read(path: Path) -> Image.Image:
    return decode.open_picture(path, max_megapixels=1)


def picture_in(file: Path, root: Path) -> Picture:
    return Picture(file.relative_to(root).as_posix(), None, partial(read, file))


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


# Refused


def _text(path):
    path.write_text("404 Not Found")


def _eps(path):
    Image.new("RGB", (8, 8), "red").save(path, "EPS")  # opening it would run a program


def _cut(path):
    Image.new("RGB", (64, 64), "red").save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-40])


def _one_pixel(path):
    Image.new("RGB", (1, 1)).save(path, "PNG")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_text, "not a picture in a known format"),
        (_eps, "not a picture in a known format"),
        (_cut, r"damaged: .*truncated"),
        (_one_pixel, "1 × 1 pixels are too small"),
        (os.mkfifo, "not a regular file"),
    ],
)
def test_what_is_no_picture_is_named_with_its_reason(tmp_path, make, says):
    file = tmp_path / "a.jpg"
    make(file)
    with within(5), pytest.raises(BadPicture, match=says):
        read(file)


def test_a_file_without_permission_is_named_as_such(tmp_path, monkeypatch):
    def forbidden(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Image, "open", forbidden)
    file = tmp_path / "a.jpg"
    file.write_bytes(b"x")
    with pytest.raises(BadPicture, match=r"^cannot be read: Permission denied$"):
        read(file)


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
def test_too_many_pixels_are_refused_from_the_header_and_the_limit_itself_is_allowed(tmp_path, side, says):
    assert read(save(tmp_path / "a.png", size=(1000, 1000))).size == (1000, 1000)
    (tmp_path / "a.png").write_bytes(png_header(side, side))
    with pytest.raises(BadPicture, match=says):
        read(tmp_path / "a.png")


# What a viewer would show


@pytest.mark.parametrize(("level", "shown"), [(0, 0), (200, 1), (32_768, 128), (65_535, 255)])
def test_16_bit_grey_is_scaled_by_its_format(tmp_path, level, shown):
    """A plain convert("RGB") makes everything over 255 white; scaling by the brightest pixel makes dark bright."""
    file = tmp_path / "a.png"
    Image.fromarray(np.full((8, 8), level, dtype=np.uint16)).save(file)
    assert read(file).getpixel((0, 0)) == (shown,) * 3


def tiff(path: Path, values: np.ndarray, tags: dict[int, int] = {}, bits: int = 0) -> Path:  # noqa: B006
    """An uncompressed TIFF of `values` (h, w) or (h, w, 3); `tags` come on top of those that it needs."""
    kind, channels = {"u": 1, "i": 2, "f": 3}[values.dtype.kind], values.shape[2] if values.ndim == 3 else 1
    width, height = values.shape[1], values.shape[0]
    entries = {256: width, 257: height, 258: bits or 8 * values.itemsize, 259: 1, 262: 2 if channels == 3 else 1}
    entries |= {273: 8, 277: channels, 278: height, 279: values.nbytes, 339: kind} | tags
    after = 8 + values.nbytes + 2 + 12 * len(entries) + 4
    arrays = b""
    block = struct.pack("<H", len(entries))
    for tag, value in sorted(entries.items()):
        if channels == 3 and tag in (258, 339):
            block += struct.pack("<HHII", tag, 3, 3, after + len(arrays))
            arrays += struct.pack("<3H", *[value] * 3)
        else:
            block += struct.pack("<HHII", tag, 4, 1, value)
    head = struct.pack("<2sHI", b"II", 42, 8 + values.nbytes)
    path.write_bytes(head + values.tobytes() + block + bytes(4) + arrays)
    return path


RAMP = np.array([[0, 1, 2, 4]] * 4) / 4  # of white
GREYS = [0, 64, 128, 255]


@pytest.mark.parametrize(
    ("values", "tags", "shown"),
    [
        (RAMP.astype("f4"), {}, GREYS),
        ((RAMP * 1.02).astype("f4"), {}, [0, 65, 130, 255]),  # what resampling leaves
        ((RAMP * 255).astype("f4"), {}, GREYS),
        (RAMP.astype("f4"), {262: 0}, [255, 191, 127, 0]),
        ((RAMP * 65535).astype("u2"), {}, GREYS),
        ((RAMP * 65535).astype("u2"), {262: 0}, [255, 191, 127, 0]),
        ((RAMP * 4095).astype("u2"), {281: 4095}, GREYS),
        ((RAMP * 200).astype("u2"), {281: 65535}, [0, 0, 0, 1]),  # a dark picture, and its file says so
        ((RAMP * 32767).astype("i2"), {}, GREYS),
        ((RAMP * 255).astype("i4"), {}, GREYS),
        ((RAMP * 65535).astype("i4"), {}, GREYS),
        ((RAMP * (2**31 - 1)).astype("i4"), {}, GREYS),
        ((RAMP * (2**32 - 1)).astype("u4"), {}, GREYS),
        ((RAMP[..., None].repeat(3, 2) * 65535).astype("u2"), {}, GREYS),
    ],
    ids=lambda value: str(getattr(value, "dtype", value)),
)
def test_more_than_8_bits_are_scaled_by_their_format(tmp_path, values, tags, shown):
    found = np.asarray(read(tiff(tmp_path / "a.tif", values, tags)))
    assert found.shape == (4, 4, 3)
    np.testing.assert_allclose(found, np.broadcast_to(np.array(shown)[:, None], (4, 4, 3)), atol=1)


def test_12_packed_bits_are_read(tmp_path):
    """Two pixels in three bytes, both 0x800 of 0xfff."""
    packed = np.frombuffer(b"\x80\x08\x00" * 8, dtype=np.uint8).reshape(4, 6)
    assert read(tiff(tmp_path / "a.tif", packed, {256: 4}, bits=12)).getpixel((0, 0)) == (128,) * 3


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ((RAMP * 4095).astype("u2"), "16 bits with values of 0 … 4,095, and it does not say which of them is white"),
        ((RAMP[..., None].repeat(3, 2) * 4095).astype("u2"), "16 bits of which the upper four are not used"),
        (np.where(RAMP > 0.3, RAMP, np.nan).astype("f4"), "32 bits with values of nan"),
        (np.where(RAMP > 0.3, RAMP, np.inf).astype("f4"), "32 bits with values of 0.5 … inf"),
        ((RAMP * 5).astype("f4"), "32 bits with values of 0 … 5"),
        ((RAMP - 0.5).astype("f4"), "32 bits with values of -0.5 … 0.5"),
        ((RAMP * 1e6).astype("i4"), "32 bits with values of 0 … 1e"),
        ((RAMP * 127).astype("i1"), "8 bits with a sign"),
    ],
    ids=lambda value: str(getattr(value, "dtype", value)),
)
def test_values_without_a_known_white_are_refused(tmp_path, values, says):
    with pytest.raises(BadPicture, match=says):
        read(tiff(tmp_path / "a.tif", values))


def test_transparency_lies_on_white(tmp_path):
    for suffix, mode, colour in (("png", "RGBA", (0,) * 4), ("png", "LA", (0, 0)), ("webp", "RGBA", (0,) * 4)):
        options = {"lossless": True} if suffix == "webp" else {}
        assert read(save(tmp_path / f"a.{suffix}", colour, mode=mode, **options)).getpixel((0, 0)) == (255, 255, 255)
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


def test_every_orientation_is_undone_as_pillow_undoes_it(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[decode.ORIENTATION] = orientation
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


FORMS = [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("GIF", {})]
FORMS += [("WEBP", {"lossless": True}), ("TIFF", {"compression": "tiff_lzw"})]


@pytest.mark.parametrize(("form", "options"), FORMS, ids=str)
@pytest.mark.filterwarnings("ignore")  # Pillow warns of many oddities that it can read over
def test_mutated_files_are_read_or_skipped_one_row_each(tmp_path, form, options):
    original, chance = encode(form, **options), random.Random(0)
    pictures = []
    for number in range(300):
        file = tmp_path / f"{number:03d}"
        file.write_bytes(mutate(original, chance))
        pictures.append(picture_in(file, tmp_path))
    with within(20):
        decoded = decode.decode(pictures, preprocess.new(8), workers=2)
    rows = [p.file for p in decoded.pictures] + [file for file, _ in decoded.skipped]
    assert sorted(rows) == [p.file for p in pictures]
    assert len(decoded.pictures) == len(decoded.pixels)
    assert 10 < len(decoded.skipped) < 300  # the mutations hurt, and not all of them
    assert all(reason and "\n" not in reason for _, reason in decoded.skipped)


# Many files


def test_decode_keeps_the_order_and_names_what_it_skipped(tmp_path):
    colours = {"a": "red", "c": "lime", "e": "blue", "f": "white"}
    files = [save(tmp_path / f"{name}.png", colours[name]) if name in colours else tmp_path / name for name in "abcdef"]
    (tmp_path / "b").write_text("no picture")
    (tmp_path / "d").mkdir()
    decoded = decode.decode([picture_in(f, tmp_path) for f in files], preprocess.new(8), workers=3)
    assert [p.file for p in decoded.pictures] == ["a.png", "c.png", "e.png", "f.png"]
    assert decoded.pixels[:, :, 0, 0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]
    assert decoded.skipped == [("b", "not a picture in a known format"), ("d", "a folder")]


MEASURE = """
import resource, sys
from functools import partial
from pathlib import Path
from vitlib.pictures import decode, preprocess

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
opening = partial(decode.open_picture, Path(sys.argv[1]), 50.0)
decoded = decode.decode([decode.Picture(str(n), None, opening) for n in range(4)], preprocess.new(8), workers=4)
assert not decoded.skipped
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_of_all_threads_together_is_bounded(tmp_path):
    """Four times 20 megapixels of 16 bits in a file of 40 KB; each took 24 bytes a pixel, and all at a time 1.9 GB."""
    Image.fromarray(np.zeros((4000, 5000), np.uint16)).save(tmp_path / "a.png")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "a.png")]
    made = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(decode.__file__).parents[2])
    assert int(made.stdout) < 330


def test_what_decoding_would_multiply_is_refused_from_the_header(tmp_path):
    long = save(tmp_path / "a.png", size=(2, 65_536), mode="1", colour=1)
    with pytest.raises(BadPicture, match="more than 65,535 on a side"):  # resizing it takes 224 × 65,536 pixels
        read(long)
    webp = save(tmp_path / "a.webp", size=(800, 800))
    with pytest.raises(BadPicture, match="takes 16 bytes a pixel to decode, and so more than 8 MB"):
        read(webp)


def test_a_fault_of_the_code_is_not_taken_for_a_bad_picture():
    def broken():
        raise AttributeError("a mistake")

    with pytest.raises(AttributeError, match="a mistake") as raised:
        decode.decode([Picture("a.png", None, broken)], preprocess.new(8))
    assert raised.value.__notes__ == ["while reading the picture a.png"]


def test_duplicates_are_exact_or_near_and_different_pictures_are_neither(tmp_path):
    same, again, smaller, *others = (
        Image.fromarray(synthetic.render(flower, index=index, split="train", seed=0, size=96))
        for flower in synthetic.classes("in the study")[:3]
        for index in range(2)
    )
    small = smaller.resize((72, 72))
    copies = {
        "train": {"same.png": same, "again.png": again, "smaller.png": smaller, "x.png": others[0]},
        "valid": {"copy.png": same, "saved.jpg": again, "small.webp": small, "y.png": others[1]},
        "test": {"z.png": others[2]},
    }
    decoded = {}
    for split, images in copies.items():
        (tmp_path / split).mkdir()
        for name, image in images.items():
            image.save(tmp_path / split / name, quality=75)
        pictures = [picture_in(tmp_path / split / name, tmp_path) for name in images]
        decoded[split] = decode.decode(pictures, preprocess.new(64))
    found = decode.duplicates(decoded)
    assert list(found[["file", "other_file", "kind"]].itertuples(index=False, name=None)) == [
        ("valid/copy.png", "train/same.png", "exact"),
        ("valid/saved.jpg", "train/again.png", "near"),
        ("valid/small.webp", "train/smaller.png", "near"),
    ]
    assert found["correlation"].between(decode.NEAR_DUPLICATE, 1.0001).all()
    none = decode.duplicates({"train": decoded["train"], "test": decoded["test"]})
    assert none.empty and list(none.columns) == ["file", "other_file", "correlation", "kind"]
