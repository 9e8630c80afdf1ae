"""The sections of notebook 1: a base, LoRA on it, and three checkpoints that are enough by themselves. Level 3."""

import hashlib
import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import peft
import torch
from torch import nn
from transformers import set_seed

from vitlib import (
    adapters,
    checkpoint,
    data,
    engine,
    files,
    origin,
    preprocess,
    provenance,
    quantize,
    records,
    stats,
    synthetic,
    training,
    tuning,
)
from vitlib.data import Dataset, Decoded, Labels
from vitlib.params import Parameters, is_hub_id, used_by
from vitlib.preprocess import Preprocess
from vitlib.training import Examples, Recipe
from vitlib.variants import Variant


class FinetuneError(RuntimeError):
    """Training would not do what was asked; the message says what is wrong."""


@dataclass
class Base:
    """A network to fine-tune, its preprocessing, the labels of its new head, and where it came from."""

    model: nn.Module
    preprocess: Preprocess
    labels: Labels
    device: torch.device
    origin: dict[str, object]


def recipe(settings: Parameters) -> Recipe:
    """What the parameter set says about training."""
    return Recipe(
        epochs=settings.epochs,
        batch_size=settings.train_batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup=settings.warmup,
        label_smoothing=settings.label_smoothing,
        crop_area=settings.crop_area,
        precision=settings.precision,
        seed=settings.seed,
        compile=settings.compile_training,
    )


def load_base(settings: Parameters, dataset: Dataset) -> Base:
    """The base that `settings.base_model` names, with a new head for the classes of the data."""
    checkpoint.quiet_libraries()
    device, labels = checkpoint.pick_device(settings.device), data.new_labels(dataset)
    labels.check(dataset, "valid")  # here, and not only in the evaluation after the training
    if settings.base_model == "random":
        set_seed(settings.seed)
        model = checkpoint.new(settings.architecture, image_size=settings.image_size, labels=labels).to(device)
        pre = preprocess.new(settings.image_size)
    else:
        folder = _base_folder(settings, device)
        pre = preprocess.load(folder, settings.base_revision or None)
        set_seed(settings.seed)  # the new head's initialisation
        quantized = settings.method == "qlora"
        dtype = torch.bfloat16 if quantized else torch.float32
        model = checkpoint.load_base(
            str(folder), revision=settings.base_revision, labels=labels, dtype=dtype, quantized=quantized, device=device
        )
    about = origin.describe(settings.base_model, revision=settings.base_revision, architecture=settings.architecture)
    return Base(model, pre, labels, device, about)


def _base_folder(settings: Parameters, device: torch.device) -> Path | str:
    """The folder or Hub id of the base; FinetuneError where there is none."""
    if settings.base_model == "pretrain":
        return _pretrained(settings, device)
    if is_hub_id(settings.base_model):
        return settings.base_model
    folder = files.resolve(settings.base_model)
    if not folder.is_dir():
        raise FinetuneError(
            f"base_model {settings.base_model!r} is neither pretrain, random, a folder nor a Hub id (owner/name)"
        )
    return folder


def _pretrained(settings: Parameters, device: torch.device) -> Path:
    """The demo's base: a small ViT trained on the generator's other classes; kept until a setting changes."""
    keys = ("architecture", "image_size", "pretrain_epochs", "seed", "precision")
    settled = {key: getattr(settings, key) for key in keys} | {"recipe": vars(PRETRAIN_RECIPE)}
    settled["generator"] = files.checksum(Path(synthetic.__file__))  # other pictures make another base
    name = hashlib.sha256(json.dumps(settled).encode()).hexdigest()[:8]
    folder = files.study_folder(settings.study) / "checkpoints" / f"base-{name}"
    if (folder / "config.json").is_file():
        return folder
    pictures = settings.model_copy(update={"pictures_per_class": PRETRAIN_PICTURES})
    dataset = data.from_synthetic(synthetic.PRETRAIN_CLASSES, pictures)
    pre, labels = preprocess.new(settings.image_size), data.new_labels(dataset)
    set_seed(settings.seed)
    model = checkpoint.new(settings.architecture, image_size=settings.image_size, labels=labels)
    recipe_ = replace(
        PRETRAIN_RECIPE, epochs=settings.pretrain_epochs, seed=settings.seed, precision=settings.precision
    )
    decoded = data.decode_splits(dataset, ("train", "valid"), pre, settings.workers)
    history = training.train(
        model,
        examples_of(decoded, labels),
        pre=pre,
        recipe=recipe_,
        folder=files.study_folder(settings.study) / "training" / "base",
        device=device,
    )
    provenance = {
        "trained on": "the generator's pretraining classes",
        "top1": float(history["top1"].iloc[-1]),
        **settled,
    }
    return checkpoint.save(model.cpu(), folder, pre=pre, labels=labels, provenance=provenance)


