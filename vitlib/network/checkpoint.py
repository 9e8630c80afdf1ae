"""Build, load and save a network; the one place where a variant becomes a module.

A checkpoint is a folder that plain transformers can load, complete in itself: weights (safetensors), config with
id→label names, preprocessing, `labels.json` (class folders by id), twelve pictures with its logits for them
(`samples`), and `provenance.json` with the SHA-256 of each.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import logging as transformers_logging

from vitlib.network import attention, calibrate, dinov2, plan, quantize, samples, verify
from vitlib.pictures import preprocess
from vitlib.pictures.preprocess import Preprocess
from vitlib.pictures.sources import Labels
from vitlib.study import files, records
from vitlib.study.variants import FORMATS, Variant, nearest

# hidden, blocks, heads, mlp, patch. Heads are 64 wide: the width FlashAttention-2 is built for here. The last three are
# table 1 of Dosovitskiy et al. 2021 and Touvron et al. 2021.
ARCHITECTURES = {
    "vit-micro": (128, 4, 2, 512, 8),
    "vit-mini": (192, 6, 3, 768, 16),
    "vit-tiny": (192, 12, 3, 768, 16),
    "vit-small": (384, 12, 6, 1536, 16),
    "vit-base": (768, 12, 12, 3072, 16),
    "vit-large": (1024, 24, 16, 4096, 16),
}
PROVENANCE = "provenance.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says what is missing and what to do."""


class NotRun(RuntimeError):
    """A variant that cannot run here; the message is the reason that its row shows."""


@dataclass
class Loaded:
    """A verified network with the preprocessing and labels of its checkpoint."""

    model: nn.Module
    preprocess: Preprocess
    labels: Labels
    device: torch.device
    dtype: torch.dtype  # of pixel_values and of the unquantized weights
    folder: Path
    weights_mb: float  # as loaded; on a CPU bitsandbytes repacks NF4 in the first pass
    variant: Variant | None = None  # None where the network was not loaded as one
    about: Mapping[str, Any] = field(default_factory=dict)  # what the folder says, see `whole`


