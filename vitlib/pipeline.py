"""Pictures in, logits out, with decoding and the network at work at the same time. Level 2.

Threads decode and resize into a few pinned buffers that are used in turn (Pillow and torch release the interpreter's
lock while they work). The host queues the copy, the normalisation and the network of a batch without waiting for the
device, and fetches the logits of the batch before. Where the GPU decodes, a thread of its own has it do so on a stream
of its own, a batch ahead. What is held in memory does not grow with the number of pictures.
"""

import contextlib
import io
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm import tqdm

from vitlib import data, files, stats, timing
from vitlib.checkpoint import Loaded, NotRun
from vitlib.data import Picture
from vitlib.engine import Engine
from vitlib.preprocess import Preprocess

DECODERS = ("pil", "nvjpeg", "auto")
T = TypeVar("T")
LEAST_BUFFERS = 4  # one in the network, one queued behind it, and two for the threads


@dataclass
class Passed:
    """Readable pictures with their float32 logits (n, classes), the skipped ones (file, reason), and who decoded.

    `decoder` is pil or nvjpeg, and `on_device` the number of pictures that nvJPEG decoded; `note` says in a sentence
    what differs from plain Pillow ('' where nothing does).
    """

    logits: torch.Tensor
    pictures: list[Picture]
    skipped: list[tuple[str, str]]
    preprocess: Preprocess
    decoder: str
    note: str
    on_device: int = 0

    def look(self, position: int) -> np.ndarray:
        """One picture (h, w, 3) as Pillow decodes and resizes it, read anew: no pixels are kept."""
        return self.preprocess.resize(self.pictures[position].open()).permute(1, 2, 0).numpy()


Prepared = tuple[list[Picture], torch.Tensor, list[str]]  # a batch's pictures, on the device, each with a reason or ''


class PilDecoder:
    """Pillow in the threads; the pixels that every other part of a study sees."""

    name = "pil"
    decoded = 0  # pictures that did not need Pillow
    together = 1  # pictures that a thread reads at a time

    def __init__(self, loaded: Loaded, why: str = "") -> None:
        self.preprocess, self.device, self.why = loaded.preprocess, loaded.device, why

    def read(self, picture: Picture, row: torch.Tensor) -> object:
        """What a thread does with a picture: fill `row`, and give the reason where that fails ('' else)."""
        return data.read_picture(picture, self.preprocess, row)

    def on_device(self, pictures: list[Picture], buffer: torch.Tensor, results: list) -> tuple[torch.Tensor, list[str]]:
        """The batch (n, 3, h, w) uint8 on the device, queued and not waited for, and a reason or '' a picture."""
        return buffer.to(self.device, non_blocking=True), results

    def batches(self, read: Iterator[tuple[list[Picture], torch.Tensor, list]]) -> Iterator[Prepared]:
        """What `data.read_batches` gives, on the device."""
        for group, buffer, results in read:
            yield group, *self.on_device(group, buffer, results)

    def note(self) -> str:
        """What a reader must know about the pixels."""
        return f"Pictures were decoded by Pillow: {self.why}." if self.why else ""


