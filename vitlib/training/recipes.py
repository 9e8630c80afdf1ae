"""From a parameter set to a network in training: its base, what of it is trained, the run, and several compared."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback, set_seed
from transformers.modeling_outputs import BaseModelOutput

from vitlib.measure import stats
from vitlib.network import checkpoint, quantize, verify
from vitlib.pictures import preprocess, sources
from vitlib.pictures.decode import Decoded
from vitlib.pictures.preprocess import Preprocess
from vitlib.pictures.sources import Dataset, Labels
from vitlib.study import files, origin
from vitlib.study.params import is_hub_id, missing
from vitlib.study.records import COLUMNS
from vitlib.study.study import Study
from vitlib.training import adapters, demo, trainer
from vitlib.training.trainer import Examples, Recipe

# By the names of the parameter `recipes`: in words, the parameter `method`, and the factor on the learning rate, which
# is that of adapters. Adapters want about ten times the rate of full fine-tuning (Schulman et al. 2025, "LoRA Without
# Regret"). AdamW moves a weight by about the rate in a step, and a linear classifier has to grow from nearly zero in a
# few hundred steps: without adapters that grow with it, it gets ten times.
FROZEN_HEAD = "lora-frozen-head"
WAYS = {
    "head": ("head only", "head", 10.0),
    FROZEN_HEAD: ("LoRA, head frozen at random", "lora", 1.0),
    "lora": ("LoRA and head", "lora", 1.0),
    "qlora": ("QLoRA on NF4 and head", "qlora", 1.0),
    "full": ("all weights", "full", 0.1),
}


class FinetuneError(RuntimeError):
    """Training would not do what was asked; the message says what is wrong."""


@dataclass
class Base:
    """A network to fine-tune, its preprocessing, the labels of its new head, and its origin."""

    model: nn.Module
    preprocess: Preprocess
    labels: Labels
    device: torch.device
    origin: dict[str, object]


def load_base(study: Study, dataset: Dataset) -> Base:
    """The base that `base_model` names, with a new head for the classes of the data. FinetuneError where it is none."""
    checkpoint.quiet_libraries()
    settings, name, revision = study.settings, study.settings.base_model, study.settings.base_revision
    device, labels = checkpoint.pick_device(settings.device), sources.new_labels(dataset)
    labels.check(dataset, "valid")  # before the training and not only in the evaluation after it
    if name == "random":
        set_seed(settings.seed)
        model = checkpoint.new(settings.architecture, image_size=settings.image_size, labels=labels).to(device)
        pre = preprocess.new(settings.image_size)
    else:
        if reason := missing("base_model", name):
            raise FinetuneError(reason)
        folder = demo.base(study, device) if name == "pretrain" else files.resolve(name)
        source, quantized = name if is_hub_id(name) else str(folder), settings.method == "qlora"
        pre = preprocess.load(source, revision or None)
        set_seed(settings.seed)  # the new head's initialisation
        how = {"dtype": torch.float32, "quantized": quantized, "device": device}  # NF4 layers compute in bf16
        model = checkpoint.load_base(source, revision=revision, side=pre.side[0], labels=labels, **how)
    about = origin.describe(name, revision=revision, architecture=settings.architecture)
    return Base(model, pre, labels, device, about)


def make_trainable(study: Study, base: Base, *, frozen_head: bool = False) -> nn.Module:
    """The model with the parameters of `method` trainable, including the head unless it is to stay at random.

    Training in bf16 rounds the frozen weights once, here; what is trained stays in fp32, as do all weights where
    adapters without dropout are added into them (`adapters.SummedLinear`). AdapterError where a linear gets no adapter.
    """
    settings, model = study.settings, base.model
    if settings.method in ("lora", "qlora"):
        rank, alpha, dropout = settings.lora_rank, settings.lora_alpha, settings.lora_dropout
        summed = settings.method == "lora" and not dropout
        head = "" if frozen_head else quantize.CLASSIFIER
        model = adapters.attach(model, rank=rank, alpha=alpha, dropout=dropout, head=head, summed=summed)
    else:
        model.requires_grad_(settings.method == "full")
        model.classifier.requires_grad_(True)
    if settings.method != "full" and trainer.precision_of(settings.precision, base.device) == "bf16":
        adapters.round_frozen(model, torch.bfloat16)
    return model


def fit(study: Study, model: nn.Module, base: Base, decoded: dict[str, Decoded], **options: Any) -> pd.DataFrame:
    """Train `model` on the decoded splits as the study says; a row an epoch. `options` are those of `trainer.train`.

    A head alone is trained on class tokens that are computed once: without augmentation, and too fast to be resumed.
    """
    names = ("method", "lora_rank", "lora_alpha", "lora_dropout", "base_model", "base_revision", "architecture")
    options |= {"about": {name: getattr(study.settings, name) for name in names}, "device": base.device}
    examples = {split: Examples.of(decoded[split], base.labels) for split in ("train", "valid")}
    options |= {"pre": base.preprocess, "recipe": Recipe.of(study.settings)}
    return (_fit_head if study.settings.method == "head" else trainer.train)(model, examples, **options)


def _fit_head(model: nn.Module, examples: dict[str, Examples], **options: Any) -> pd.DataFrame:
    """`trainer.train` for the head, on class tokens. The epochs share the encoder's time and have its peak memory."""
    on_gpu, recipe, pre = options["device"].type == "cuda", options["recipe"], options["pre"]
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    tokens = {split: _class_tokens(model.eval(), part, pre, recipe.precision) for split, part in examples.items()}
    share = (time.perf_counter() - start) / recipe.epochs
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else float("nan")
    options |= {"pre": None, "recipe": replace(recipe, compile_training="never"), "keep": False, "resume": False}
    encoder, model.vit = model.vit, _Tokens()
    try:
        history = trainer.train(model, tokens, **options)
    finally:
        model.vit = encoder
    seconds = history["epoch_s"] + share
    speed = history["images_per_s"] * history["epoch_s"] / seconds
    return history.assign(epoch_s=seconds, images_per_s=speed, peak_vram_mb=history["peak_vram_mb"].clip(lower=peak))


