"""Twelve sample pictures and a checkpoint's logits for them, with which another machine compares its own.

The pictures are drawn, so that no user's picture is published with a checkpoint. Each has another size, so that a
wrong resize shows.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageSequence
from torch import nn

from vitlib.pictures import synthetic
from vitlib.pictures.preprocess import Preprocess
from vitlib.study import records

PICTURES, LOGITS = "samples.tif", "samples.json"  # TIFF stores pictures of several sizes in one file, without loss
SIZES = (  # width and height in pixels
    (61, 83), (97, 53), (111, 149), (201, 135), (225, 171), (67, 67),
    (299, 211), (129, 197), (45, 91), (181, 73), (159, 271), (127, 127),
)  # fmt: skip
COLOURS = 64  # of a picture: more of its grain would make the file too large
# Roundings of one pass that add up: about 10 in each of 24 blocks (ViT-L), as a random walk √240 ≈ 16, and a reserve
# of 2. In FP16 (3 %) that is more than any implementation differs from another one on an H200 (at most 0.8 %).
ROUNDINGS = 32
PRODUCTS = {"fp8": torch.finfo(torch.float8_e4m3fn).eps}  # their inputs are rounded again: 2 % to 10 % were measured


@functools.cache  # a study saves several checkpoints
def draw() -> tuple[Image.Image, ...]:
    """The twelve pictures, of SIZES and with a palette of COLOURS."""
    flowers, images = synthetic.classes("in the study"), []
    for number, (wide, high) in enumerate(SIZES):
        side = max(wide, high)
        drawn = synthetic.render(flowers[number], index=number, split="test", seed=12, size=side)
        left, top = (side - wide) // 2, (side - high) // 2
        images.append(Image.fromarray(drawn).crop((left, top, left + wide, top + high)).quantize(COLOURS))
    return tuple(images)


def pixels(images: Sequence[Image.Image], pre: Preprocess) -> torch.Tensor:
    """The pictures as the network's preprocessing resizes them, uint8 (12, 3, h, w)."""
    return torch.stack([pre.resize(image.convert("RGB")) for image in images])


@torch.no_grad()
def save(model: nn.Module, pre: Preprocess, folder: Path) -> None:
    """Write the pictures and the logits of `model`, a transformers network, for all of them in one pass, into `folder`.

    FloatingPointError where they are not finite.
    """
    first, *others = draw()
    first.save(folder / PICTURES, save_all=True, append_images=others, compression="tiff_adobe_deflate")
    training, values = model.training, pre.normalise(pixels(_pictures(folder), pre).to(model.device), model.dtype)
    model.eval()
    logits = model(pixel_values=values).logits.float().cpu()
    model.train(training)
    if not logits.isfinite().all():
        raise FloatingPointError("the network gives logits that are not finite: its checkpoint is not saved")
    about = {"dtype": str(model.dtype).removeprefix("torch."), "device": model.device.type}
    rows = [[float(f"{value:.9g}") for value in row] for row in logits.tolist()]
    records.write_json({**about, "logits": rows}, folder / LOGITS)


def read(folder: Path) -> tuple[list[Image.Image], torch.Tensor, torch.dtype] | None:
    """The pictures, the stored logits (12, classes) and the dtype that they were computed in; None without them."""
    if not (folder / LOGITS).is_file():
        return None
    stored = records.read_json(folder / LOGITS)
    return _pictures(folder), torch.tensor(stored["logits"]), getattr(torch, stored["dtype"])


def _pictures(folder: Path) -> list[Image.Image]:
    with Image.open(folder / PICTURES) as file:
        return [page.convert("RGB") for page in ImageSequence.Iterator(file)]


def tolerance(*dtypes: torch.dtype, product: str = "") -> float:
    """The relative difference that logits computed in these dtypes may have, with products in `Format.product`."""
    return max(ROUNDINGS * max(torch.finfo(dtype).eps for dtype in dtypes), PRODUCTS.get(product, 0.0))