class NvJpegDecoder(PilDecoder):
    """The GPU's JPEG decoder through torchvision for plain JPEG files, Pillow in the threads for all others.

    Pixels differ a little from Pillow's: nvJPEG has its own inverse DCT and chroma upsampling, and the resize rounds
    once (`Preprocess.resize_on_device`). So accuracies are not to be compared picture by picture with a run on Pillow.
    """

    name = "nvjpeg"
    together = 16  # at most: what is left for the threads is short

    def __init__(self, loaded: Loaded) -> None:
        super().__init__(loaded)
        self.by_pil: Counter[str] = Counter()
        # Few small kernels and copies, which must not wait behind a whole network.
        self.stream = torch.cuda.Stream(self.device, priority=-1) if self.device.type == "cuda" else None

    def read(self, picture: Picture, row: torch.Tensor) -> object:
        """A plain JPEG's bytes (uint8 tensor); for others Pillow fills `row`: (its reason or '', why it was asked)."""
        content, odd = picture.jpeg() if picture.jpeg else (b"", "not a file")
        if content:
            return torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return super().read(picture, row), odd

    def batches(self, read: Iterator[tuple[list[Picture], torch.Tensor, list]]) -> Iterator[Prepared]:
        """As Pillow's, each batch made in a thread while the one before is in the network."""
        return one_ahead(super().batches(read))

    def on_device(self, pictures: list[Picture], buffer: torch.Tensor, results: list) -> tuple[torch.Tensor, list[str]]:
        """As Pillow's, with the plain JPEG files decoded and resized on the device, and waited for.

        torchvision decodes on a stream that nobody can wait for beforehand, into memory that the caller's stream may
        have work to do with still. So nothing is pending on ours when a batch begins, and memory comes from ours alone.
        """
        if self.stream is None:
            return self._on_device(pictures, buffer, results)
        with torch.cuda.stream(self.stream):
            pixels, reasons = self._on_device(pictures, buffer, results)
        self.stream.synchronize()
        return pixels, reasons

    def _on_device(
        self, pictures: list[Picture], buffer: torch.Tensor, results: list
    ) -> tuple[torch.Tensor, list[str]]:
        plain = {row: result for row, result in enumerate(results) if isinstance(result, torch.Tensor)}
        decoded = dict(zip(plain, self._decode(list(plain.values())), strict=True))
        for row, picture in decoded.items():
            if isinstance(picture, str):  # before the buffer is copied
                results[row] = super().read(pictures[row], buffer[row]), picture
        pixels = buffer.to(self.device, non_blocking=True)
        if rows := [row for row in decoded if isinstance(results[row], torch.Tensor)]:
            pixels[rows] = self.preprocess.resize_on_device([decoded[row] for row in rows])
        self.decoded += len(rows)
        reasons = [""] * len(results)
        for row in set(range(len(results))) - set(rows):
            reasons[row], odd = results[row]
            self.by_pil[odd] += not reasons[row]
        return pixels, reasons

    def _decode(self, encoded: list[torch.Tensor]) -> list[torch.Tensor | str]:
        """Pictures on the device, or why nvJPEG refused them: one that it refuses fails the whole call."""
        if not encoded:
            return []
        try:
            return decode_on_device(encoded, self.device)
        except torch.OutOfMemoryError:  # of this batch, and no fault of a picture
            raise
        except RuntimeError as error:
            if len(encoded) == 1:
                return [f"nvJPEG refused it: {files.first_line(error)}"]
            return [self._decode([one])[0] for one in encoded]

    def note(self) -> str:
        """What a reader must know about the pixels, with the reasons why Pillow decoded some pictures."""
        others = ", ".join(f"{count} × {reason}" for reason, count in (+self.by_pil).most_common())
        text = "Pictures were decoded by nvJPEG, whose pixels differ a little from Pillow's"
        return f"{text}; by Pillow: {others}." if others else f"{text}."


def decode_on_device(encoded: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """uint8 pictures (3, h, w) on `device` from the bytes of JPEG files. RuntimeError where nvJPEG refuses one."""
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device)


def no_nvjpeg(loaded: Loaded) -> str:
    """Why nvJPEG cannot decode for this checkpoint on this machine, in one line ('' if it can)."""
    if loaded.device.type != "cuda":
        return f"nvJPEG decodes on a CUDA device, this one is {loaded.device.type}"
    if reason := loaded.preprocess.not_resizable_on_device():
        return reason
    sample = io.BytesIO()
    Image.new("RGB", (16, 16), "green").save(sample, "JPEG")
    try:
        decode_on_device([torch.frombuffer(bytearray(sample.getvalue()), dtype=torch.uint8)], loaded.device)
    except (ImportError, RuntimeError, AttributeError, TypeError) as error:  # an old one takes no list, or no device
        return f"nvJPEG needs torchvision 0.20 or newer with CUDA ({files.first_line(error)})"
    return ""


def pick_decoder(name: str, loaded: Loaded) -> PilDecoder:
    """The decoder called pil, nvjpeg, or auto (nvJPEG where it works). NotRun for nvjpeg where it does not."""
    if name not in DECODERS:
        raise ValueError(f"unknown decoder {name!r}: known are {', '.join(DECODERS)}")
    if name == "pil":
        return PilDecoder(loaded)
    if not (reason := no_nvjpeg(loaded)):
        return NvJpegDecoder(loaded)
    if name == "nvjpeg":
        raise NotRun(f"decoder is 'nvjpeg', which cannot be: {reason}; set decoder to 'pil' or 'auto'")
    return PilDecoder(loaded, reason)


