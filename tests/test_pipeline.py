"""Decoding and the network overlap, no row is lost, and another decoder is never taken unasked."""

import io
import sys
import threading
import time
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vitlib import checkpoint, data, engine, inference, pipeline, preprocess
from vitlib.data import Picture
from vitlib.variants import Variant

CPU = torch.device("cpu")


class Slow:
    """A network that only waits, in place of an engine: its logits are the first pixels of each picture."""

    def __init__(self, pre, seconds: float = 0.0) -> None:
        labels = data.Labels(("a", "b"), ("a", "b"))
        self.loaded = SimpleNamespace(preprocess=pre, labels=labels, device=CPU, dtype=torch.float32)
        self.seconds, self.sizes = seconds, []

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        self.sizes.append(len(pixel_values))
        return pixel_values[:, :2, 0, 0].clone()


def slow_picture(number: int, seconds: float = 0.0) -> Picture:
    def opened() -> Image.Image:
        time.sleep(seconds)
        return Image.new("RGB", (8, 8), (number, number // 2, 0))

    return Picture(str(number), None, opened)


def unreadable(number: int) -> Picture:
    def opened() -> Image.Image:
        raise data.BadPicture(f"reason {number}")

    return Picture(str(number), None, opened)


def save(path, size=(60, 45), mode="RGB", **options):
    noise = np.random.default_rng(len(path.name)).integers(0, 256, (size[1] // 5, size[0] // 5, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path):
    """Plain JPEG files, and all that nvJPEG must not be given."""
    turned = Image.Exif()
    turned[data.ORIENTATION] = 6
    for number in range(5):
        save(tmp_path / f"{number}.jpg", size=(40 + 10 * number, 50), quality=95)
    save(tmp_path / "5-turned.jpg", exif=turned)
    save(tmp_path / "6-cmyk.jpg", mode="CMYK")
    save(tmp_path / "7.png")
    (tmp_path / "8-cut.jpg").write_bytes((tmp_path / "4.jpg").read_bytes()[:700])
    save(tmp_path / "9-grey.jpg", mode="L")
    return tmp_path


# What comes out


@pytest.mark.parametrize("batch_size", [1, 3, 8, 50])
def test_logits_are_those_of_decoding_first(checkpoints, pixels, batch_size):
    runner = engine.Engine(checkpoint.load(checkpoints, Variant("fp32"), CPU))
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pixels]
    pictures = [Picture(str(i), None, image.copy) for i, image in enumerate(images)]
    passed = pipeline.classify(pictures, runner, batch_size=batch_size, workers=3)
    decoded = data.decode(pictures, runner.loaded.preprocess)
    expected = engine.logits(runner, decoded.pixels, batch_size)
    torch.testing.assert_close(passed.logits, expected, rtol=0, atol=0)
    assert (passed.look(2) == decoded.pixels[2].permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize("batch_size", [1, 2, 4, 7])
def test_order_is_kept_and_an_unreadable_picture_leaves_its_place(batch_size):
    bad = {0, 3, 4, 5, 13}
    pictures = [unreadable(i) if i in bad else slow_picture(10 * i, 0.003 * (i % 3)) for i in range(14)]
    runner = Slow(preprocess.new(8))
    passed = pipeline.classify(pictures, runner, batch_size=batch_size, workers=4)
    assert [p.file for p in passed.pictures] == [str(10 * i) for i in range(14) if i not in bad]
    expected = [[float(10 * i), float(5 * i)] for i in range(14) if i not in bad]
    torch.testing.assert_close((passed.logits + 1) * 127.5, torch.tensor(expected))
    assert passed.skipped == [(str(i), f"reason {i}") for i in sorted(bad)]
    # Another size would be another graph, or be compiled anew.
    assert set(runner.sizes) <= {batch_size, 14 % batch_size}


def test_the_place_of_an_unreadable_picture_is_taken_by_another_of_its_batch():
    """A black one would have outliers of its own, and LLM.int8() takes those from the whole batch."""
    seen = []

    class Spy(Slow):
        def __call__(self, pixel_values):
            seen.append(pixel_values)
            return super().__call__(pixel_values)

    pictures = [slow_picture(9), unreadable(1), slow_picture(200)]
    pipeline.classify(pictures, Spy(preprocess.new(8)), batch_size=3, workers=1)
    assert torch.equal(seen[0][1], seen[0][0]) and not torch.equal(seen[0][2], seen[0][0])


def test_the_network_is_not_called_for_a_batch_without_a_readable_picture():
    runner = Slow(preprocess.new(8))
    passed = pipeline.classify([unreadable(i) for i in range(5)], runner, batch_size=2, workers=2)
    assert runner.sizes == [] and passed.logits.shape == (0, 2) and len(passed.skipped) == 5


def test_no_pictures_give_no_logits():
    assert pipeline.classify([], Slow(preprocess.new(8)), batch_size=4, workers=2).logits.shape == (0, 2)


def test_threads_do_not_run_further_ahead_than_the_buffers():
    opened, ahead = [], []

    class Counting(Slow):
        def __call__(self, pixel_values):
            ahead.append(len(opened))
            return super().__call__(pixel_values)

    pictures = [Picture(str(i), None, lambda i=i: opened.append(i) or Image.new("RGB", (8, 8))) for i in range(200)]
    pipeline.classify(pictures, Counting(preprocess.new(8), 0.005), batch_size=4, workers=2)
    assert len(ahead) == 50
    assert all(count <= 4 * (number + pipeline.LEAST_BUFFERS) for number, count in enumerate(ahead))
    assert max(count - 4 * number for number, count in enumerate(ahead)) > 4  # and they do run ahead


@pytest.mark.parametrize("place", ["picture", "network"])
@pytest.mark.parametrize("decoder", ["pil", "nvjpeg"])
def test_an_error_ends_the_threads_and_is_shown(torchvision, place, decoder):
    def broken(*_):
        raise AttributeError("a mistake")

    pictures = [slow_picture(i) for i in range(40)]
    runner = Slow(preprocess.new(8))
    if place == "picture":
        pictures[7] = Picture("7", None, broken)
    else:
        runner = type("Broken", (Slow,), {"__call__": broken})(preprocess.new(8))
    before = threading.active_count()
    with pytest.raises(AttributeError, match="a mistake"):
        pipeline.classify(pictures, runner, batch_size=4, workers=2, decoder=decoder)
    assert threading.active_count() <= before


def test_more_batches_than_one_need_two_buffers():
    batches = data.read_batches([slow_picture(1)] * 3, lambda *_: "", [torch.zeros(1, 3, 8, 8)], 1)
    with pytest.raises(ValueError, match="two buffers"):
        next(batches)


# How fast


@pytest.mark.parametrize(("decode_s", "model_s"), [(0.02, 0.04), (0.02, 0.06), (0.04, 0.04)])
def test_both_together_reach_80_percent_of_the_slower(decode_s, model_s):
    """A batch of four takes two threads `decode_s` and the network half of `model_s`."""
    pictures = [slow_picture(i, decode_s / 2) for i in range(32)]
    runner = Slow(preprocess.new(8), model_s / 2)
    frame = pipeline.speed(pictures, runner, batch_size=4, workers=2, rounds=3).set_index("stage")
    expected = {"decoder": 4 / decode_s, "model": 8 / model_s}  # sleeping may take longer, never shorter
    assert all(0.5 * rate < frame["images_per_s"][stage] < 1.05 * rate for stage, rate in expected.items())
    assert 0.8 <= frame["ratio"]["overlapped"] <= 1.1


def test_speed_of_real_pictures(checkpoints, folder):
    runner = engine.Engine(checkpoint.load(checkpoints, Variant("fp32"), CPU))
    frame = pipeline.speed(folder, runner, batch_size=4, workers=2, rounds=1)
    assert frame["stage"].tolist() == ["decoder", "model", "overlapped"]
    assert (frame["pictures"] == 9).all() and (frame["images_per_s"] > 0).all()  # the cut one does not count
    assert frame["ratio"].isna().tolist() == [True, True, False]


def test_speed_of_nothing_readable_is_said(tmp_path):
    (tmp_path / "a.jpg").write_text("no picture")
    with pytest.raises(data.DataError, match="nothing to measure"):
        pipeline.speed(tmp_path, Slow(preprocess.new(8)), batch_size=4, workers=2)
    with pytest.raises(data.DataError, match="holds no picture"):
        pipeline.pictures_in(tmp_path / "nowhere")


# Another decoder


def test_only_plain_jpeg_files_are_for_another_decoder(folder):
    found = {p.file: p.jpeg() for p in pipeline.pictures_in(folder)}
    assert all(found[f"{i}.jpg"] == ((folder / f"{i}.jpg").read_bytes(), "") for i in range(5))
    reasons = {file: reason for file, (content, reason) in found.items() if not content}
    assert reasons == {
        "5-turned.jpg": "turned by its EXIF orientation",
        "6-cmyk.jpg": "colours stored as CMYK",
        "7.png": "not a JPEG picture",
        "8-cut.jpg": "no end of the picture",
        "9-grey.jpg": "colours stored as L",
    }
    assert data.plain_jpeg(folder / "0.jpg", 1e-4)[1]  # over the limits: only `open_picture` says so in a record


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
    monkeypatch.setattr(pipeline, "no_nvjpeg", lambda loaded: "")
    return fake


def test_nvjpeg_gets_plain_files_and_pillow_the_others(torchvision, folder):
    pictures, runner = pipeline.pictures_in(folder), Slow(preprocess.new(24))
    passed = pipeline.classify(pictures, runner, batch_size=4, workers=2, decoder="nvjpeg")
    expected = pipeline.classify(pictures, runner, batch_size=4, workers=2)
    assert torchvision.calls == [4, 1]
    assert passed.pictures == expected.pictures and passed.skipped == expected.skipped
    torch.testing.assert_close(passed.logits, expected.logits, rtol=0, atol=2.1 / 127.5)
    assert (passed.decoder, expected.decoder, expected.note) == ("nvjpeg", "pil", "")
    assert "differ a little" in passed.note
    for reason in ("1 × turned by its EXIF", "1 × colours stored as CMYK", "1 × not a JPEG", "1 × colours stored as L"):
        assert reason in passed.note
    assert "no end" not in passed.note  # Pillow could not read that one either: it has its own row


def test_nvjpeg_decodes_a_batch_while_the_one_before_is_in_the_network(torchvision, folder):
    """The host waits for nvJPEG: in the same thread as the network's, both reached 76 % of nvJPEG's own rate."""
    pictures, decode = pipeline.pictures_in(folder)[:4] * 8, torchvision.decode_jpeg
    torchvision.decode_jpeg = lambda *given, **named: (time.sleep(0.05), decode(*given, **named))[1]
    options = {"batch_size": 4, "workers": 2, "decoder": "nvjpeg"}
    frame = pipeline.speed(pictures, Slow(preprocess.new(24), 0.04), **options).set_index("stage")
    assert frame["ratio"]["overlapped"] >= 0.8
    assert frame["images_per_s"]["overlapped"] > 1.2 / (1 / frame["images_per_s"][["decoder", "model"]]).sum()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the race is between streams of a GPU")
def test_no_picture_of_nvjpeg_is_overwritten_before_it_is_resized(tmp_path):
    pytest.importorskip("torchvision")
    for number in range(40):
        save(tmp_path / f"{number}{'x' * number}.jpg", size=(300 + 20 * number, 400))
    pictures = pipeline.pictures_in(tmp_path)
    heavy = torch.randn(4096, 4096, device="cuda")

    class Busy(Slow):
        def __call__(self, pixel_values):
            for _ in range(20):
                torch.mm(heavy, heavy)  # the stream is behind the host by as much as a network takes
            return pixel_values[:, :2, :, :].mean(dim=(2, 3))

    busy = Busy(preprocess.new(24))
    busy.loaded.device = torch.device("cuda")
    passed = pipeline.classify(pictures * 10, busy, batch_size=16, workers=4, decoder="nvjpeg", progress=False)
    decoder = pipeline.NvJpegDecoder(busy.loaded)
    for position, picture in enumerate(pictures):
        pixels, _ = decoder.on_device(
            [picture], torch.zeros(1, 3, 24, 24, dtype=torch.uint8), [decoder.read(picture, None)]
        )
        torch.cuda.synchronize()
        alone = busy.loaded.preprocess.normalise(pixels)[:, :2].mean(dim=(2, 3)).cpu()
        again = passed.logits[position :: len(pictures)]
        torch.testing.assert_close(again, alone.expand_as(again), rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_size", [8, 16, 128])
def test_no_thread_idles_because_another_holds_what_it_could_decode(batch_size):
    """A reader that hands out many pictures at a time must not leave Pillow's work to a few threads."""
    busy, most, lock = 0, 0, threading.Lock()

    class Together(pipeline.PilDecoder):
        together = 16

        def read(self, picture, row):
            nonlocal busy, most
            with lock:
                busy += 1
                most = max(most, busy)
            time.sleep(0.01)
            with lock:
                busy -= 1
            return ""

    source, pictures = Together(Slow(preprocess.new(24)).loaded), [unreadable(0)] * 256
    assert sum(len(group) for group, *_ in pipeline._read(pictures, source, batch_size, 16)) == 256
    assert most >= 12


def test_out_of_memory_is_no_fault_of_a_picture(torchvision, folder):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    torchvision.decode_jpeg = full
    with pytest.raises(torch.OutOfMemoryError):
        pipeline.classify(
            pipeline.pictures_in(folder)[:4], Slow(preprocess.new(24)), batch_size=4, workers=2, decoder="nvjpeg"
        )


def test_one_picture_that_nvjpeg_refuses_does_not_take_the_others_along(torchvision, folder):
    pictures = pipeline.pictures_in(folder)[:4]
    good = pictures[1].jpeg
    pictures[1] = Picture("1.jpg", None, pictures[1].open, lambda: (b"\xff\xd8\xff nonsense", ""))
    pictures[2] = Picture("2.jpg", None, unreadable(2).open, lambda: (b"\xff\xd8\xff nonsense", ""))
    runner = Slow(preprocess.new(24))
    passed = pipeline.classify(pictures, runner, batch_size=4, workers=2, decoder="auto")
    assert torchvision.calls == [4, 1, 1, 1, 1] and good()[0]
    assert [p.file for p in passed.pictures] == ["0.jpg", "1.jpg", "3.jpg"]
    assert passed.skipped == [("2.jpg", "reason 2")]
    assert passed.note.endswith("by Pillow: 1 × nvJPEG refused it: Error while decoding.")


def test_the_speed_of_nvjpeg_is_not_that_of_pillow(torchvision, tmp_path):
    """On files of another kind Pillow does all the work: a rate under nvJPEG's name would be a lie."""
    Image.new("RGB", (40, 30), "green").save(tmp_path / "a.webp")
    options = {"batch_size": 4, "workers": 1, "decoder": "nvjpeg"}
    with pytest.raises(checkpoint.NotRun, match="none of 1 pictures is a JPEG"):
        pipeline.speed(tmp_path, Slow(preprocess.new(8)), **options)
    Image.new("RGB", (40, 30), "green").save(tmp_path / "b.jpg")
    assert "by Pillow: 1 × not a JPEG" in pipeline.speed(tmp_path, Slow(preprocess.new(8)), **options)["note"][0]
    (tmp_path / "b.jpg").unlink()
    refused = Picture("c.jpg", None, pipeline.pictures_in(tmp_path)[0].open, lambda: (b"\xff\xd8\xff nonsense", ""))
    with pytest.raises(checkpoint.NotRun, match="none of 1 pictures is a JPEG"):  # it looked like one
        pipeline.speed([refused], Slow(preprocess.new(8)), **options)


def test_nvjpeg_is_never_taken_unasked_nor_silently_replaced():
    loaded = Slow(preprocess.new(8)).loaded
    assert type(pipeline.pick_decoder("pil", loaded)) is pipeline.PilDecoder
    with pytest.raises(checkpoint.NotRun, match=r"CUDA device, this one is cpu; set decoder to"):
        pipeline.pick_decoder("nvjpeg", loaded)
    assert pipeline.pick_decoder("auto", loaded).note().endswith("nvJPEG decodes on a CUDA device, this one is cpu.")
    with pytest.raises(ValueError, match="known are pil, nvjpeg, auto"):
        pipeline.pick_decoder("turbo", loaded)


def test_why_there_is_no_nvjpeg_is_one_line(monkeypatch):
    loaded = Slow(preprocess.new(8)).loaded
    loaded.device = torch.device("cuda")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    assert pipeline.no_nvjpeg(loaded).startswith("nvJPEG needs torchvision") and "\n" not in pipeline.no_nvjpeg(loaded)
    loaded.preprocess.processor.resample = 1  # Lanczos
    assert "bilinear or bicubic" in pipeline.no_nvjpeg(loaded)


@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize("size", [(200, 150), (31, 500), (12, 9)])
def test_the_resize_of_the_device_is_that_of_pillow_but_for_rounding(resample, size):
    pre = preprocess.new(32)
    pre.processor.resample = resample
    small = np.random.default_rng(0).integers(0, 256, (size[1] // 3, size[0] // 3, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    difference = (pre.resize_on_device([pixels])[0].int() - pre.resize(image).int()).abs()
    assert difference.max() <= resample - 1 and difference.float().mean() < 0.25  # 1 bilinear, 2 bicubic


def test_constants_of_the_normalisation_are_made_once_and_training_may_use_them():
    pre = preprocess.new(8)
    with torch.inference_mode():
        pre.normalise(torch.zeros(1, 3, 8, 8))
    kept = pre._mean_and_std(CPU)
    values = torch.ones(1, 3, 8, 8, requires_grad=True)
    pre.normalise(values).sum().backward()
    assert pre._mean_and_std(CPU)[0] is kept[0] and values.grad is not None


def test_a_notebook_says_which_decoder_made_its_pixels(predictor_frame):
    predictor, frame = predictor_frame
    assert inference.headline(frame, predictor, 1.0, "Pixels differ.").endswith("- Pixels differ.")


@pytest.fixture
def predictor_frame(checkpoints, pixels):
    runner = engine.Engine(checkpoint.load(checkpoints, Variant("fp32"), CPU))
    pictures = [Picture("a", None, Image.new("RGB", (32, 32)).copy)]
    passed = pipeline.classify(pictures, runner, batch_size=1, workers=1)
    return inference.Predictor(Variant("fp32"), runner), inference._rows(passed, runner.loaded.labels)