def pick_device(name: str) -> torch.device:
    """The device called auto, cpu or cuda. NotRun for cuda where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise NotRun("device is 'cuda' and torch sees no CUDA device: set device to 'auto' or 'cpu'")
    return torch.device("cpu" if name == "cpu" or not torch.cuda.is_available() else "cuda")


def quiet_libraries() -> None:
    """Leave the progress bars to the notebooks: transformers' bar for a load of one second is noise in a report."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def new(architecture: str, *, image_size: int, labels: Labels) -> ViTForImageClassification:
    """A ViT with random weights (torch's global generator) and the labels' names."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}: {nearest(architecture, list(ARCHITECTURES))}")
    hidden, blocks, heads, mlp, patch = ARCHITECTURES[architecture]
    sizes = {"hidden_size": hidden, "num_hidden_layers": blocks, "num_attention_heads": heads, "intermediate_size": mlp}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=image_size, patch_size=patch, **label_maps(labels)))


def label_maps(labels: Labels) -> dict[str, object]:
    """The keyword arguments of a config that carry the labels."""
    return {
        "num_labels": len(labels.names),
        "id2label": dict(enumerate(labels.names)),
        "label2id": {name: number for number, name in enumerate(labels.names)},
    }


def load_base(
    base: str, *, revision: str, side: int, labels: Labels, dtype: torch.dtype, quantized: bool, device: torch.device
) -> nn.Module:
    """A pretrained ViT from a folder or the Hub with a new random head; a DINOv2 becomes one for `side` pixels.

    The head is new also where the base has as many classes. CheckpointError where the base is neither, where it is not
    `whole`, or where a weight of the encoder is missing (transformers would initialise it and only warn) or not finite.
    """
    if Path(base).is_dir():
        whole(Path(base))
    kind = AutoConfig.from_pretrained(base, revision=revision or None, trust_remote_code=False).model_type
    if kind == "dinov2":
        how = {"labels": labels, "dtype": dtype, "quantized": quantized, "device": device}
        with tempfile.TemporaryDirectory() as folder:  # so that all that follows is the same for both
            _fold(base, revision, side).save_pretrained(folder)
            return load_base(folder, revision="", side=side, **how)
    if kind != "vit":
        raise CheckpointError(f"the base is a {kind!r} network; this study fine-tunes 'vit' and 'dinov2' ones")
    quantization = quantize.config(4, torch.bfloat16) if quantized else None
    options = {"revision": revision or None, "quantization_config": quantization, "ignore_mismatched_sizes": True}
    model, loading = _from_pretrained(base, dtype, device, **options, **label_maps(labels))
    _refuse_unfit_weights(str(base), model, loading, allowed=quantize.CLASSIFIER)
    if quantized:
        quantize.keep_readable(model)
    nn.init.trunc_normal_(model.classifier.weight, std=model.config.initializer_range)
    nn.init.zeros_(model.classifier.bias)
    return model


def _fold(base: str, revision: str, side: int) -> ViTForImageClassification:
    """The DINOv2 network `base` as a plain ViT for `side` pixels. CheckpointError where that is impossible."""
    safely = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    model, loading = Dinov2Model.from_pretrained(base, revision=revision or None, dtype=torch.float32, **safely)
    _refuse_unfit_weights(base, model, loading)
    try:
        return dinov2.folded(model, side)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def _from_pretrained(
    folder: str | Path, dtype: torch.dtype, device: torch.device, **options: object
) -> tuple[nn.Module, dict[str, object]]:
    """The network, and what transformers says of its loading; safetensors only, no remote code."""
    safely = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    return AutoModelForImageClassification.from_pretrained(
        folder, dtype=dtype, device_map={"": device}, **safely, **options
    )


def _refuse_unfit_weights(source: str, model: nn.Module, loading: dict[str, object], allowed: str = " ") -> None:
    """CheckpointError for weights that were missing, misshapen or not finite; names may start with `allowed`."""
    absent = [*loading["missing_keys"], *(key[0] for key in loading["mismatched_keys"])]
    states = ((name, getattr(parameter, "quant_state", None)) for name, parameter in model.named_parameters())
    # Without the scales of its scales bitsandbytes takes their codes for the scales.
    absent += [name for name, state in states if state and not state.nested and state.absmax.dtype == torch.uint8]
    if wrong := [name for name in absent if not name.startswith(allowed)]:
        raise CheckpointError(
            f"{Path(source).name} lacks weights of the network or has them in another shape ({', '.join(wrong[:3])}"
            f"{' and more' if len(wrong) > 3 else ''}): they would be random. Save the checkpoint again."
        )
    held = ((name, value) for name, value in model.state_dict().items() if not name.startswith(allowed))
    if wrong := [name for name, value in held if isinstance(value, torch.Tensor) and not value.isfinite().all()]:
        raise CheckpointError(f"{Path(source).name} has NaN or infinity in {wrong[0]}: save the checkpoint again")


def quantize_checkpoint(
    merged: Path, weights: str, device: torch.device, calibration: torch.Tensor | None = None
) -> nn.Module:
    """The network of a merged checkpoint in the format `weights`, quantized by transformers while it loads.

    A calibrated format needs normalised pictures for `calibration` (n, 3, h, w), float32.
    """
    row = FORMATS[weights]
    dtype = getattr(torch, row.dtype)
    quantized = _from_pretrained(merged, dtype, device, quantization_config=quantize.config(row.bits, dtype))[0].eval()
    if row.calibrated:
        calibrate.calibrate(_from_pretrained(merged, torch.float32, device)[0].eval(), quantized, calibration)
    return quantized


def save(
    model: nn.Module, folder: Path, *, pre: Preprocess, labels: Labels, provenance: Mapping[str, object],
    more: Mapping[str, object] | None = None,
) -> Path:  # fmt: skip
    """Write a self-sufficient checkpoint to `folder`, complete or not at all; `more` are JSON files by name.

    FloatingPointError where the network's logits are not finite.
    """
    with files.atomic_path(folder) as target:
        model.save_pretrained(target)
        pre.save(target)
        pairs = zip(labels.folders, labels.names, strict=True)
        entries = [{"id": number, "folder": key, "name": name} for number, (key, name) in enumerate(pairs)]
        records.write_json(entries, target / "labels.json")
        for name, value in (more or {}).items():
            records.write_json(value, target / name)
        samples.save(model, pre, target)
        seal(target, {**provenance, "preprocessing": pre.describe()})
    return folder


def seal(folder: Path, about: Mapping[str, object]) -> None:
    """Write `about` a checkpoint into its `provenance.json`, with the SHA-256 of each other file and of this record."""
    sums = {file.name: files.checksum(file) for file in sorted(folder.iterdir()) if file.name != PROVENANCE}
    noted = records.read_json(records.write_json({**about, "files": sums}, folder / PROVENANCE))
    records.write_json({**noted, "record_sha256": _digest(noted)}, folder / PROVENANCE)


def _digest(noted: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(noted, sort_keys=True).encode()).hexdigest()


def whole(folder: Path) -> dict[str, Any]:
    """What a checkpoint's `provenance.json` says, {} without one; CheckpointError unless all is as it was saved.

    Without its list `files` of checksums nobody knows how that was, and the checkpoint is unverified.
    """
    try:
        noted = json.loads((folder / PROVENANCE).read_bytes()) if (folder / PROVENANCE).is_file() else {}
        claimed, listed = noted.pop("record_sha256", ""), noted.get("files", {})
        wrong = [PROVENANCE] if (claimed or listed) and claimed != _digest(noted) else []
        wrong += files.changed(folder, listed)
        added = {file.name for file in folder.iterdir()} - {PROVENANCE, *listed} if claimed else ()
        wrong += [name for name in added if name.endswith((".json", ".safetensors"))]  # transformers might read it
    except (ValueError, AttributeError, TypeError):
        wrong = [PROVENANCE]
    if wrong:
        maker = "3_ablation" if folder.name == "mixed" else "1_finetune"
        raise CheckpointError(
            f"{wrong[0]} of the checkpoint {folder.name!r} is not as it was saved: make the checkpoint again (run "
            f"{maker}), or copy the folder from where it is whole"
        )
    return noted


def save_mixed(checkpoints: Path, chosen: Mapping[str, str], device: torch.device, note: Mapping[str, object]) -> Path:
    """Write the checkpoint `mixed` beside those that it is made of, with `chosen` in its `plan.json`; see `plan`."""
    merged, folder = checkpoints / plan.CHECKPOINTS["fp16"], checkpoints / "mixed"
    sources = {form: checkpoints / plan.CHECKPOINTS[form] for form in {"nf4", "int8"} & set(chosen.values())}
    said, *_ = (whole(source) for source in (merged, *sources.values()))
    nf4 = quantize.config(4, torch.float16, plan.kept(chosen)) if "nf4" in chosen.values() else None
    model = _from_pretrained(merged, torch.float16, device, quantization_config=nf4)[0].eval()
    networks = {form: _from_pretrained(source, torch.float16, device)[0].eval() for form, source in sources.items()}
    plan.fill(model, networks, chosen)
    about = {key: said[key] for key in ("origin", "method", "parameters") if key in said}
    about |= {"weights": "mixed", "quantized_from": merged.name, **note}
    about["merged_sha256"] = files.checksum(merged / "model.safetensors")
    own = {"pre": preprocess.load(merged), "labels": read_labels(merged), "provenance": about}
    return save(model, folder, **own, more={plan.FILE: dict(chosen)})


def read_labels(folder: Path) -> Labels:
    """The labels of a checkpoint: `labels.json`, else the names in its config. CheckpointError where it has neither."""
    names = tuple(name for _, name in sorted(AutoConfig.from_pretrained(folder).id2label.items()))
    file = folder / "labels.json"
    if file.is_file():
        entries = sorted(records.read_json(file), key=lambda entry: entry["id"])
        labels = Labels(tuple(e["folder"] for e in entries), tuple(e["name"] for e in entries))
        if labels.names != names or [e["id"] for e in entries] != list(range(len(names))):
            raise CheckpointError(f"labels.json and config.json of {folder.name!r} disagree: fine-tune again")
        return labels
    if all(name == f"LABEL_{number}" for number, name in enumerate(names)):
        raise CheckpointError(
            f"the checkpoint {folder.name!r} has no labels: neither labels.json nor names in config.json. "
            "Without them class ids mean nothing; run 1_finetune, or add id2label to its config."
        )
    return Labels(names, names)


def checkpoint_folder(checkpoints: Path, variant: Variant) -> Path:
    """Which of a study's checkpoints holds the weights of `variant`. CheckpointError where it is missing."""
    folder = checkpoints / variant.checkpoint
    if not (folder / "config.json").is_file():
        named, other = files.short_path(checkpoints.absolute().parent), files.elsewhere(folder)
        other += " (in 4_inference also `checkpoints_of`)" * bool(other)
        raise CheckpointError(f"{named} has no checkpoint {folder.name!r}: run 1_finetune in this study first{other}")
    return folder


