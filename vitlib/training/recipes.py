"""Ways to fine-tune, compared on one base: which weights are trained, how well, how fast and in how much memory."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import NamedTuple

import pandas as pd
import torch
from torch import nn
from transformers import TrainerCallback

from vitlib.measure import stats
from vitlib.network import verify
from vitlib.pictures.decode import Decoded
from vitlib.pictures.sources import Dataset
from vitlib.study.records import COLUMNS
from vitlib.study.study import Study
from vitlib.training import bases


class Way(NamedTuple):
    """A recipe: the parameter `method`, whether the new head stays at random, and the factor on the learning rate."""

    label: str
    method: str
    rate: float = 1.0
    frozen_head: bool = False


# The study's learning rate is that of adapters. Adapters want about ten times the rate of full fine-tuning (Schulman
# et al. 2025, "LoRA Without Regret"). AdamW moves a weight by at most about the rate in a step, and a linear classifier
# has to grow from nearly zero in a few hundred steps: alone, without adapters that grow with it, it gets ten times.
WAYS = {
    "head": Way("head only", "head", rate=10.0),
    "lora-frozen-head": Way("LoRA, head frozen at random", "lora", frozen_head=True),
    "lora": Way("LoRA and head", "lora"),
    "qlora": Way("QLoRA on NF4 and head", "qlora"),
    "full": Way("all weights", "full", rate=0.1),
}


class Memory(TrainerCallback):
    """Counts what the training of `model` holds in memory, in its first two steps (the scaler of FP16 may skip one)."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.parts = model, {"weights_mb": verify.model_mb(model)}

    def on_optimizer_step(self, args: object, state: object, control: object, **now: object) -> None:
        """Gradients and AdamW's two states exist between the step and the next `zero_grad`, activations do not."""
        if state.global_step > 1:
            return
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        states = [value for state in now["optimizer"].state.values() for value in state.values()]
        for part, tensors in (("gradients_mb", gradients), ("optimizer_mb", states)):
            self.parts[part] = sum(tensor.nbytes for tensor in tensors) / 2**20
        on_gpu = gradients[0].is_cuda
        self.resident = torch.cuda.memory_allocated() / 2**20 if on_gpu else float("nan")

    def split(self, peak_mb: float) -> dict[str, float]:
        """Megabytes by part and their sum, where the whole process has this peak (NaN without a GPU).

        Activations, and workspaces of libraries, are what the peak has beyond all that stays: the three parts, the
        pictures, and other networks.
        """
        parts = self.parts | {"activations_mb": peak_mb - self.resident}
        return parts | {"peak_mb": sum(parts.values())}


def compare(study: Study, dataset: Dataset, decoded: dict[str, Decoded]) -> pd.DataFrame:
    """Train the base anew by each of the parameter `recipes`; a row each, in `records/recipes.csv`.

    All start from the same weights and the same new head, and have the study's epochs, batch size, seed and precision.
    Only the learning rate has a factor (`WAYS`); none was tuned. top1 is of the last epoch, with Wilson's interval.
    """
    rows, head = [], {}
    for name in study.settings.recipes:
        rows.append(_row(study, name, dataset, decoded, head))
        gc.collect()  # the Trainer and its callbacks hold one another, and with them the network
        torch.cuda.empty_cache()
    return study.write("recipes", pd.DataFrame(rows, columns=COLUMNS["recipes"]))


def _row(study: Study, name: str, dataset: Dataset, decoded: dict[str, Decoded], head: dict) -> dict[str, object]:
    """Train by one recipe. The first one's new head goes to `head`, and the others start from it."""
    way = WAYS[name]
    settings = study.settings.model_copy(
        update={"method": way.method, "learning_rate": way.rate * study.settings.learning_rate}
    )
    own = replace(study, settings=settings)
    base = bases.load_base(own, dataset)
    if not head:
        head |= {key: value.cpu().clone() for key, value in base.model.classifier.state_dict().items()}
    base.model.classifier.load_state_dict(head)
    model = bases.make_trainable(own, base, frozen_head=way.frozen_head)
    memory = Memory(model)
    where = {"folder": study.training("recipes"), "keep": False, "callbacks": [memory]}
    history = bases.fit(settings, model, base, decoded, **where)
    last, n = history.iloc[-1], len(decoded["valid"].pictures)
    low, high = stats.wilson(round(last["top1"] * n), n)
    row = {"recipe": name, "learning_rate": settings.learning_rate, "n": n, "train_loss": last["train_loss"]}
    row |= {"top1": last["top1"], "top1_low": low, "top1_high": high, "trainable": _trainable(model)}
    return row | {"images_per_s": history["images_per_s"].median(), **memory.split(history["peak_vram_mb"].max())}


def _trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
