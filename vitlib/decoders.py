"""Who decodes a batch: Pillow in threads, or the GPU's JPEG decoder (nvJPEG through torchvision)."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from PIL import Image

from vitlib import decode, files
from vitlib.decode import Picture
from vitlib.preprocess import Preprocess

DECODERS = ("pil", "nvjpeg", "auto")
LEAST_BUFFERS = 4  # one in the network, one queued behind it, and two for the threads
T = TypeVar("T")


class DecoderUnavailable(RuntimeError):
    """A decoder that cannot run here; the message is the reason."""


@dataclass
class Read:
    """What a thread made of a picture: its row of the buffer is filled, or `encoded` is left to the GPU.

    `reason` says why it cannot be read ('' if it can), `by_pil` why Pillow decoded it where the GPU decodes.
    """

    reason: str = ""
    encoded: torch.Tensor | None = None  # uint8 (bytes,): a plain JPEG file
    by_pil: str = ""


Batch = tuple[list[Picture], torch.Tensor, list[str]]  # pictures, pixels on the device, a reason or '' for each


class PilDecoder:
    """Pillow in the threads; the pixels that every other part of a study sees."""

    name = "pil"
    decoded = 0  # pictures that did not need Pillow
    together = 1  # pictures that one task of a thread reads

    def __init__(self, preprocess: Preprocess, device: torch.device, why: str = "") -> None:
        self.preprocess, self.device, self.why = preprocess, device, why

    def read(self, picture: Picture, row: torch.Tensor) -> Read:
        """What a thread does with a picture: fill `row` (uint8 (3, h, w)), or say why that fails."""
        return Read(decode.read_picture(picture, self.preprocess, row))

    def on_device(self, pictures: list[Picture], buffer: torch.Tensor, results: list[Read]) -> torch.Tensor:
        """The batch (n, 3, h, w) uint8 on the device; queued, not waited for."""
        return buffer.to(self.device, non_blocking=True)

    def batches(self, pictures: list[Picture], *, batch_size: int, workers: int) -> Iterator[Batch]:
        """All pictures in batches on the device, in order; close the iterator to stop the threads."""
        buffers = self._buffers(len(pictures), batch_size, workers)
        ahead = len(buffers[0]) * (len(buffers) - 1)  # pictures that the threads may have at a time
        together = max(1, min(self.together, ahead // workers))  # a task for every thread, also where batches are small
        read = decode.read_batches(pictures, self.read, buffers, workers, together)
        try:
            for group, buffer, results in read:
                pixels = self.on_device(group, buffer, results)
                yield group, pixels, [result.reason for result in results]
        finally:
            read.close()

    def _buffers(self, pictures: int, batch_size: int, workers: int) -> list[torch.Tensor]:
        """Host buffers (batch_size, 3, h, w): a batch in the network and two pictures a thread ahead of it."""
        count = max(LEAST_BUFFERS, 2 + math.ceil(2 * workers / batch_size))
        count = min(count, max(1, math.ceil(pictures / batch_size)))
        shape = (min(batch_size, max(1, pictures)), 3, *self.preprocess.side)
        pinned = self.device.type == "cuda"  # only from pinned memory does a copy run while the host goes on
        return [torch.zeros(shape, dtype=torch.uint8, pin_memory=pinned) for _ in range(count)]

    def note(self) -> str:
        """What a reader must know about the pixels ('' where nothing differs from Pillow)."""
        return f"Pictures were decoded by Pillow: {self.why}." if self.why else ""


class NvJpegDecoder(PilDecoder):
    """The GPU's JPEG decoder for plain JPEG files, Pillow in the threads for all others.

    Pixels differ a little from Pillow's: nvJPEG has its own inverse DCT and chroma upsampling, and the resize rounds
    once (`Preprocess.resize_on_device`). Do not compare accuracies picture by picture with a run on Pillow.
    """

    name = "nvjpeg"
    together = 16  # at most: little work is left for the threads

    def __init__(self, preprocess: Preprocess, device: torch.device) -> None:
        super().__init__(preprocess, device)
        self.by_pil: Counter[str] = Counter()
        # Few small kernels and copies, which must not wait behind a whole network.
        self.stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def read(self, picture: Picture, row: torch.Tensor) -> Read:
        """The bytes of a plain JPEG file; for others Pillow fills `row`."""
        content, odd = picture.jpeg() if picture.jpeg else (b"", "not a file")
        if content:
            return Read(encoded=torch.frombuffer(bytearray(content), dtype=torch.uint8))
        return Read(decode.read_picture(picture, self.preprocess, row), by_pil=odd)

    def batches(self, pictures: list[Picture], *, batch_size: int, workers: int) -> Iterator[Batch]:
        """As Pillow's, each in a thread while the network computes the one before: nvJPEG blocks its caller."""
        batches = super().batches(pictures, batch_size=batch_size, workers=workers)
        try:
            yield from one_ahead(batches)
        finally:
            batches.close()

    def on_device(self, pictures: list[Picture], buffer: torch.Tensor, results: list[Read]) -> torch.Tensor:
        """As Pillow's, with the plain JPEG files decoded and resized on the device, and waited for.

        torchvision decodes on a stream of its own, which cannot be waited for in advance, into memory that the
        caller's stream may still use. So nothing is pending on our stream when a batch begins, and its memory comes
        from our stream alone.
        """
        if self.stream is None:
            return self._on_device(pictures, buffer, results)
        with torch.cuda.stream(self.stream):
            pixels = self._on_device(pictures, buffer, results)
        self.stream.synchronize()
        return pixels

    def _on_device(self, pictures: list[Picture], buffer: torch.Tensor, results: list[Read]) -> torch.Tensor:
        encoded = {row: result.encoded for row, result in enumerate(results) if result.encoded is not None}
        decoded = dict(zip(encoded, self._decode(list(encoded.values())), strict=True))
        for row, refused in [(row, found) for row, found in decoded.items() if isinstance(found, str)]:
            results[row] = Read(decode.read_picture(pictures[row], self.preprocess, buffer[row]), by_pil=refused)
            del decoded[row]
        pixels = buffer.to(self.device, non_blocking=True)  # after the last of Pillow's
        if decoded:
            pixels[list(decoded)] = self.preprocess.resize_on_device(list(decoded.values()))
        self.decoded += len(decoded)
        self.by_pil.update(result.by_pil for result in results if result.by_pil and not result.reason)
        return pixels

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
        others = ", ".join(f"{count} × {reason}" for reason, count in self.by_pil.most_common())
        text = "Pictures were decoded by nvJPEG, whose pixels differ a little from Pillow's"
        return f"{text}; by Pillow: {others}." if others else f"{text}."


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """`items`, each made in a thread while the caller uses the one before; errors come where the item would."""
    end = object()
    with ThreadPoolExecutor(1) as pool:  # leaving it waits for the item in the making
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item


