"""Pictures in, logits out, while decoding and the network work at the same time.

Threads decode and resize into a few pinned buffers that are used in turn (Pillow and torch release the interpreter's
lock while they work). The host queues the copy, the normalisation and the network of a batch without waiting for the
device, and fetches the logits of the batch before. Memory does not grow with the number of pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from tqdm import tqdm

from vitlib.network.engine import Engine, finite
from vitlib.pictures import decoders
from vitlib.pictures.decode import Picture
from vitlib.pictures.decoders import PilDecoder


class Batch(NamedTuple):
    """Pictures in order with '' or the reason why each cannot be read, and the logits of the readable ones.

    `logits` are float32 (readable, classes) on the CPU.
    """

    pictures: list[Picture]
    reasons: list[str]
    logits: torch.Tensor


@dataclass
class Passed:
    """Readable pictures with their float32 logits (n, classes), the skipped ones (file, reason), and the decoder.

    `decoder` is pil or nvjpeg, `note` says what differs from plain Pillow ('' where nothing does), and `on_device`
    counts the pictures that nvJPEG decoded.
    """

    logits: torch.Tensor
    pictures: list[Picture]
    skipped: list[tuple[str, str]]
    decoder: str
    note: str
    on_device: int


def batches(
    pictures: Iterable[Picture], engine: Engine, source: PilDecoder, *, batch_size: int, workers: int
) -> Iterator[Batch]:
    """All pictures in order, a batch at a time, each yielded while the device computes the next.

    Every call of the network has `batch_size` pictures except the last: the place of an unreadable one is filled with a
    copy of another picture of its batch, whose logits are dropped. A batch without a readable picture makes no call.
    Close the iterator to stop the threads. FloatingPointError for logits that are not finite.
    """
    waiting = None
    # Closed here, so that an error in the network stops the threads before it is shown.
    with closing(source.batches(pictures, batch_size=batch_size, workers=workers)) as decoded:
        for one in chain(decoded, [None]):
            queued = one and (one[0], one[2], _queue(engine, one[1], one[2]))
            if waiting:  # the device is busy with this batch while the caller has the one before
                group, reasons, fetch = waiting
                yield Batch(group, reasons, finite(fetch(), engine.loaded))
            waiting = queued


def classify(pictures: list[Picture], engine: Engine, *, batch_size: int, workers: int, decoder: str) -> Passed:
    """`batches` of a list together, with a progress bar."""
    loaded, parts, good, skipped = engine.loaded, [], [], []
    source = decoders.pick(decoder, loaded.preprocess, loaded.device)
    found = batches(pictures, engine, source, batch_size=batch_size, workers=workers)
    with closing(found), tqdm(desc="pictures", total=len(pictures), unit="img") as bar:
        for batch in found:
            parts.append(batch.logits)
            good += [picture for picture, reason in zip(batch.pictures, batch.reasons, strict=True) if not reason]
            skipped += [(one.file, reason) for one, reason in zip(batch.pictures, batch.reasons, strict=True) if reason]
            bar.update(len(batch.pictures))
    logits = torch.cat(parts) if parts else torch.empty(0, len(loaded.labels.names))
    return Passed(logits, good, skipped, source.name, source.note(), source.decoded)


def _queue(engine: Engine, pixels: torch.Tensor, reasons: list[str]) -> Callable[[], torch.Tensor]:
    """Queue the network and the copy of its logits to the host.

    The function returned gives the logits of the readable rows, when the device is done with them (and so with the
    batch's host buffer).
    """
    loaded, rows = engine.loaded, [row for row, reason in enumerate(reasons) if not reason]
    if not rows:
        return lambda: torch.empty(0, len(loaded.labels.names))
    if pixels.is_cuda:  # memory of the decoder's stream, which must not be reused before this stream is done with it
        pixels.record_stream(torch.cuda.current_stream(pixels.device))
    for row in set(range(len(reasons))) - set(rows):
        pixels[row].copy_(pixels[rows[0]])
    logits = engine(loaded.preprocess.normalise(pixels, loaded.dtype)).float()
    if not logits.is_cuda:
        return lambda: logits[rows]
    host = torch.empty(logits.shape, dtype=torch.float32, pin_memory=True)
    host.copy_(logits, non_blocking=True)
    done = torch.cuda.current_stream(logits.device).record_event()

    def fetch() -> torch.Tensor:
        done.synchronize()
        return host[rows]  # a copy: the pinned memory is released

    return fetch
