"""Pictures in, logits out, while decoding and the network work at the same time.

Threads decode and resize into a few pinned buffers that are used in turn (Pillow and torch release the interpreter's
lock while they work). The host queues the copy, the normalisation and the network of a batch without waiting for the
device, and fetches the logits of the batch before. Memory does not grow with the number of pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import torch
from tqdm import tqdm

from vitlib.network.engine import Engine, finite
from vitlib.pictures import decoders
from vitlib.pictures.decode import Picture


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


def classify(pictures: list[Picture], engine: Engine, *, batch_size: int, workers: int, decoder: str) -> Passed:
    """Logits of every readable picture, in order; unreadable ones are named with the reason.

    Every call of the network has `batch_size` pictures except the last: the place of an unreadable one is filled with a
    copy of another picture of its batch, whose logits are dropped. A batch without a readable picture makes no call.
    FloatingPointError for logits that are not finite.
    """
    loaded = engine.loaded
    source = decoders.pick(decoder, loaded.preprocess, loaded.device)
    fetch, parts, good, skipped = list, [], [], []  # before the first batch there is nothing to fetch
    batches = source.batches(pictures, batch_size=batch_size, workers=workers)
    # Closed here, so that an error in the network stops the threads before it is shown.
    with closing(batches), tqdm(desc="pictures", total=len(pictures), unit="img") as bar:
        for group, pixels, reasons in batches:
            fetch_next = _queue(engine, pixels, reasons)
            parts += fetch()  # of the batch before: the device is busy with this one meanwhile
            fetch = fetch_next
            good += [picture for picture, reason in zip(group, reasons, strict=True) if not reason]
            skipped += [(picture.file, reason) for picture, reason in zip(group, reasons, strict=True) if reason]
            bar.update(len(group))
        parts += fetch()
    logits = finite(torch.cat(parts), loaded) if parts else torch.empty(0, len(loaded.labels.names))
    return Passed(logits, good, skipped, source.name, source.note(), source.decoded)


def _queue(engine: Engine, pixels: torch.Tensor, reasons: list[str]) -> Callable[[], list[torch.Tensor]]:
    """Queue the network and the copy of its logits to the host.

    The function returned gives the logits of the readable rows, when the device is done with them (and so with the
    batch's host buffer); none where no picture of the batch is readable.
    """
    rows = [row for row, reason in enumerate(reasons) if not reason]
    if not rows:
        return list
    if pixels.is_cuda:  # memory of the decoder's stream, which must not be reused before this stream is done with it
        pixels.record_stream(torch.cuda.current_stream(pixels.device))
    for row in set(range(len(reasons))) - set(rows):
        pixels[row].copy_(pixels[rows[0]])
    loaded = engine.loaded
    logits = engine(loaded.preprocess.normalise(pixels, loaded.dtype)).float()
    if not logits.is_cuda:
        return lambda: [logits[rows]]
    host = torch.empty(logits.shape, dtype=torch.float32, pin_memory=True)
    host.copy_(logits, non_blocking=True)
    done = torch.cuda.current_stream(logits.device).record_event()

    def fetch() -> list[torch.Tensor]:
        done.synchronize()
        return [host[rows]]  # a copy: the pinned memory is released

    return fetch
