"""Train a network on decoded pictures with `transformers.Trainer`, and survive being killed. Level 2.

Two things are added to the Trainer. Pictures stay uint8 until they are on the device, where a batch is cropped,
flipped and normalised by the checkpoint's own preprocessing. And a training checkpoint counts only once a manifest
with the checksum of each of its files stands beside them: the Trainer writes several files one after the other and
would resume from a part of them without a word.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from peft import PeftModel
from torch import nn
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import sort_checkpoints

from vitlib import preprocess, records
from vitlib.preprocess import Preprocess

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Recipe:
    """How to train: what `Parameters` says for fine-tuning, or for the pretraining of the demo's base."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup: float
    label_smoothing: float
    crop_area: float
    precision: str
    seed: int


@dataclass(frozen=True)
class Examples:
    """uint8 pixels (n, 3, h, w) with class ids (n,)."""

    pixels: torch.Tensor
    labels: torch.Tensor


class ResumeError(ValueError):
    """Training cannot go on from what is there; the message says why and what to do."""


class _Rows(torch.utils.data.Dataset):
    """Row numbers only: a batch is gathered in one indexing operation instead of picture by picture."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples.labels)

    def __getitem__(self, row: int) -> tuple["_Rows", int]:
        return self, row

    @staticmethod
    def collate(items: list[tuple["_Rows", int]]) -> dict[str, torch.Tensor]:
        examples, rows = items[0][0].examples, torch.tensor([row for _, row in items])
        return {"pixels": examples.pixels[rows], "labels": examples.labels[rows]}


class ImageTrainer(Trainer):
    """The Trainer over uint8 pictures, with augmentation on the device and training checkpoints that are whole."""

    def __init__(self, *args: object, pre: Preprocess, recipe: Recipe, identity: dict, **kwargs: object) -> None:
        super().__init__(*args, data_collator=_Rows.collate, compute_metrics=_metrics, **kwargs)
        self.pre, self.recipe, self.identity = pre, recipe, identity

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **_: object
    ) -> torch.Tensor | tuple:
        """Cross entropy of a batch; augmented while training, smoothed only then."""
        pixels, labels = inputs["pixels"], inputs["labels"]
        if model.training:
            # Seeded by the step: a resumed run cuts the same crops as one that was never stopped.
            generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.state.global_step)
            pixels = preprocess.augment(pixels, crop_area=self.recipe.crop_area, generator=generator)
        logits = model(pixel_values=self.pre.normalise(pixels)).logits
        smoothing = self.recipe.label_smoothing if model.training else 0.0
        loss = nn.functional.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
        return (loss, {"logits": logits.float()}) if return_outputs else loss

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = model or self.model
        if isinstance(model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        # transformers 5 saves a ViT under its old module names. Only from_pretrained maps them back: the Trainer
        # would warn of missing keys and go on with the weights that the network was initialised with.
        saved = type(model).from_pretrained(resume_from_checkpoint, dtype=next(model.parameters()).dtype)
        model.load_state_dict(saved.state_dict(), strict=True)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        sums = {file.name: records.checksum(file) for file in sorted(folder.iterdir()) if file.name != MANIFEST}
        records.write_json({"identity": self.identity, "files": sums}, folder / MANIFEST)


def _metrics(prediction: object) -> dict[str, float]:
    logits, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return {"top1": ranked[:, 0].float().mean().item(), "top5": ranked.any(dim=1).float().mean().item()}


class _EpochClock(TrainerCallback):
    """Puts seconds, images per second and peak memory of each epoch into the log history, and shows a progress bar."""

    def __init__(self, pictures: int) -> None:
        self.pictures = pictures

    def on_train_begin(self, args: object, state: object, control: object, **_: object) -> None:
        """Show the bar."""
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step")

    def on_epoch_begin(self, args: object, state: object, control: object, **_: object) -> None:
        """Start the clock."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.start = time.perf_counter()

    def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:
        """Move the bar."""
        self.bar.update(state.global_step - self.bar.n)

    def on_evaluate(self, args: object, state: object, control: object, metrics: dict, **_: object) -> None:
        """Show the last validation accuracy beside the bar."""
        self.bar.set_postfix(epoch=round(state.epoch), top1=f"{metrics['eval_top1']:.3f}")

    def on_train_end(self, args: object, state: object, control: object, **_: object) -> None:
        """Close the bar."""
        self.bar.close()

    def on_epoch_end(self, args: object, state: object, control: object, **_: object) -> None:
        """Stop it, before validation runs."""
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.start
        state.log_history.append(
            {
                "epoch": state.epoch,
                "epoch_s": seconds,
                "images_per_s": self.pictures / seconds,
                "peak_vram_mb": torch.cuda.max_memory_allocated() / 2**20 if cuda else None,
            }
        )