def classify(
    pictures: list[Picture],
    engine: Engine,
    *,
    batch_size: int,
    workers: int,
    decoder: str = "pil",
    progress: bool = True,
) -> Passed:
    """Logits of every readable picture, in order; unreadable ones are named with the reason.

    Every call of the network has `batch_size` pictures but the last: an unreadable one leaves its place to a copy of
    another picture of its batch, whose logits are dropped. The network is not called for a batch without any.
    """
    loaded = engine.loaded
    source, last, parts, good, skipped = pick_decoder(decoder, loaded), None, [], [], []
    bar = tqdm(desc="pictures", total=len(pictures), unit="img", disable=not progress)
    # Closed here, so that an error in the network stops the threads before it is shown.
    with (
        bar,
        contextlib.closing(_read(pictures, source, batch_size, workers)) as read,
        contextlib.closing(source.batches(read)) as batches,
    ):
        for group, pixels, reasons in batches:
            queued = _queue(engine, pixels, reasons)
            parts += _fetched(last)  # the batch before: the device is busy with this one meanwhile
            last = queued
            good += [picture for picture, reason in zip(group, reasons, strict=True) if not reason]
            skipped += [(picture.file, reason) for picture, reason in zip(group, reasons, strict=True) if reason]
            bar.update(len(group))
        parts += _fetched(last)
    logits = torch.cat(parts) if parts else torch.empty(0, len(loaded.labels.names))
    return Passed(logits, good, skipped, loaded.preprocess, source.name, source.note(), source.decoded)


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """`items`, each made in a thread while the one before it is used; errors come where the item would."""
    end = object()
    with ThreadPoolExecutor(1) as pool:  # leaving it waits for what is being made
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item