PRETRAIN_PICTURES = 100  # of a class
PRETRAIN_RECIPE = Recipe(
    epochs=10,
    batch_size=64,
    learning_rate=2e-3,
    weight_decay=0.05,
    warmup=0.1,
    label_smoothing=0.0,
    crop_area=0.7,
    precision="auto",
    seed=0,
)


def examples_of(decoded: dict[str, Decoded], labels: Labels) -> dict[str, Examples]:
    """Pixels with the checkpoint's class ids of the two splits that training uses."""
    used = {split: decoded[split] for split in ("train", "valid")}
    return {split: Examples(part.pixels, labels.ids(part.pictures)) for split, part in used.items()}


def describe(base: Base) -> pd.DataFrame:
    """What is fine-tuned: origin, size and shape of the base."""
    config = base.model.config
    facts = {
        "base": f"{base.origin['base']} {base.origin.get('revision', '')[:10]}".strip(),
        "blocks": config.num_hidden_layers,
        "width": config.hidden_size,
        "heads": config.num_attention_heads,
        "patch": config.patch_size,
        "pixels": " × ".join(map(str, base.preprocess.side)),
        "parameters (M)": round(sum(quantize.parameter_count(p) for p in base.model.parameters()) / 1e6, 2),
        "new classes": len(base.labels.names),
    }
    return pd.DataFrame([facts])


def introduce(base: Base, settings: Parameters) -> str:
    """What the base is and what that means for accuracies (Markdown); its facts go to `records/base.json`."""
    about = dict(base.origin)
    if about["base"].startswith(("/", "~")):  # a folder of this machine: its name is enough for a reader
        about["base"] = Path(about["base"]).name
    records.write_json(about, files.study_folder(settings.study) / "records" / "base.json")
    return origin.sentence(about)


def make_trainable(base: Base, settings: Parameters) -> nn.Module:
    """The model with the parameters of `settings.method` trainable, the head always among them.

    FinetuneError where an adapter would be missing from a linear of the encoder or the head would stay frozen:
    a list of target names that matches nothing, or a head left at random, trains without complaint.

    Training in bf16 rounds the frozen weights to it once, here: what is trained, validated and merged later are these
    rounded weights. Without dropout the adapters are added into the weights, which then keep their fp32
    (`adapters.SummedLinear`). Adapters, the head, and everything of the method "full" stay in fp32.
    """
    model = base.model
    if settings.method in ("lora", "qlora"):
        # Of an NF4 base only norms and biases are floating point; they stay frozen, in 16 bit.
        config = adapters.config(
            rank=settings.lora_rank,
            alpha=settings.lora_alpha,
            dropout=settings.lora_dropout,
            head=quantize.CLASSIFIER,
            summed=settings.method == "lora" and not settings.lora_dropout,
        )
        with warnings.catch_warnings():  # of a name that peft still uses and transformers will drop
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
            model = peft.get_peft_model(model, config)
    else:
        model.requires_grad_(settings.method == "full")
        model.classifier.requires_grad_(True)
    check_trainable(model, settings.method)
    if settings.method in ("lora", "head") and training.precision_of(settings.precision, base.device) == "bf16":
        adapters.round_frozen(model, torch.bfloat16)
    return model


