"""Repair of a quantized network: its codes stay as they are, and little beside them is trained.

Three ways, each with a fixed number of epochs and several seeds; no validation picture chooses anything. The weights
are dequantized for training, so a step computes with the numbers of the quantized network in the arithmetic of
fine-tuning; what was trained is then put into the quantized network, and that one is measured.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from transformers import set_seed

from vitlib.measure import stats
from vitlib.network import checkpoint, engine, verify
from vitlib.network.checkpoint import Loaded
from vitlib.study.study import Study
from vitlib.study.variants import Variant
from vitlib.training import adapters, trainer
from vitlib.training.trainer import Examples, Recipe

METHODS = {  # in words, and whether adapters are trained, and by the teacher
    "labels": ("adapters, trained on the labels (QLoRA)", True, False),
    "distil": ("adapters, distilled from FP16", True, True),
    "biases": ("biases and norms, distilled from FP16", False, True),
}
RANK = 4  # 0.25 bits a weight in a ViT-S: with NF4's 4.13 still under 4.6, which rank 8 is not
ADAPTERS = {"rank": RANK, "alpha": 4 * RANK, "dropout": 0.0, "head": ""}
# The learning rate is that of QLoRA (Dettmers et al. 2023).
RECIPE = Recipe(
    epochs=1, train_batch_size=32, learning_rate=2e-4, weight_decay=0.0, warmup=0.1, label_smoothing=0.0, crop_area=0.6,
    precision="auto", seed=0, compile_training="auto",
)  # fmt: skip
BATCH = 32  # of the measurement


def repair(
    study: Study, teacher: Loaded, start: str, examples: Mapping[str, Examples], *,
    methods: Iterable[str] = tuple(METHODS), seeds: Iterable[int] = (0, 1, 2),
) -> pd.DataFrame:  # fmt: skip
    """Repair the study's checkpoint of the quantized format `start` for `repair_epochs`, by every method and seed.

    Returns a row for the plain network (method "none", seed −1) and for each repaired one, with the columns of the
    record `repair`, measured on `examples["valid"]`. The FP16 network `teacher` and the labels teach on
    `examples["train"]` alone.
    """
    epochs, valid = study.settings.repair_epochs, examples["valid"]
    load = partial(checkpoint.load, study.checkpoints, Variant(start), teacher.device)
    network = load()
    bits, weights = bits_per_weight(network.model)
    target, plain = (engine.logits(engine.Engine(loaded), valid.pixels, BATCH) for loaded in (teacher, network))
    row = {"start": start, "method": "none", "seed": -1, "epochs": 0, "bits": bits, "train_loss": float("nan")}
    rows = [row | _measured(plain, target, plain, valid.labels)]
    for method, seed in itertools.product(methods, seeds):
        recipe = replace(RECIPE, epochs=epochs, seed=seed)
        loaded, added, loss = repaired(load, teacher, examples, method=method, recipe=recipe)
        row = {"start": start, "method": method, "seed": seed, "epochs": epochs, "train_loss": loss}
        row["bits"] = bits + 16 * added / weights
        found = engine.logits(engine.Engine(loaded), valid.pixels, BATCH)
        rows.append(row | _measured(found, target, plain, valid.labels))
    return pd.DataFrame(rows)


def repaired(
    load: Callable[[], Loaded], teacher: Loaded, examples: Mapping[str, Examples], *, method: str, recipe: Recipe
) -> tuple[Loaded, int, float]:
    """The network that `load` loads, repaired in FP16; the parameters added to it; the last epoch's training loss."""
    _, adapted, distilled = METHODS[method]
    loaded, device = load(), teacher.device
    set_seed(recipe.seed)
    student = loaded.model.dequantize(dtype=torch.float32).float()
    if adapted:
        student = adapters.attach(student, **ADAPTERS, summed=True)
    else:  # the vectors of a network are its biases and the weights of its norms
        for parameter in student.parameters():
            parameter.requires_grad_(parameter.ndim == 1)
    if trainer.precision_of(recipe.precision, device) == "bf16":
        adapters.round_frozen(student, torch.bfloat16)
    guide = teacher.model if distilled else None
    if distilled and device.type == "cpu":  # where FP16 is slow
        guide = copy.deepcopy(guide).float()
    with tempfile.TemporaryDirectory() as folder:
        how = {"pre": loaded.preprocess, "recipe": recipe, "device": device, "folder": Path(folder), "keep": False}
        history = trainer.train(student, examples, teacher=guide, **how)
    trained = {name: value for name, value in student.named_parameters() if value.requires_grad}
    network = load().model
    network = adapters.attach(network, **ADAPTERS, summed=False) if adapted else network
    for name, value in trained.items():
        network.get_parameter(name).data = value.detach().to(loaded.dtype)
    added = sum(value.numel() for value in trained.values()) if adapted else 0
    return replace(loaded, model=network.eval()), added, float(history["train_loss"].iloc[-1])


def bits_per_weight(model: nn.Module) -> tuple[float, int]:
    """Bits that the encoder's linears keep in memory for each of their weights (scales included), and their number."""
    linears = [module for module in model.vit.layers.modules() if hasattr(module, "in_features")]
    weights = sum(linear.in_features * linear.out_features for linear in linears)
    size = sum(verify.model_mb(linear) * verify.MB - linear.bias.nbytes for linear in linears)
    return 8 * size / weights, weights


def _measured(
    logits: torch.Tensor, target: torch.Tensor, plain: torch.Tensor, labels: torch.Tensor
) -> dict[str, float]:
    """Accuracy with Wilson's interval, its difference from the plain network's, and the distance from the FP16 one."""
    right, before = (stats.topk_right(each.numpy(), labels.numpy()) for each in (logits, plain))
    kl = stats.paired_bootstrap(stats.kl_divergence(target.numpy(), logits.numpy()))
    row = {"n": len(right)} | stats.columns("top1", stats.proportion(right))
    row |= stats.columns("difference", stats.paired_difference(before, right)) | stats.columns("logit_kl", kl)
    return row | {"flips": stats.flips(target.numpy().argmax(1), logits.numpy().argmax(1))}