class _Tokens(nn.Module):
    """In place of an encoder whose class tokens (n, hidden) are the inputs."""

    gradient_checkpointing = False  # transformers asks for it

    def forward(self, tokens: torch.Tensor, **_: object) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=tokens[:, None])


@torch.no_grad()
def _class_tokens(model: nn.Module, examples: Examples, pre: Preprocess, precision: str) -> Examples:
    """The encoder's class tokens (n, hidden) in fp32 on the CPU, computed in the arithmetic of training."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(trainer.precision_of(precision, model.device))
    with torch.autocast(model.device.type, dtype, enabled=dtype is not None):
        parts = tqdm(examples.pixels.split(64), "encoding", unit="batch")
        encoded = [model.vit(pre.normalise(part.to(model.device))).last_hidden_state[:, 0] for part in parts]
    return Examples(torch.cat(encoded).float().cpu(), examples.labels)


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
    """Train the base by each of the parameter `recipes`, always from the start; a row each, in `records/recipes.csv`.

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
    way, method, factor = WAYS[name]
    changes = {"method": method, "learning_rate": factor * study.settings.learning_rate}
    study = replace(study, settings=study.settings.model_copy(update=changes))
    base = load_base(study, dataset)
    if not head:
        head |= {key: value.cpu().clone() for key, value in base.model.classifier.state_dict().items()}
    base.model.classifier.load_state_dict(head)
    model = make_trainable(study, base, frozen_head=name == FROZEN_HEAD)
    memory = Memory(model)
    where = {"folder": study.training("recipes"), "keep": False, "callbacks": [memory]}
    history = fit(study, model, base, decoded, **where)
    top1, loss = history[["top1", "train_loss"]].iloc[-1]
    n, trainable = len(decoded["valid"].pictures), sum(p.numel() for p in model.parameters() if p.requires_grad)
    low, high = stats.wilson(round(top1 * n), n)
    row = {"recipe": name, "way": way, "learning_rate": study.settings.learning_rate, "n": n, "train_loss": loss}
    row |= {"top1": top1, "top1_low": low, "top1_high": high, "trainable": trainable}
    return row | {"images_per_s": history["images_per_s"].median(), **memory.split(history["peak_vram_mb"].max())}