def _read(pictures: list[Picture], source: PilDecoder, batch_size: int, workers: int) -> Iterator:
    """`data.read_batches` by `source`, with as many pictures a task as leave a task for every thread.

    Else threads would idle where batches are small, and Pillow may have work with any of them.
    """
    buffers = _buffers(source, batch_size, workers, len(pictures))
    ahead = len(buffers[0]) * (len(buffers) - 1)  # pictures that may be in the threads' hands
    together = max(1, min(source.together, ahead // workers))
    return data.read_batches(pictures, source.read, buffers, workers, together)


def _buffers(source: PilDecoder, batch_size: int, workers: int, pictures: int) -> list[torch.Tensor]:
    """Host buffers (batch_size, 3, h, w) for a batch in the network and two pictures a thread ahead of it."""
    count = max(LEAST_BUFFERS, 2 + math.ceil(2 * workers / batch_size))
    count = min(count, max(1, math.ceil(pictures / batch_size)))
    shape = (min(batch_size, max(1, pictures)), 3, *source.preprocess.side)
    pinned = source.device.type == "cuda"  # only from pinned memory does a copy run while the host goes on
    return [torch.zeros(shape, dtype=torch.uint8, pin_memory=pinned) for _ in range(count)]


Queued = tuple[torch.Tensor, list[int], "torch.cuda.Event | None"]


def _queue(engine: Engine, pixels: torch.Tensor, reasons: list[str]) -> Queued | None:
    """Queue the network and the copy of its logits to the host; None where no picture of the batch is readable."""
    rows = [row for row, reason in enumerate(reasons) if not reason]
    if not rows:
        return None
    if pixels.is_cuda:  # they may be of another stream's memory, which must not be used again before this one is done
        pixels.record_stream(torch.cuda.current_stream(pixels.device))
    for row in set(range(len(reasons))) - set(rows):
        pixels[row].copy_(pixels[rows[0]])
    loaded = engine.loaded
    logits = engine(loaded.preprocess.normalise(pixels, loaded.dtype)).float()
    if not logits.is_cuda:
        return logits, rows, None
    host = torch.empty(logits.shape, dtype=torch.float32, pin_memory=True)
    host.copy_(logits, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    return host, rows, done


def _fetched(queued: Queued | None) -> list[torch.Tensor]:
    """The logits of the readable rows, when the device is done with them (and so with the batch's host buffer)."""
    if queued is None:
        return []
    logits, rows, done = queued
    if done is not None:
        done.synchronize()
    return [logits[rows]]  # a copy: the pinned memory goes back


def pictures_in(folder: str | Path, max_megapixels: float = 50.0) -> list[Picture]:
    """Every file below `folder` that is worth opening, by name. DataError where there is none."""
    folder = Path(folder)
    files = [path for path in sorted(folder.rglob("*")) if not data.not_a_picture(path)]
    if not files:
        raise data.DataError(f"the folder {folder.name!r} holds no picture")
    return [data.picture_of(path, folder, None, max_megapixels) for path in files]


def speed(
    pictures: str | Path | list[Picture],
    engine: Engine,
    *,
    batch_size: int,
    workers: int,
    decoder: str = "pil",
    rounds: int = 3,
) -> pd.DataFrame:
    """How much of the slower of decoder and network the pipeline reaches, for a folder or a list of pictures.

    A row a stage (decoder, model, overlapped): decoder's name, batch, workers, pictures, images_per_s (median over
    rounds, stages in turn, after a pass that is not counted), for `overlapped` the ratio to the slower of the other
    two (median of the rounds' own, ratio_low and ratio_high its bounds), and note, what differs from plain Pillow.
    `decoder` reads, decodes, resizes and copies to the device; `model` runs on pixel values that lie there.
    DataError where no picture can be read, NotRun where nvJPEG would leave them all to Pillow.
    Where the network runs on the CPU both want the same cores, and the ratio says how many are idle.
    """
    found = pictures if isinstance(pictures, list) else pictures_in(pictures)
    options = {"batch_size": batch_size, "workers": workers, "decoder": decoder}
    warm = classify(found, engine, **options, progress=False)
    if not (usable := warm.pictures):
        raise data.DataError(f"none of {len(found)} pictures can be read: there is nothing to measure")
    if warm.decoder == "nvjpeg" and not warm.on_device:
        raise NotRun(f"none of {len(usable)} pictures is a JPEG file that nvJPEG decodes")
    loaded = engine.loaded
    pixels = data.decode(usable[:batch_size], loaded.preprocess, workers=workers, what="one batch").pixels
    batch = loaded.preprocess.normalise(pixels.to(loaded.device), loaded.dtype)
    stages = {
        "decoder": lambda: _decode_only(usable, engine, **options),
        "model": lambda: _model_only(batch, len(usable), engine),
        "overlapped": lambda: classify(usable, engine, **options, progress=False),
    }
    seconds = _in_turn(stages, rounds, loaded.device)
    shared = {"decoder": warm.decoder, "batch": batch_size, "workers": workers, "pictures": len(usable)}
    rates = {stage: len(usable) / np.median(took) for stage, took in seconds.items()}
    frame = pd.DataFrame([{"stage": stage, **shared, "images_per_s": rate} for stage, rate in rates.items()])
    ratio = stats.median_interval(list(np.maximum(seconds["decoder"], seconds["model"]) / seconds["overlapped"]))
    bounds = {"ratio": ratio.estimate, "ratio_low": ratio.low, "ratio_high": ratio.high}
    frame = frame.assign(**{name: [np.nan, np.nan, value] for name, value in bounds.items()})
    return frame.assign(note=[warm.note, "", warm.note])


def _in_turn(stages: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, np.ndarray]:
    """Seconds of each stage in each of the rounds, in which they run one after the other."""
    seconds: dict[str, list[float]] = {stage: [] for stage in stages}
    for _ in range(rounds):
        for stage, run in stages.items():
            timing.synchronise(device)
            start = time.perf_counter()
            run()
            timing.synchronise(device)
            seconds[stage].append(time.perf_counter() - start)
    return {stage: np.array(times) for stage, times in seconds.items()}


def _decode_only(pictures: list[Picture], engine: Engine, *, batch_size: int, workers: int, decoder: str) -> None:
    source = pick_decoder(decoder, engine.loaded)
    with contextlib.closing(_read(pictures, source, batch_size, workers)) as batches:
        for group, buffer, results in batches:
            source.on_device(group, buffer, results)
            timing.synchronise(engine.loaded.device)  # before a buffer is filled anew


def _model_only(batch: torch.Tensor, pictures: int, engine: Engine) -> None:
    """The network on one batch over and over, as often as so many pictures need."""
    for first in range(0, pictures, len(batch)):
        engine(batch[: pictures - first])
