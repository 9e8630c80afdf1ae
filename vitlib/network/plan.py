"""Plans: which format each linear layer of the encoder has, and the network of several formats that follows one.

A plan maps the name of each linear below `model.vit` ("layers.3.mlp.fc1") to "fp16", "int8" or "nf4", which means the
layer as the checkpoint merged, int8 or nf4-calibrated holds it. Plain transformers has one quantized format in a
network. So int8 layers are stored as FP16 numbers on the int8 grid, which give the same products, and become int8 rows
again, code by code, in a fused network.
"""

from collections.abc import Mapping

import torch
from torch import nn

from vitlib.network import quantize

CHECKPOINTS = {"fp16": "merged", "int8": "int8", "nf4": "nf4-calibrated"}  # that a linear is taken from
KINDS = {"fp16": "Dense", "int8": "Int8WeightOnly", "nf4": "NF4"}  # of a fused network, see `layers.CLASSES`
STORED = {"fp16": "Linear", "int8": "Linear", "nf4": "Linear4bit"}  # of the network as transformers loads it
FILE = "plan.json"


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a transformers ViT's encoder by name, in the order in which they are stored."""
    return {name: module for name, module in model.vit.named_modules() if isinstance(module, nn.Linear)}


def contradictions(plan: Mapping[str, str], model: nn.Module) -> list[str]:
    """The linears of a plain network whose class is not what the plan says."""
    found = linears(model).items()
    return [name for name, layer in found if type(layer).__name__ != STORED.get(plan.get(name))]


def kept(plan: Mapping[str, str]) -> list[str]:
    """The modules that bitsandbytes must not quantize: the classifier and the linears that are not in NF4."""
    return [quantize.CLASSIFIER, *(f"vit.{name}" for name, form in plan.items() if form != "nf4")]


@torch.no_grad()
def fill(model: nn.Module, networks: Mapping[str, nn.Module], plan: Mapping[str, str]) -> None:
    """Put the NF4 and int8 layers of `networks` (by format, which have not run yet) into an FP16 `model`, in place.

    The layers that the plan has in NF4 must be in NF4 in `model` already.
    """
    for name, form in plan.items():
        if form == "nf4":
            model.vit.set_submodule(name, networks[form].vit.get_submodule(name))
        elif form == "int8":
            model.vit.get_submodule(name).weight.copy_(quantize.dequantized(networks[form].vit.get_submodule(name)))
