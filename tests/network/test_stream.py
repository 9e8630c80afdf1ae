"""Decoding and the network overlap, no row is lost, and another decoder is never taken unasked."""

import io
import sys
import threading
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vitlib.ablation import exchange
from vitlib.network import checkpoint, engine, stream
from vitlib.pictures import decode, decoders, preprocess, sources
from vitlib.pictures.decode import Picture
from vitlib.study.variants import Variant

CPU = torch.device("cpu")
SECONDS = 30  # of waiting for another thread, after which a test fails instead of hanging


class Toy:
    """In place of an engine: its logits are the first pixels of each picture; `before` runs in each call."""

    def __init__(self, side: int = 8, before=lambda: None) -> None:
        labels = sources.Labels(("a", "b"), ("a", "b"))
        pre = preprocess.new(side)
        self.loaded = SimpleNamespace(preprocess=pre, labels=labels, device=CPU, dtype=torch.float32)
        self.before, self.batches = before, []

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        self.before()
        self.batches.append(pixel_values)
        return pixel_values[:, :2, 0, 0].clone()


def numbered(number: int, before=lambda: None) -> Picture:
    def opened() -> Image.Image:
        before()
        return Image.new("RGB", (8, 8), (number, number // 2, 0))

    return Picture(str(number), None, opened)


def unreadable(number: int) -> Picture:
    def opened() -> Image.Image:
        raise decode.BadPicture(f"reason {number}")

    return Picture(str(number), None, opened)


def save(path, size=(60, 45), mode="RGB", **options):
    noise = np.random.default_rng(len(path.name)).integers(0, 256, (size[1] // 5, size[0] // 5, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode).save(path, **options)
    return path


def pictures_in(folder) -> list[Picture]:
    return sources.pictures_below(folder, 50.0)[0]


@pytest.fixture
def folder(tmp_path):
    """Plain JPEG files, and all that nvJPEG must not be given."""
    turned = Image.Exif()
    turned[decode.ORIENTATION] = 6
    for number in range(5):
        save(tmp_path / f"{number}.jpg", size=(40 + 10 * number, 50), quality=95)
    save(tmp_path / "5-turned.jpg", exif=turned)
    save(tmp_path / "6-cmyk.jpg", mode="CMYK")
    save(tmp_path / "7.png")
    (tmp_path / "8-cut.jpg").write_bytes((tmp_path / "4.jpg").read_bytes()[:700])
    save(tmp_path / "9-grey.jpg", mode="L")
    return tmp_path


@pytest.fixture
def torchvision(monkeypatch):
    """A torchvision whose decoder is Pillow, on the CPU; it refuses as a whole what it cannot read, as nvJPEG does."""
    calls = []

    def decode_jpeg(encoded, mode, device):
        calls.append(len(encoded))
        decoded = []
        for content in encoded:
            assert content.dtype == torch.uint8 and content.ndim == 1
            try:
                image = Image.open(io.BytesIO(content.numpy().tobytes())).convert(mode)
            except OSError:
                raise RuntimeError("Error while decoding\nin nvJPEG") from None
            decoded.append(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1))
        return decoded

    fake = types.ModuleType("torchvision.io")
    fake.decode_jpeg, fake.ImageReadMode, fake.calls = decode_jpeg, SimpleNamespace(RGB="RGB"), calls
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.io", fake)
    monkeypatch.setattr(decoders, "no_nvjpeg", lambda *_: "")
    return fake


# What comes out


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_logits_are_those_of_decoding_first(checkpoints, pixels, batch_size):
    runner = engine.Engine(checkpoint.load(checkpoints, Variant("fp32"), CPU))
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pixels]
    pictures = [Picture(str(i), None, image.copy) for i, image in enumerate(images)]
    passed = stream.classify(pictures, runner, batch_size=batch_size, workers=3, decoder="pil")
    decoded = decode.decode(pictures, runner.loaded.preprocess)
    expected = engine.logits(runner, decoded.pixels, batch_size)
    torch.testing.assert_close(passed.logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_name_no_class_are_an_error(checkpoints, pixels, value):
    loaded = checkpoint.load(checkpoints, Variant("fp32"), CPU)
    loaded.model.classifier.bias.data[1] = value
    with pytest.raises(FloatingPointError, match="8 of 8 rows of logits of the checkpoint 'merged'"):
        engine.logits(engine.Engine(loaded), pixels, 4)
    with pytest.raises(FloatingPointError, match="2 of 2 rows"):
        stream.classify([numbered(1), numbered(2)], engine.Engine(loaded), batch_size=2, workers=1, decoder="pil")
    own = exchange.Exchange(loaded.model, {})
    wanted = [exchange.Configuration("all", ((exchange.FULL,) * len(exchange.LINEARS),) * len(loaded.model.vit.layers))]
    with pytest.raises(FloatingPointError, match="8 of 8 rows"):
        own.outputs(pixels, wanted, loaded, 8, "test")


@pytest.mark.parametrize("decoder", ["pil", "nvjpeg"])
@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_order_is_kept_and_an_unreadable_picture_leaves_its_place(torchvision, batch_size, decoder):
    bad = {0, 3, 4, 5, 13}
    pictures = [unreadable(i) if i in bad else numbered(10 * i) for i in range(14)]
    runner = Toy()
    passed = stream.classify(pictures, runner, batch_size=batch_size, workers=4, decoder=decoder)
    assert [p.file for p in passed.pictures] == [str(10 * i) for i in range(14) if i not in bad]
    expected = [[float(10 * i), float(5 * i)] for i in range(14) if i not in bad]
    torch.testing.assert_close((passed.logits + 1) * 127.5, torch.tensor(expected))
    assert passed.skipped == [(str(i), f"reason {i}") for i in sorted(bad)]
    # Another size would be another graph, or be compiled again.
    assert {len(batch) for batch in runner.batches} <= {batch_size, 14 % batch_size}


def test_the_place_of_an_unreadable_picture_is_taken_by_another_of_its_batch():
    """A black one would have outliers of its own, and LLM.int8() takes those from the whole batch."""
    runner = Toy()
    stream.classify([numbered(9), unreadable(1), numbered(200)], runner, batch_size=3, workers=1, decoder="pil")
    first, second, third = runner.batches[0]
    assert torch.equal(second, first) and not torch.equal(third, first)


@pytest.mark.parametrize("count", [0, 5])
def test_the_network_is_not_called_without_a_readable_picture(count):
    runner = Toy()
    passed = stream.classify([unreadable(i) for i in range(count)], runner, batch_size=2, workers=2, decoder="pil")
    assert runner.batches == [] and passed.logits.shape == (0, 2) and len(passed.skipped) == count


# What happens at the same time


def test_the_next_batch_is_decoded_before_the_network_is_done_with_this_one():
    """The network's first call waits for the last picture of the second batch: in turn, neither would end."""
    started = threading.Event()
    runner = Toy(before=lambda: seen.append(started.wait(SECONDS)))
    seen, pictures = [], [numbered(i, started.set if i == 7 else lambda: None) for i in range(8)]
    stream.classify(pictures, runner, batch_size=4, workers=2, decoder="pil")
    assert seen == [True, True]


def test_nvjpeg_decodes_a_batch_while_the_one_before_is_in_the_network(torchvision, folder):
    """The host waits for nvJPEG, so this needs another thread."""
    started, seen, original = threading.Event(), [], torchvision.decode_jpeg

    def decode_jpeg(*given, **named):
        if torchvision.calls:  # the second batch
            started.set()
        return original(*given, **named)

    torchvision.decode_jpeg = decode_jpeg
    runner = Toy(24, before=lambda: seen.append(started.wait(SECONDS)))
    stream.classify(pictures_in(folder)[:4] * 2, runner, batch_size=4, workers=2, decoder="nvjpeg")
    assert seen == [True, True]


def test_threads_do_not_run_further_ahead_than_the_buffers():
    opened, ahead = [], []
    runner = Toy(before=lambda: ahead.append(len(opened)))
    pictures = [numbered(i, lambda i=i: opened.append(i)) for i in range(200)]
    stream.classify(pictures, runner, batch_size=4, workers=2, decoder="pil")
    assert len(ahead) == 50
    assert all(count <= 4 * (number + decoders.LEAST_BUFFERS) for number, count in enumerate(ahead))


def test_a_buffer_is_filled_again_only_after_the_batch_that_follows_its_own():
    """Rows are filled with the picture's number; the caller still holds the batch before the last one it asked for."""

    class Numbers(decoders.PilDecoder):
        def read(self, picture, row):
            row.fill_(int(picture.file))
            return decoders.Read()

    before = None
    for number, (group, pixels, _) in enumerate(
        Numbers(preprocess.new(8), CPU).batches([numbered(i) for i in range(42)], batch_size=4, workers=3)
    ):
        expected = [4 * number + row for row in range(len(group))]
        assert pixels[:, 0, 0, 0].tolist() == expected
        assert before is None or before[0][:, 0, 0, 0].tolist() == before[1]
        before = pixels, expected
    assert number == 10


@pytest.mark.parametrize("place", ["picture", "network"])
@pytest.mark.parametrize("decoder", ["pil", "nvjpeg"])
def test_an_error_ends_the_threads_and_is_shown(torchvision, place, decoder):
    def broken(*_):
        raise AttributeError("a mistake")

    pictures, runner = [numbered(i) for i in range(40)], Toy()
    if place == "picture":
        pictures[7] = Picture("7", None, broken)
    else:
        runner.before = broken
    before = threading.active_count()
    with pytest.raises(AttributeError, match="a mistake"):
        stream.classify(pictures, runner, batch_size=4, workers=2, decoder=decoder)
    assert threading.active_count() <= before


# Another decoder


def test_only_plain_jpeg_files_are_for_another_decoder(folder):
    assert all(decode.plain_jpeg(folder / f"{i}.jpg", 1) == (folder / f"{i}.jpg").read_bytes() for i in range(5))
    for file, megapixels, reason in (
        ("5-turned.jpg", 1, "turned by its EXIF orientation"),
        ("6-cmyk.jpg", 1, "colours stored as CMYK"),
        ("7.png", 1, "stored as PNG"),
        ("8-cut.jpg", 1, "no end of the picture"),
        ("9-grey.jpg", 1, "colours stored as L"),
        ("0.jpg", 1e-4, "more than 0.0001 megapixels"),
    ):
        with pytest.raises(decode.BadPicture, match=reason):
            decode.plain_jpeg(folder / file, megapixels)


def test_nvjpeg_gets_plain_files_and_pillow_the_others(torchvision, folder):
    pictures, runner = pictures_in(folder), Toy(24)
    passed = stream.classify(pictures, runner, batch_size=4, workers=2, decoder="nvjpeg")
    expected = stream.classify(pictures, runner, batch_size=4, workers=2, decoder="pil")
    assert torchvision.calls == [4, 1] and passed.on_device == 5
    assert passed.pictures == expected.pictures and passed.skipped == expected.skipped
    torch.testing.assert_close(passed.logits, expected.logits, rtol=0, atol=2.1 / 127.5)
    assert (passed.decoder, expected.decoder, expected.note) == ("nvjpeg", "pil", "")
    assert "differ a little" in passed.note
    for reason in (
        "1 × turned by its EXIF",
        "1 × colours stored as CMYK",
        "1 × stored as PNG",
        "1 × colours stored as L",
    ):
        assert reason in passed.note
    assert "no end" not in passed.note  # Pillow could not read that one either: it has its own row


def test_one_picture_that_nvjpeg_refuses_does_not_take_the_others_along(torchvision, folder):
    pictures = pictures_in(folder)[:4]
    nonsense = lambda: b"\xff\xd8\xff nonsense"  # noqa: E731
    pictures[1] = Picture("1.jpg", None, pictures[1].open, nonsense)
    pictures[2] = Picture("2.jpg", None, unreadable(2).open, nonsense)
    passed = stream.classify(pictures, Toy(24), batch_size=4, workers=2, decoder="auto")
    assert torchvision.calls == [4, 1, 1, 1, 1]
    assert [p.file for p in passed.pictures] == ["0.jpg", "1.jpg", "3.jpg"]
    assert passed.skipped == [("2.jpg", "reason 2")]
    assert passed.note.endswith("by Pillow: 1 × nvJPEG refused it: Error while decoding.")


def test_out_of_memory_is_no_fault_of_a_picture(torchvision, folder):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    torchvision.decode_jpeg = full
    with pytest.raises(torch.OutOfMemoryError):
        stream.classify(pictures_in(folder)[:4], Toy(24), batch_size=4, workers=2, decoder="nvjpeg")


def test_nvjpeg_is_never_taken_unasked_nor_silently_replaced(monkeypatch):
    pre, cuda = preprocess.new(8), torch.device("cuda")
    assert type(decoders.pick("pil", pre, CPU)) is decoders.PilDecoder
    with pytest.raises(decoders.DecoderUnavailable, match=r"CUDA device, this one is cpu; set decoder to"):
        decoders.pick("nvjpeg", pre, CPU)
    assert decoders.pick("auto", pre, CPU).note().endswith("nvJPEG decodes on a CUDA device, this one is cpu.")
    with pytest.raises(ValueError, match="known are pil, nvjpeg, auto"):
        decoders.pick("turbo", pre, CPU)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    reason = decoders.no_nvjpeg(pre, cuda)
    assert reason.startswith("nvJPEG needs torchvision") and "\n" not in reason
    pre.processor.resample = 1  # Lanczos
    assert "bilinear or bicubic" in decoders.no_nvjpeg(pre, cuda)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the race is between streams of a GPU")
def test_no_picture_of_nvjpeg_is_overwritten_before_it_is_resized(tmp_path):
    pytest.importorskip("torchvision")
    for number in range(40):
        save(tmp_path / f"{number}{'x' * number}.jpg", size=(300 + 20 * number, 400))
    pictures, heavy = pictures_in(tmp_path), torch.randn(4096, 4096, device="cuda")

    class Busy(Toy):
        def __call__(self, pixel_values):
            for _ in range(20):
                torch.mm(heavy, heavy)  # the stream is behind the host by as much as a network takes
            return pixel_values[:, :2, :, :].mean(dim=(2, 3))

    busy = Busy(24)
    busy.loaded.device = torch.device("cuda")
    passed = stream.classify(pictures * 10, busy, batch_size=16, workers=4, decoder="nvjpeg")
    decoder = decoders.NvJpegDecoder(busy.loaded.preprocess, busy.loaded.device)
    for position, picture in enumerate(pictures):
        buffer = torch.zeros(1, 3, 24, 24, dtype=torch.uint8)
        pixels = decoder.on_device([picture], buffer, [decoder.read(picture, buffer[0])])
        torch.cuda.synchronize()
        alone = busy.loaded.preprocess.normalise(pixels)[:, :2].mean(dim=(2, 3)).cpu()
        again = passed.logits[position :: len(pictures)]
        torch.testing.assert_close(again, alone.expand_as(again), rtol=0, atol=1e-5)