def load(checkpoints: Path, variant: Variant, device: torch.device) -> Loaded:
    """The network of `variant` from a study's `checkpoints`, or from the one that this folder is; see `load_folder`."""
    if reason := attention.not_runnable(variant, device):
        raise NotRun(reason)
    one = (checkpoints / "config.json").is_file()
    return load_folder(checkpoints if one else checkpoint_folder(checkpoints, variant), variant, device)


def load_folder(folder: Path, variant: Variant, device: torch.device) -> Loaded:
    """The network of `variant` on `device`, in evaluation mode, verified to be what was asked.

    For a fused execution this is the plain network that `Engine` transforms; it must not have run before that. NotRun
    where it cannot run here, CheckpointError where the checkpoint is unfit or not `whole`, EvidenceError where the
    libraries gave something else than was asked.
    """
    if reason := attention.not_runnable(variant, device):
        raise NotRun(reason)
    about = whole(folder)
    held = FORMATS.get(about.get("weights"))
    if held and held.checkpoint != variant.checkpoint:
        own = f"holds the weights {held.checkpoint!r}: {variant.name} needs {variant.checkpoint!r}"
        raise CheckpointError(f"the checkpoint {folder.name!r} {own}")
    pre, labels = preprocess.load(folder), read_labels(folder)
    dtype = getattr(torch, variant.format.dtype)
    model, loading = _from_pretrained(folder, dtype, device, attn_implementation=variant.attention)
    _refuse_unfit_weights(str(folder), model, loading)
    model.eval()
    if variant.format.planned:
        model.config.plan = records.read_json(folder / plan.FILE)
    verify.verify(model, variant)
    if pre.side != (model.config.image_size,) * 2:
        own, its = " × ".join(map(str, pre.side)), " × ".join([str(model.config.image_size)] * 2)
        said = f"the checkpoint {folder.name!r} prepares pictures of {own} pixels for a network that takes {its}"
        raise CheckpointError(f"{said}: its preprocessor_config.json belongs to another checkpoint")
    return Loaded(model, pre, labels, device, dtype, folder, verify.model_mb(model), variant, about)


def disk_mb(folder: Path) -> float:
    """Megabytes of a checkpoint's weight files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / verify.MB