def decode_on_device(encoded: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """uint8 pictures (3, h, w) on `device` from the bytes of JPEG files. RuntimeError where nvJPEG refuses one."""
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device)


def no_nvjpeg(preprocess: Preprocess, device: torch.device) -> str:
    """Why nvJPEG cannot decode for this preprocessing on this machine, in one line ('' if it can)."""
    if device.type != "cuda":
        return f"nvJPEG decodes on a CUDA device, this one is {device.type}"
    if reason := preprocess.not_resizable_on_device():
        return reason
    sample = io.BytesIO()
    Image.new("RGB", (16, 16), "green").save(sample, "JPEG")
    try:
        decode_on_device([torch.frombuffer(bytearray(sample.getvalue()), dtype=torch.uint8)], device)
    except (ImportError, RuntimeError, AttributeError, TypeError) as error:  # an old one takes no list, or no device
        return f"nvJPEG needs torchvision 0.20 or newer with CUDA ({files.first_line(error)})"
    return ""


def pick(name: str, preprocess: Preprocess, device: torch.device) -> PilDecoder:
    """The decoder called pil, nvjpeg, or auto (nvJPEG where it works).

    DecoderUnavailable for nvjpeg where it does not work, ValueError for an unknown name.
    """
    if name not in DECODERS:
        raise ValueError(f"unknown decoder {name!r}: known are {', '.join(DECODERS)}")
    if name == "pil":
        return PilDecoder(preprocess, device)
    if not (reason := no_nvjpeg(preprocess, device)):
        return NvJpegDecoder(preprocess, device)
    if name == "nvjpeg":
        raise DecoderUnavailable(f"decoder is 'nvjpeg', which cannot run: {reason}; set decoder to 'pil' or 'auto'")
    return PilDecoder(preprocess, device, reason)
