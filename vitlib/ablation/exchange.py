"""Passes of one network in many mixtures of weight formats, with the work shared that the mixtures have in common.

The network is loaded once and every linear layer gets a twin in each format. A configuration names the format of every
linear. The blocks before the first one in which two configurations differ are evaluated once for both, which saves half
of the work where one block or linear differs. Configurations that have diverged but reach a block with the same formats
again are batched into one call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
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

TOGETHER = 256  # most pictures in one call of a block, where configurations are batched
MOST = 64  # configurations in a pass, which bounds the activations held
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


State = tuple[torch.Tensor, list[Configuration]]  # activations (n, tokens, hidden), and the configurations with them


class Exchange:
    """A network and, by format, the twins of its linears, which the functions `twins` make when first needed.

    Several configurations run in calls of at most TOGETHER pictures, but one by one where a format of `alone` is used,
    whose product depends on the whole batch. `block_runs` counts the evaluations of a block for a batch of pictures.
    """

    def __init__(self, model: nn.Module, twins: Mapping[str, Twin], alone: Collection[str] = ()) -> None:
        self.model, self.alone, self.block_runs = model, set(alone), 0
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
        """Logits (n, classes) of one batch by name; holds at most two activations for each of `wanted`."""
        states = [(self.model.vit.embeddings(pixel_values), list(wanted))]
        for number in range(len(self.model.vit.layers)):
            states = self._step(states, number)
        found = {}
        for hidden, group in states:
            tokens = self.model.vit.layernorm(hidden)[:, 0, :]
            found |= {one.name: self.linear(quantize.CLASSIFIER, one.classifier)(tokens) for one in group}
        return found

    def _step(self, states: list[State], number: int) -> list[State]:
        """States after block `number`, of the configurations with the same formats in it side by side."""
        after = []
        for formats in dict.fromkeys(one.blocks[number] for _, group in states for one in group):
            parted = [(hidden, [one for one in group if one.blocks[number] == formats]) for hidden, group in states]
            going = [(hidden, group) for hidden, group in parted if group]
            self.block_runs += len(going)
            block, size = self.block(number, formats), len(states[0][0])
            most = 1 if self.alone & set(formats) else max(1, TOGETHER // size)
            for first in range(0, len(going), most):
                hidden, groups = zip(*going[first : first + most], strict=True)
                outputs = block(hidden[0] if len(hidden) == 1 else torch.cat(hidden)).split(size)
                after += zip(outputs, groups, strict=True)
        return after

    def outputs(
        self, pixels: torch.Tensor, wanted: Sequence[Configuration], loaded: checkpoint.Loaded, size: int, what: str
    ) -> dict[str, torch.Tensor]:
        """float32 logits (n, classes) on the CPU by name, of uint8 `pixels` (n, 3, h, w) in batches of `size`.

        `loaded` is the network that the linears are exchanged in; FloatingPointError for logits that are not finite.
        """
        own, parts = self.model.classifier.weight, []
        with torch.inference_mode():
            for batch in tqdm(pixels.split(size), f"{what}, {len(wanted)} configurations", unit="batch"):
                x, logits = loaded.preprocess.normalise(batch.to(own.device), own.dtype), {}
                for first in range(0, len(wanted), MOST):
                    logits |= self.logits(x, wanted[first : first + MOST])
                parts.append(torch.stack([logits[one.name] for one in wanted]).float().cpu())  # one copy, so one wait
        return dict(zip((one.name for one in wanted), finite(torch.cat(parts, dim=1), loaded), strict=True))
