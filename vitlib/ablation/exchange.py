"""Passes of one network in many mixtures of weight formats, with the work shared that the mixtures have in common.

The network is loaded once and every linear layer gets a twin in each format. A configuration names the format of every
linear. The blocks before the first one in which two configurations differ are evaluated once for both, which saves half
of the work where one block or linear differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from vitlib.network import checkpoint, quantize
from vitlib.network.engine import finite
from vitlib.pictures import sources
from vitlib.pictures.sources import Dataset
from vitlib.study.study import Study
from vitlib.study.variants import Variant

FULL = "fp16"  # the format of a linear that is left as it is
# The linears of a block by what figures and records call them, in the order of a configuration's formats.
LINEARS = {name: f"attention.{name}_proj" for name in "qkvo"} | {name: f"mlp.{name}" for name in ("fc1", "fc2")}

Formats = tuple[str, ...]  # of the linears of a block, in the order of LINEARS
Twin = Callable[[str, nn.Linear], nn.Module]  # makes one of a linear, and of its name (`layers.3.mlp.fc1`)


@dataclass
class Subject:
    """The FP16 network, its validation pictures (n, 3, h, w) in uint8 with their class ids (n,), and training pictures.

    Formats are chosen on the training pictures `calibration` (m, 3, h, w) and judged on the others.
    """

    loaded: checkpoint.Loaded
    pixels: torch.Tensor
    labels: torch.Tensor
    calibration: torch.Tensor

    @property
    def blocks(self) -> nn.ModuleList:
        """The encoder blocks."""
        return self.loaded.model.vit.layers


def prepare(study: Study, dataset: Dataset | None = None) -> Subject:
    """The merged checkpoint in FP16, for bitsandbytes' int8 product, and the pictures (default: the study's)."""
    checkpoint.quiet_libraries()
    settings, dataset = study.settings, dataset or sources.load(study.settings)
    loaded = checkpoint.load(study.checkpoints, Variant("fp16"), checkpoint.pick_device(settings.device))
    loaded.labels.check(dataset, "valid")
    for split, count in (("train", settings.calibration_pictures), ("valid", settings.ablation_pictures)):
        dataset.splits[split] = sources.evenly(dataset.splits[split], count)
    decoded = sources.decode_splits(dataset, ["train", "valid"], loaded.preprocess, settings.workers)
    valid, calibration = decoded["valid"], decoded["train"].pixels
    return Subject(loaded, valid.pixels, loaded.labels.ids(valid.pictures), calibration)


@dataclass(frozen=True)
class Configuration:
    """The format of each linear, by block, and of the classifier; the patch embedding, a convolution, stays."""

    name: str
    blocks: tuple[Formats, ...]
    classifier: str = FULL


class Exchange:
    """A network and, by format, the twins of its linears, which the functions `twins` make when first needed.

    `block_runs` counts the evaluations of a block for a batch of pictures.
    """

    def __init__(self, model: nn.Module, twins: Mapping[str, Twin]) -> None:
        self.model, self.block_runs = model, 0
        self._twins, self._made = {FULL: lambda name, linear: linear, **twins}, {}

    def linear(self, name: str, kind: str) -> nn.Module:
        """The linear `name`, or its twin of the format `kind`."""
        if (name, kind) not in self._made:
            scope = self.model if name == quantize.CLASSIFIER else self.model.vit
            self._made[name, kind] = self._twins[kind](name, scope.get_submodule(name))
        return self._made[name, kind]

    def block(self, number: int, formats: Formats) -> nn.Module:
        """Block `number` with its linears in these formats; all else is shared with the network's own."""
        if (number, formats) not in self._made:
            kinds = {f"layers.{number}.{path}": kind for path, kind in zip(LINEARS.values(), formats, strict=True)}
            own = self.model.vit.layers[number]
            made = quantize.exchanged(own, lambda name, _: self.linear(name, kinds[name]), f"layers.{number}")
            self._made[number, formats] = made
        return self._made[number, formats]

    def logits(self, pixel_values: torch.Tensor, wanted: Sequence[Configuration]) -> dict[str, torch.Tensor]:
        """Logits (n, classes) of one batch by name; holds at most one activation for each block."""
        return dict(self._after(0, self.model.vit.embeddings(pixel_values), wanted))

    def _after(
        self, number: int, hidden: torch.Tensor, wanted: Sequence[Configuration]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and logits of the configurations with the activations `hidden` (n, tokens, width) before a block."""
        if number == len(self.model.vit.layers):
            tokens = self.model.vit.layernorm(hidden)[:, 0].contiguous()  # bitsandbytes' int8 product reads no strides
            yield from ((one.name, self.linear(quantize.CLASSIFIER, one.classifier)(tokens)) for one in wanted)
            return
        for formats in dict.fromkeys(one.blocks[number] for one in wanted):
            self.block_runs += 1
            group = [one for one in wanted if one.blocks[number] == formats]
            yield from self._after(number + 1, self.block(number, formats)(hidden), group)

    def outputs(
        self, pixels: torch.Tensor, wanted: Sequence[Configuration], loaded: checkpoint.Loaded, size: int, what: str
    ) -> dict[str, torch.Tensor]:
        """float32 logits (n, classes) on the CPU by name, of uint8 `pixels` (n, 3, h, w) in batches of `size`.

        `loaded` is the network that the linears are exchanged in; FloatingPointError for logits that are not finite.
        """
        own, parts = self.model.classifier.weight, []
        with torch.inference_mode():
            for batch in tqdm(pixels.split(size), f"{what}, {len(wanted)} configurations", unit="batch"):
                logits = self.logits(loaded.preprocess.normalise(batch.to(own.device), own.dtype), wanted)
                parts.append(torch.stack([logits[one.name] for one in wanted]).float().cpu())  # one copy, so one wait
        return dict(zip((one.name for one in wanted), finite(torch.cat(parts, dim=1), loaded), strict=True))