def train(
    model: nn.Module,
    examples: Mapping[str, Examples],
    *,
    pre: Preprocess,
    recipe: Recipe,
    folder: Path,
    device: torch.device,
    resume: bool = False,
    about: Mapping[str, object] | None = None,
) -> pd.DataFrame:
    """Train `model` in place on `examples['train']`, validate each epoch, and return a row an epoch.

    `folder` receives the training checkpoints of the last two epochs. With `resume` it goes on from the newest whole
    one. Columns: those of `records/finetune.csv`. `about` holds further settings that make a run another run.
    ResumeError where the folder holds a run of another recipe, other settings, other data or other initial weights.
    """
    set_seed(recipe.seed)
    identity = identity_of(model, examples, recipe, about or {})
    start_from = newest_whole_checkpoint(folder, identity) if resume else None
    if start_from is None:
        shutil.rmtree(folder, ignore_errors=True)
    trainer = ImageTrainer(
        model,
        _arguments(recipe, folder, device),
        train_dataset=_Rows(examples["train"]),
        eval_dataset=_Rows(examples["valid"]),
        callbacks=[_EpochClock(len(examples["train"].labels))],
        pre=pre,
        recipe=recipe,
        identity=identity,
    )
    trainer.remove_callback(PrinterCallback)  # it prints a dictionary an epoch; the bar and the table say the same
    trainer.train(resume_from_checkpoint=str(start_from) if start_from else None)
    return _history(trainer.state.log_history)


def identity_of(
    model: nn.Module, examples: Mapping[str, Examples], recipe: Recipe, about: Mapping[str, object]
) -> dict[str, object]:
    """What makes a training run this one: its settings, and checksums of its pictures and initial weights."""
    data = hashlib.sha256()
    for split in sorted(examples):
        data.update(examples[split].pixels.numpy().tobytes() + examples[split].labels.numpy().tobytes())
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(name.encode())
        if isinstance(tensor, torch.Tensor):
            weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {**vars(recipe), **about, "pictures": data.hexdigest(), "initial weights": weights.hexdigest()}


def _arguments(recipe: Recipe, folder: Path, device: torch.device) -> TrainingArguments:
    precision = recipe.precision
    if precision == "auto":
        precision = "fp32" if device.type == "cpu" else "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=max(recipe.batch_size, 64),
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        warmup_steps=recipe.warmup,  # below 1 it is a share of all steps
        lr_scheduler_type="cosine",
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=device.type == "cpu",
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        save_total_limit=2,  # the one before stays until the next is whole
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        report_to="none",
        disable_tqdm=True,
        seed=recipe.seed,
        data_seed=recipe.seed,
    )


def newest_whole_checkpoint(folder: Path, identity: Mapping[str, object]) -> Path | None:
    """The newest training checkpoint whose files all match its manifest; damaged ones are named and passed over.

    None where there is none. ResumeError where one was written by a run with another recipe or other data.
    """
    if not folder.is_dir():
        return None
    for path in reversed([Path(name) for name in sort_checkpoints(str(folder))]):
        if fault := damage(path):
            print(f"{path.name} is not whole ({fault}): passed over")
            continue
        written_for = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["identity"]
        if written_for != json.loads(json.dumps(identity)):
            raise ResumeError(
                f"{path.name} was written with other settings ({_difference(written_for, identity)}): "
                "set them back, or set resume to false to start anew"
            )
        print(f"going on from {path.name}")
        return path
    return None


def damage(checkpoint: Path) -> str:
    """What is wrong with a training checkpoint ('' if it is whole)."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return "no readable manifest: saving was cut off"
    present = {file.name for file in checkpoint.iterdir()} - {MANIFEST}
    if missing := sorted(set(files) - present):
        return f"{missing[0]} is missing"
    changed = [name for name, checksum in files.items() if records.checksum(checkpoint / name) != checksum]
    return f"{changed[0]} was changed" if changed else ""


def _difference(left: Mapping[str, object], right: Mapping[str, object]) -> str:
    keys = [key for key in right if left.get(key) != right[key]]
    return ", ".join(f"{key} {str(left.get(key))[:12]} → {str(right[key])[:12]}" for key in keys) or "other keys"


def _history(log: list[dict[str, float]]) -> pd.DataFrame:
    rows: dict[int, dict[str, float]] = {}
    names = {"loss": "train_loss", "eval_loss": "valid_loss", "eval_top1": "top1", "eval_top5": "top5"}
    names |= {key: key for key in ("epoch_s", "images_per_s", "peak_vram_mb")}
    for entry in log:
        row = rows.setdefault(round(entry["epoch"]), {"epoch": round(entry["epoch"])})
        row |= {names[key]: value for key, value in entry.items() if key in names}
    return pd.DataFrame(list(rows.values())).reindex(columns=["epoch", *names.values()])