def check_trainable(model: nn.Module, method: str) -> None:
    """FinetuneError unless the head is trained and, for LoRA, every linear of the encoder has an adapter."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not any(quantize.CLASSIFIER in name for name in trained):
        raise FinetuneError("the classifier is frozen: it would stay at its random initialisation")
    if method in ("lora", "qlora"):
        blocks = model.config.num_hidden_layers
        adapted = {name.split(".lora_A")[0] for name in trained if ".lora_A" in name}
        if len(adapted) != blocks * len(adapters.ENCODER_LINEARS):
            raise FinetuneError(
                f"{len(adapted)} linears have an adapter, the encoder has {blocks * len(adapters.ENCODER_LINEARS)}: "
                f"the base names its modules differently from {', '.join(adapters.ENCODER_LINEARS)}"
            )


def parameter_table(model: nn.Module) -> pd.DataFrame:
    """Trainable and frozen parameters of the head, the adapters and the rest, a row each."""
    rows: dict[str, list[int]] = {"head": [0, 0], "adapters": [0, 0], "encoder": [0, 0]}
    for name, parameter in model.named_parameters():
        if "original_module" in name:  # peft keeps the untrained head beside the trained one
            continue
        part = "head" if quantize.CLASSIFIER in name else "adapters" if "lora_" in name else "encoder"
        rows[part][0 if parameter.requires_grad else 1] += quantize.parameter_count(parameter)
    return pd.DataFrame(rows, index=["trainable", "frozen"]).T


def train(model: nn.Module, base: Base, decoded: dict[str, Decoded], settings: Parameters) -> pd.DataFrame:
    """Fine-tune in place; returns and writes `records/finetune.csv`."""
    folder = files.study_folder(settings.study)
    history = training.train(
        model,
        examples_of(decoded, base.labels),
        pre=base.preprocess,
        recipe=recipe(settings),
        folder=folder / "training" / "finetune",
        device=base.device,
        resume=settings.resume,
        about=_about(settings),
    )
    records.write_table(history, folder / "records" / "finetune.csv")
    return history


def _about(settings: Parameters) -> dict[str, object]:
    names = ("method", "lora_rank", "lora_alpha", "lora_dropout", "base_model", "base_revision", "architecture")
    return {name: getattr(settings, name) for name in names}


def merge(model: nn.Module, base: Base, settings: Parameters) -> nn.Module:
    """The fine-tuned network as a plain one in 16 bit: adapters added to the weights they were trained on.

    For QLoRA these are the dequantized NF4 weights (bitsandbytes would round the sum to NF4 again). Frozen weights in
    bf16 become fp32 first, which changes no value, so the sum is rounded once. FinetuneError where the merged network
    gives other logits than the trained one, adapters attached, on random pictures.
    """
    if settings.method != "qlora":
        model = model.float()
    draw = torch.Generator().manual_seed(settings.seed)
    height, width = base.preprocess.side
    pixels = torch.randint(0, 256, (8, 3, height, width), generator=draw).to(base.device)
    with torch.no_grad():
        expected = model.eval()(pixel_values=base.preprocess.normalise(pixels)).logits.float()
        merged = _merged(model, settings)
        found = merged(pixel_values=base.preprocess.normalise(pixels, torch.float16)).logits.float()
    difference = tuning.relative_error(found, expected)
    if not difference < MERGE_TOLERANCE[settings.method]:
        raise FinetuneError(f"merging changed the logits by {difference:.1%}: the adapters were not merged as trained")
    return merged


# ‖merged − trained‖ / ‖trained‖ of logits. QLoRA trains in bf16 (8 bits of mantissa), the others in fp32.
MERGE_TOLERANCE = {"lora": 0.02, "full": 0.02, "head": 0.02, "qlora": 0.05}


def _merged(model: nn.Module, settings: Parameters) -> nn.Module:
    if settings.method in ("full", "head"):
        return model.half()
    if settings.method == "lora":
        return model.merge_and_unload().half()
    deltas = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").float()
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    dense = model.unload().dequantize(dtype=torch.float32).float()
    for name, delta in deltas.items():
        dense.get_submodule(name).weight.data += delta
    return dense.eval().half()


def save_checkpoints(merged: nn.Module, base: Base, settings: Parameters, history: pd.DataFrame) -> dict[str, Path]:
    """Write `merged`, `nf4` and `int8`; the quantized ones are made by transformers from the merged one."""
    folder = files.study_folder(settings.study) / "checkpoints"
    merged.config.update(checkpoint.label_maps(base.labels))
    about = {
        "study": settings.study,
        "origin": base.origin,
        "method": settings.method,
        "parameters": used_by(settings, "1_finetune"),
        "top1": float(history["top1"].iloc[-1]),
        "versions": provenance.environment(parameters={})["versions"],
    }
    shared = {"pre": base.preprocess, "labels": base.labels}
    paths = {"merged": checkpoint.save(merged, folder / "merged", provenance=about | {"weights": "fp16"}, **shared)}
    # The merged file's checksum ties the three together: evaluation refuses checkpoints of different trainings.
    about["merged_sha256"] = files.checksum(paths["merged"] / "model.safetensors")
    for weights in ("nf4", "int8"):
        quantized = checkpoint.quantize_checkpoint(paths["merged"], weights, base.device)
        note = {"weights": weights, "quantized_from": "merged", "kept_in_16_bit": [quantize.CLASSIFIER]}
        paths[weights] = checkpoint.save(quantized, folder / weights, provenance=about | note, **shared)
    return paths


def check_reload(merged: nn.Module, base: Base, paths: dict[str, Path], valid: Decoded) -> pd.DataFrame:
    """Each saved checkpoint loaded again and compared with the model in memory, a row each.

    `from_merged` is ‖found − merged‖ / ‖merged‖ of the logits of all pictures of `valid`: what quantization costs;
    `top1` and `same_class` are of these too. `reload_difference` is the same for up to 64 between the file and the
    network in memory that it was saved from (a quantized one is quantized again): more than rounding is an error.
    """
    rows, truth = [], base.labels.ids(valid.pictures).numpy()
    memory = checkpoint.Loaded(merged, base.preprocess, base.labels, base.device, torch.float16, paths["merged"], 0.0)
    expected = engine.logits(engine.Engine(memory), valid.pixels, 32)
    for name, path in paths.items():
        variant = Variant("fp16" if name == "merged" else name)
        loaded = checkpoint.load(path.parent, variant, base.device)
        found = engine.logits(engine.Engine(loaded), valid.pixels, 32)  # in batches that the first 64 fill
        saved_from = expected[:64]
        if name != "merged":
            again = checkpoint.quantize_checkpoint(paths["merged"], name, base.device)
            saved_from = engine.logits(engine.Engine(replace(memory, model=again)), valid.pixels[:64], 32)
        difference = tuning.relative_error(found[:64], saved_from)
        if not difference <= RELOAD_TOLERANCE:
            raise FinetuneError(f"{name} gives other logits than the network it was saved from ({difference:.1%})")
        rows.append(
            {
                "checkpoint": name,
                "disk_mb": checkpoint.disk_mb(path),
                "model_mb": loaded.weights_mb,
                "reload_difference": difference,
                "from_merged": tuning.relative_error(found, expected),
                "top1": stats.topk_accuracy(found.numpy(), truth),
                "same_class": (found.argmax(1) == expected.argmax(1)).float().mean().item(),
            }
        )
    return pd.DataFrame(rows).set_index("checkpoint")


RELOAD_TOLERANCE = 1e-3


def headline(history: pd.DataFrame, reloaded: pd.DataFrame, base: Base, decoded: dict[str, Decoded]) -> str:
    """What the records say, in a few sentences (Markdown)."""
    used = {split: decoded[split] for split in ("train", "valid")}  # only these copies touch the accuracy below
    last, copies = history.iloc[-1], data.duplicates(used)
    best, merged = history.loc[history["top1"].idxmax()], 100 * reloaded.loc["merged", "top1"]
    found = (copies["kind"] == "exact").sum(), (copies["kind"] == "near").sum()
    why = "" if abs(merged - 100 * last["top1"]) < 0.005 else ": it is rounded otherwise than the network in training"
    nf4, int8 = (reloaded.loc["merged", "model_mb"] / reloaded.loc[name, "model_mb"] for name in ("nf4", "int8"))
    return "\n".join(
        (
            f"- After {last['epoch']:.0f} epochs on {len(decoded['train'].pictures):,} pictures of "
            f"{len(base.labels.names)} classes, Top-1 is **{100 * last['top1']:.2f} %** and Top-5 "
            f"{100 * last['top5']:.2f} % of {len(decoded['valid'].pictures):,} validation pictures. The best epoch was "
            f"{best['epoch']:.0f} with {100 * best['top1']:.2f} %; what is saved is the last, as choosing by these "
            "pictures would flatter it.",
            f"- The merged 16-bit checkpoint, where every later notebook starts, has Top-1 **{merged:.2f} %**{why}.",
            f"- {found[0]} exact and {found[1]} near copies stand in both of these splits.",
            f"- Training passed {history['images_per_s'].median():,.0f} images per second on {base.device.type}.",
            f"- The 16-bit checkpoint is reproduced on loading (relative difference "
            f"{reloaded.loc['merged', 'reload_difference']:.0e}); NF4 is {nf4:.1f} and int8 {int8:.1f} times smaller "
            f"in memory than it, and give {100 * reloaded.loc['nf4', 'same_class']:.1f} % and "
            f"{100 * reloaded.loc['int8', 'same_class']:.1f} % of the same classes.",
        )
    )
