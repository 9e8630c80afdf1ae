"""Who decodes a batch: Pillow in threads, or the GPU's JPEG decoder (nvJPEG through torchvision)."""

import io
import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import NamedTuple

import torch
from PIL import Image

from vitlib.pictures.decode import BadPicture, Picture, read_picture
from vitlib.pictures.preprocess import Preprocess
from vitlib.study import files

DECODERS = ("pil", "nvjpeg", "auto")
LEAST_BUFFERS = 4  # one in the network, one queued behind it, and two for the threads
Batch = tuple[list[Picture], torch.Tensor, list[str]]  # pictures, pixels on the device, a reason or '' for each


class DecoderUnavailable(RuntimeError):
    """A decoder that cannot run here; the message is the reason."""


class Read(NamedTuple):
    """What a thread made of a picture: it filled the row of the buffer, or left the `encoded` picture to the GPU."""

    reason: str = ""  # why it cannot be read
    encoded: torch.Tensor | None = None  # uint8 (bytes,): a plain JPEG file
    by_pil: str = ""  # why Pillow decoded it where the GPU decodes


class PilDecoder:
    """Pillow in the threads; the pixels that every other part of a study sees. `why` says why it is not another."""

    name = "pil"
    decoded = 0  # pictures that did not need Pillow

    def __init__(self, preprocess: Preprocess, device: torch.device, why: str = "") -> None:
        self.preprocess, self.device, self.why = preprocess, device, why

    def read(self, picture: Picture, row: torch.Tensor) -> Read:
        """What a thread does with a picture: fill `row` (uint8 (3, h, w)), or say why that fails."""
        return Read(read_picture(picture, self.preprocess, row))

    def on_device(self, pictures: list[Picture], buffer: torch.Tensor, results: list[Read]) -> torch.Tensor:
        """The batch (n, 3, h, w) uint8 on the device; queued, not waited for."""
        return buffer.to(self.device, non_blocking=True)

    def batches(self, pictures: Iterable[Picture], *, batch_size: int, workers: int) -> Iterator[Batch]:
        """All pictures in batches on the device, in order; close the iterator to stop the threads.

        Threads fill every free buffer; one is free again when the caller asks for the second batch after its own.
        Pictures are asked for when a buffer is free for them.
        """
        remaining, filling, before = iter(pictures), deque(), None
        groups = iter(lambda: list(islice(remaining, batch_size)), [])
        pool = ThreadPoolExecutor(workers)

        def fill(buffer: torch.Tensor | None) -> None:
            if (group := next(groups, None)) is not None:
                if buffer is None:  # only from pinned memory does a copy run while the host goes on
                    shape, pinned = (len(group), 3, *self.preprocess.side), self.device.type == "cuda"
                    buffer = torch.zeros(shape, dtype=torch.uint8, pin_memory=pinned)
                futures = [pool.submit(self.read, *one) for one in zip(group, buffer, strict=False)]
                filling.append((group, buffer, futures))

        try:
            # A batch in the network and two pictures a thread ahead of it.
            for _ in range(max(LEAST_BUFFERS, 2 + math.ceil(2 * workers / batch_size))):
                fill(None)
            while filling:
                group, buffer, futures = filling.popleft()
                results = [future.result() for future in futures]
                yield group, self.on_device(group, buffer[: len(group)], results), [one.reason for one in results]
                if before is not None:
                    fill(before)
                before = buffer
        finally:
            pool.shutdown(cancel_futures=True)

    def note(self) -> str:
        """What a reader must know about the pixels ('' where nothing differs from Pillow)."""
        return f"Pictures were decoded by Pillow: {self.why}." if self.why else ""


