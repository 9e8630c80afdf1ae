"""Train a network on decoded pictures with `transformers.Trainer`, and survive being killed.

Pictures stay uint8 until they are on the device, where a batch is cropped and normalised. A training checkpoint
is valid only with a manifest of checksums: the Trainer would resume from an incomplete set of files without an error.
On a GPU neither the host nor the device waits for the other in a step, and the blocks of long runs are compiled.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import pandas as pd
import torch
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from torch import nn
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.models.vit.modeling_vit import ViTEmbeddings, ViTLayer
from transformers.trainer_utils import EvalPrediction, sort_checkpoints

from vitlib.measure import stats
from vitlib.network import attention
from vitlib.pictures import preprocess
from vitlib.pictures.decode import Decoded
from vitlib.pictures.preprocess import Preprocess
from vitlib.pictures.sources import Labels
from vitlib.study import files, records
from vitlib.study.params import Parameters

MANIFEST = "manifest.json"
PADDING = -100  # the label that cross entropy leaves out
COMPILING_PAYS = 5e15  # floating-point operations of a run; below it compiling takes longer than it saves


@dataclass(frozen=True)
class Recipe:
    """How to train: parameters of fine-tuning by their names, or those of the demo's base."""

    epochs: int
    train_batch_size: int
    learning_rate: float
    weight_decay: float
    warmup: float
    label_smoothing: float
    crop_area: float
    precision: str
    seed: int
    compile_training: str = "never"

    @classmethod
    def of(cls, settings: Parameters) -> Recipe:
        """What a parameter set says about fine-tuning."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})


@dataclass(frozen=True)
class Examples:
    """uint8 pixels (n, 3, h, w) with class ids (n,)."""

    pixels: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def of(cls, decoded: Decoded, labels: Labels) -> Examples:
        """Decoded pictures with the ids that a checkpoint's labels give to their classes."""
        return cls(decoded.pixels, labels.ids(decoded.pictures))

    def to(self, device: torch.device) -> Examples:
        return Examples(self.pixels.to(device), self.labels.to(device))


class _Rows(torch.utils.data.Dataset):
    """Examples of which the DataLoader gathers a batch in one indexing operation instead of picture by picture.

    With `full` the last batch is filled up to that size with copies labelled PADDING: no other shape needs compiling.
    """

    def __init__(self, examples: Examples, full: int = 0) -> None:
        self.examples, self.full = examples, full

    def __len__(self) -> int:
        return len(self.examples.labels)

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """The batch with these rows; a short one is filled with copies of its first row, whose label is PADDING."""
        padding = max(self.full - len(rows), 0)
        index, pixels = torch.tensor(rows + rows[:1] * padding), self.examples.pixels
        if pixels.is_cuda:  # nothing waits for the copy
            index = index.pin_memory().to(pixels.device, non_blocking=True)
        labels = self.examples.labels[index]
        labels[len(rows) :] = PADDING
        return {"pixels": pixels[index], "labels": labels}


class ImageTrainer(Trainer):
    """The Trainer over uint8 pictures, with augmentation on the device and checksums in its training checkpoints."""

    def __init__(
        self, *args, pre: Preprocess | None, recipe: Recipe, identity: dict, compiled: bool, teacher: nn.Module | None,
        **kwargs,
    ) -> None:  # fmt: skip
        super().__init__(*args, data_collator=lambda batch: batch, compute_metrics=_metrics, **kwargs)
        self.pre, self.recipe, self.identity, self.compiled, self.teacher = pre, recipe, identity, compiled, teacher
        self.add_callback(_EpochClock(self))

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **_) -> torch.Tensor | tuple:
        """Cross entropy of a batch, in training augmented and smoothed, or there the KL divergence from the teacher."""
        pixels, labels = inputs["pixels"], inputs["labels"]
        if model.training and self.pre:  # a resumed run cuts the same crops as an uninterrupted one
            draw = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.state.global_step)
            pixels = preprocess.augment(pixels, crop_area=self.recipe.crop_area, generator=draw)
        logits = model(pixel_values=self.pre.normalise(pixels) if self.pre else pixels).logits.float()
        if model.training and self.teacher is not None:
            return self._divergence(pixels, logits, labels != PADDING)
        smoothing = self.recipe.label_smoothing if model.training else 0.0
        loss = nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing, ignore_index=PADDING)
        return (loss, {"logits": logits}) if return_outputs else loss

    def _divergence(self, pixels: torch.Tensor, logits: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        """Mean KL divergence from the teacher (Hinton et al. 2015, at temperature 1) over the `counted` pictures."""
        with torch.no_grad():
            wanted = self.teacher(pixel_values=self.pre.normalise(pixels, self.teacher.dtype)).logits.float()
        pair = logits.log_softmax(1), wanted.log_softmax(1)
        each = nn.functional.kl_div(*pair, reduction="none", log_target=True).sum(1)
        return (each * counted).sum() / counted.sum()

    def warm_up(self) -> float:
        """Compile the blocks on a first batch and see that it fits; seconds of compilation (0.0 without it).

        Where the compiler fails (Triton needs a C compiler, for one), "auto" prints it and trains without. MemoryError
        where memory does not suffice.
        """
        if not (self.compiled or self.args.device.type == "cuda"):
            return 0.0
        start = time.perf_counter()
        rows = list(range(min(self.args.train_batch_size, len(self.train_dataset))))  # of all devices together
        try:
            with torch.random.fork_rng(range(torch.cuda.device_count())):
                inputs = self._prepare_inputs(self.train_dataset.__getitems__(rows))
                self.accelerator.backward(self.compute_loss(self.model_wrapped.train(), inputs))
        except torch.OutOfMemoryError:
            batch = f"a training batch of {self.args.train_batch_size} pictures does not fit this device's memory"
            raise MemoryError(f"{batch}: set train_batch_size to a smaller number") from None
        except torch._dynamo.exc.TorchDynamoException as error:
            if self.recipe.compile_training != "auto":
                raise
            print(f"not compiled, {files.first_line(error)}")
            uncompile(self.model)
        self.model_wrapped.zero_grad()
        torch.cuda.empty_cache()  # not above, where the traceback still holds tensors
        return time.perf_counter() - start if self.compiled else 0.0

    def evaluation_loop(self, *args: object, **kwargs: object) -> object:
        """The Trainer's, without compilation: a second one for a few batches would take longer than it saves."""
        with torch.compiler.set_stance("force_eager"):
            return super().evaluation_loop(*args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, torch.Tensor]) -> int:
        """0: nobody reads the count, and the Trainer's walks over every parameter at each step."""
        return 0

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = model or self.model
        if isinstance(model, PeftModel):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        # transformers 5 saves a ViT under its old module names. Only from_pretrained maps them back: the Trainer
        # would warn of missing keys and go on with the weights that the network was initialised with.
        saved = type(model).from_pretrained(resume_from_checkpoint, dtype=next(model.parameters()).dtype)
        model.load_state_dict(saved.state_dict(), strict=True)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with files.naming_what_lacks_room(folder):
            super()._save_checkpoint(model, trial)
        sums = {file.name: files.checksum(file) for file in sorted(folder.iterdir()) if file.name != MANIFEST}
        records.write_json({"identity": self.identity, "files": sums}, folder / MANIFEST)


def _metrics(found: EvalPrediction) -> dict[str, float]:
    return {f"top{k}": stats.topk_accuracy(found.predictions, found.label_ids, k) for k in (1, 5)}