class NvJpegDecoder(PilDecoder):
    """The GPU's JPEG decoder for plain JPEG files, Pillow in the threads for all others.

    Pixels differ a little from Pillow's: nvJPEG has its own inverse DCT and chroma upsampling, and the resize rounds
    once. Do not compare accuracies picture by picture with a run on Pillow.
    """

    name = "nvjpeg"

    def __init__(self, preprocess: Preprocess, device: torch.device) -> None:
        super().__init__(preprocess, device)
        self.by_pil: Counter[str] = Counter()
        # Few small kernels and copies, which must not wait behind a whole network.
        self.stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def read(self, picture: Picture, row: torch.Tensor) -> Read:
        """The bytes of a plain JPEG file; for others Pillow fills `row`."""
        try:
            if picture.jpeg is None:
                raise BadPicture("not a file")
            return Read(encoded=torch.frombuffer(bytearray(picture.jpeg()), dtype=torch.uint8))
        except BadPicture as odd:
            return Read(read_picture(picture, self.preprocess, row), by_pil=str(odd))

    def batches(self, pictures: Iterable[Picture], *, batch_size: int, workers: int) -> Iterator[Batch]:
        """As Pillow's, each in a thread while the network computes the one before: nvJPEG blocks its caller."""
        batches = super().batches(pictures, batch_size=batch_size, workers=workers)
        with closing(batches), ThreadPoolExecutor(1) as pool:  # leaving it waits for the batch in the making
            coming = pool.submit(next, batches, None)
            while (batch := coming.result()) is not None:
                coming = pool.submit(next, batches, None)
                yield batch

    def on_device(self, pictures: list[Picture], buffer: torch.Tensor, results: list[Read]) -> torch.Tensor:
        """As Pillow's, with the plain JPEG files decoded and resized on the device, and waited for.

        torchvision decodes on a stream of its own, into memory that the caller's stream may still use. So the memory
        comes from our stream alone, and nothing is pending on it when a batch begins.
        """
        with torch.cuda.stream(self.stream):  # None, on a CPU, changes nothing
            encoded = {row: result.encoded for row, result in enumerate(results) if result.encoded is not None}
            decoded = dict(zip(encoded, self._decode(list(encoded.values())), strict=True))
            for row in [row for row, found in decoded.items() if isinstance(found, str)]:
                reason = read_picture(pictures[row], self.preprocess, buffer[row])
                results[row] = Read(reason, by_pil=decoded.pop(row))
            pixels = buffer.to(self.device, non_blocking=True)  # after the last of Pillow's
            if decoded:
                pixels[list(decoded)] = self.preprocess.resize_on_device(list(decoded.values()))
        if self.stream is not None:
            self.stream.synchronize()
        self.decoded += len(decoded)
        self.by_pil.update(result.by_pil for result in results if result.by_pil and not result.reason)
        return pixels

    def _decode(self, encoded: list[torch.Tensor]) -> list[torch.Tensor | str]:
        """Pictures on the device, or why nvJPEG refused them: one that it refuses fails the whole call."""
        try:
            return decode_on_device(encoded, self.device) if encoded else []
        except torch.OutOfMemoryError:  # of this batch, and no fault of a picture
            raise
        except RuntimeError as error:
            if len(encoded) == 1:
                return [f"nvJPEG refused it: {files.first_line(error)}"]
            return [self._decode([one])[0] for one in encoded]

    def note(self) -> str:
        """What a reader must know about the pixels, with the reasons why Pillow decoded some pictures."""
        others = ", ".join(f"{count} × {reason}" for reason, count in self.by_pil.most_common())
        by_pil = f"; by Pillow: {others}" if others else ""
        return f"Pictures were decoded by nvJPEG, whose pixels differ a little from Pillow's{by_pil}."


def decode_on_device(encoded: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """uint8 pictures (3, h, w) on `device` from the bytes of JPEG files. RuntimeError where nvJPEG refuses one."""
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device)


def no_nvjpeg(preprocess: Preprocess, device: torch.device) -> str:
    """Why nvJPEG cannot decode for this preprocessing on this machine, in one line ('' if it can)."""
    if device.type != "cuda":
        return f"nvJPEG decodes on a CUDA device, this one is {device.type}"
    if not preprocess.resizes_on_device:
        return "the checkpoint's preprocessing is not one bilinear or bicubic resize"
    sample = io.BytesIO()
    Image.new("RGB", (16, 16), "green").save(sample, "JPEG")
    try:
        decode_on_device([torch.frombuffer(bytearray(sample.getvalue()), dtype=torch.uint8)], device)
    except (ImportError, RuntimeError) as error:
        return f"nvJPEG needs torchvision with CUDA ({files.first_line(error)})"
    return ""


def pick(name: str, preprocess: Preprocess, device: torch.device) -> PilDecoder:
    """The decoder called pil, nvjpeg (DecoderUnavailable where it cannot run), or auto (nvJPEG where it can)."""
    if name not in DECODERS:
        raise ValueError(f"unknown decoder {name!r}: known are {', '.join(DECODERS)}")
    reason = no_nvjpeg(preprocess, device) if name != "pil" else ""
    if reason and name == "nvjpeg":
        raise DecoderUnavailable(f"decoder is 'nvjpeg', which cannot run: {reason}; set decoder to 'pil' or 'auto'")
    return PilDecoder(preprocess, device, reason) if reason or name == "pil" else NvJpegDecoder(preprocess, device)