class _EpochClock(TrainerCallback):
    """Puts speed (of the steps alone) and peak memory of each epoch into the log history, and shows a progress bar."""

    def __init__(self, trainer: ImageTrainer) -> None:
        self.trainer, self.pictures = trainer, len(trainer.train_dataset)

    def on_train_begin(self, args: object, state: object, control: object, **_: object) -> None:
        self.compile_s = self.trainer.warm_up() if state.global_step < state.max_steps else 0.0
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step")

    def on_epoch_begin(self, *_: object, **__: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.start = time.perf_counter()

    def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_epoch_end(self, args: object, state: object, control: object, **_: object) -> None:
        """Log the epoch's seconds, images per second and peak memory in MB."""
        row = {"epoch": state.epoch, "compile_s": self.compile_s}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            row["peak_vram_mb"] = torch.cuda.max_memory_allocated() / 2**20
        seconds = time.perf_counter() - self.start
        state.log_history.append(row | {"epoch_s": seconds, "images_per_s": self.pictures / seconds})
        self.compile_s = 0.0

    def on_evaluate(self, args: object, state: object, control: object, metrics: dict, **_: object) -> None:
        self.bar.set_postfix(epoch=round(state.epoch), top1=f"{metrics['eval_top1']:.3f}")

    def on_train_end(self, *_: object, **__: object) -> None:
        self.bar.close()


def train(
    model: nn.Module, examples: Mapping[str, Examples], *, pre: Preprocess | None, recipe: Recipe, folder: Path,
    device: torch.device, resume: bool = False, about: Mapping[str, object] | None = None, backend: str = "inductor",
    keep: bool = True, callbacks: Iterable[TrainerCallback] = (), teacher: nn.Module | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Train `model` in place on `examples['train']`, validate each epoch on `['valid']`, and return a row an epoch.

    Without `pre` the examples are inputs of the network, which are neither augmented nor normalised.

    `folder` receives the training checkpoints of the last two epochs, or none without `keep`. `resume` continues from
    the newest undamaged one; where that is of another recipe, data, initial weights, code, or settings `about` the run,
    it says what differs and starts again. A `teacher`, in evaluation mode on `device`, gives the targets in place of
    the labels. Columns: see `_history`. Afterwards the model computes in fp32 again, on `device`.
    """
    set_seed(recipe.seed)
    compiled = compiles(recipe, model, len(examples["train"].labels), device)
    identity = identity_of(model, examples, recipe, about or {})
    start_from = newest_intact_checkpoint(folder, identity) if resume else None
    if start_from is None:
        shutil.rmtree(folder, ignore_errors=True)
    size = sum(part.pixels.nbytes for part in examples.values())
    if placed := device.type == "cuda" and size <= torch.cuda.mem_get_info(device)[0] / 4:
        examples = {split: part.to(device) for split, part in examples.items()}
    arguments = _arguments(recipe, folder, device, pinned=device.type == "cuda" and not placed, keep=keep)
    full = arguments.train_batch_size if compiled else 0
    data = {"train_dataset": _Rows(examples["train"], full), "eval_dataset": _Rows(examples["valid"])}
    own = {"pre": pre, "recipe": recipe, "identity": identity, "compiled": compiled, "teacher": teacher}
    trainer = ImageTrainer(model, arguments, callbacks=list(callbacks), **data, **own)
    trainer.remove_callback(PrinterCallback)  # it prints a dictionary an epoch; the bar and the table say the same
    # Under autocast PEFT need not cast the inputs of its adapters: autocast casts the adapters, which are smaller.
    without_casts = disable_input_dtype_casting(model, precision_of(recipe.precision, device) != "fp32")
    with without_casts, compiled_blocks(model, backend if compiled else None):
        try:
            trainer.train(resume_from_checkpoint=str(start_from) if start_from else None)
        finally:  # a smaller batch may be tried next, with the same network
            trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # takes autocast off its forward
    return _history(trainer.state.log_history)


def compiles(recipe: Recipe, model: nn.Module, pictures: int, device: torch.device) -> bool:
    """Whether the blocks are compiled: 'auto' does on a GPU with Triton where the run is long enough to pay."""
    if recipe.compile_training != "auto" or device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return recipe.compile_training == "always"
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    tokens = (model.config.image_size // model.config.patch_size) ** 2 + 1
    return 4 * weights * tokens * pictures * recipe.epochs > COMPILING_PAYS  # forward, and backward to the inputs


@contextmanager
def compiled_blocks(model: nn.Module, backend: str | None) -> Iterator[None]:
    """Run the transformer blocks compiled by `backend`, for one shape, in this context; None changes nothing.

    One compilation serves all blocks, so where blocks are trained the first one's input requires a gradient, as all
    others' do. Attention takes no mask, see `attention.attend`.
    """
    if backend is None:
        yield
        return
    blocks = [module for module in model.modules() if isinstance(module, ViTLayer)]
    trained = any(parameter.requires_grad for block in blocks for parameter in block.parameters())

    def want_gradient(_module: nn.Module, _inputs: tuple, tokens: torch.Tensor) -> None:
        if trained and torch.is_grad_enabled():
            tokens.requires_grad_()

    before = model.config._attn_implementation
    model.set_attn_implementation(attention.DIRECT)
    entry = next(module for module in model.modules() if isinstance(module, ViTEmbeddings))
    hook = entry.register_forward_hook(want_gradient)
    for block in blocks:
        block.compile(backend=backend, dynamic=False, fullgraph=True)
    try:
        with warnings.catch_warnings():
            # Weights that adapters are added into are fp32, their products are not.
            warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
            yield
    finally:
        model.set_attn_implementation(before)
        hook.remove()
        uncompile(model)


def uncompile(model: nn.Module) -> None:
    """Undo `module.compile()` for all modules of `model`."""
    for module in model.modules():
        module._compiled_call_impl = None


def identity_of(
    model: nn.Module, examples: Mapping[str, Examples], recipe: Recipe, about: Mapping
) -> dict[str, object]:
    """What makes a training run this one: its settings, and checksums of its pictures, initial weights and code."""
    data, weights = hashlib.sha256(), hashlib.sha256()
    for split in sorted(examples):
        data.update(examples[split].pixels.numpy().tobytes() + examples[split].labels.numpy().tobytes())
    for name, tensor in model.state_dict().items():
        weights.update(name.encode())
        if isinstance(tensor, torch.Tensor):
            weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    code = [files.checksum(file) for file in (*sorted(Path(__file__).parent.glob("*.py")), preprocess.__file__)]
    sums = {"pictures": data.hexdigest(), "initial weights": weights.hexdigest(), "code": code}
    return {**vars(recipe), **about, **sums, "torch": torch.__version__}


def precision_of(asked: str, device: torch.device) -> str:
    """fp32, fp16 or bf16: the arithmetic that the parameter `precision` means on `device`."""
    if asked != "auto":
        return asked
    return "fp32" if device.type == "cpu" else "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"


def _arguments(recipe: Recipe, folder: Path, device: torch.device, *, pinned: bool, keep: bool) -> TrainingArguments:
    precision, batch = precision_of(recipe.precision, device), recipe.train_batch_size
    return TrainingArguments(
        str(folder), num_train_epochs=recipe.epochs, seed=recipe.seed, data_seed=recipe.seed,
        per_device_train_batch_size=batch, per_device_eval_batch_size=max(batch, 64),
        optim="adamw_torch_fused", learning_rate=recipe.learning_rate, weight_decay=recipe.weight_decay,
        lr_scheduler_type="cosine", warmup_steps=recipe.warmup,  # below 1 it is a share of all steps
        bf16=precision == "bf16", fp16=precision == "fp16", use_cpu=device.type == "cpu",
        dataloader_pin_memory=pinned, accelerator_config={"non_blocking": pinned},
        eval_strategy="epoch", save_strategy="epoch" if keep else "no", logging_strategy="epoch",
        logging_nan_inf_filter=False,  # it looks at the loss of each step, and the host would wait for it
        save_total_limit=2,  # the one before stays until the next is whole
        label_names=["labels"], remove_unused_columns=False, report_to="none", disable_tqdm=True,
    )  # fmt: skip


def newest_intact_checkpoint(folder: Path, identity: Mapping[str, object]) -> Path | None:
    """The newest undamaged training checkpoint, or None; also where a run of another identity wrote it."""
    for path in map(Path, reversed(sort_checkpoints(str(folder)) if folder.is_dir() else [])):
        if fault := damage(path):
            print(f"{path.name} is damaged and not used ({fault})")
            continue
        theirs = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["identity"]
        own = json.loads(json.dumps(identity))
        if theirs != own:
            changed = [(key, theirs.get(key), own[key]) for key in own if theirs.get(key) != own[key]]
            changes = [f"{key} {str(before)[:12]} → {str(now)[:12]}" for key, before, now in changed]
            print(f"training starts again: {path.name} is of another run ({', '.join(changes) or 'other keys'})")
            return None
        print(f"resuming from {path.name}")
        return path
    return None


def damage(checkpoint: Path) -> str:
    """What is wrong with a training checkpoint ('' if nothing is)."""
    try:
        listed = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return "no readable manifest: saving was interrupted"
    return next((f"{name} is missing or was changed" for name in files.changed(checkpoint, listed)), "")


def _history(log: list[dict[str, float]]) -> pd.DataFrame:
    """A row an epoch; the Trainer and the clock log several entries in each."""
    names = {"loss": "train_loss", "eval_loss": "valid_loss", "eval_top1": "top1", "eval_top5": "top5"}
    names |= {key: key for key in ("epoch_s", "images_per_s", "peak_vram_mb", "compile_s")}
    entries = pd.DataFrame(log).reindex(columns=["epoch", *names])
    epochs = entries["epoch"].round().astype(int)
    return entries.groupby(epochs)[list(names)].first().rename(columns=names).reset_index()
