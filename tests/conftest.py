"""What several tests share: a tiny trained-looking network saved as the three checkpoints of a study."""

import itertools
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs the network is a mistake
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # two test processes share the cores: waiting threads must sleep

import pytest
import torch
from transformers import ViTImageProcessorPil

from vitlib.network import checkpoint, plan
from vitlib.pictures import preprocess
from vitlib.pictures.sources import Labels
from vitlib.study.variants import FORMATS

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def labels() -> Labels:
    """Class folders whose id order is neither their text order (1, 10, 2) nor their natural one (1, 2, 10)."""
    return Labels(("2", "10", "1"), ("hard-leaved pocket orchid", "globe thistle", "pink primrose"))


@pytest.fixture(scope="session")
def pre() -> preprocess.Preprocess:
    """What the checkpoints were trained with: like no default of any library, so that what forgets to ask is seen."""
    size, mean, std = {"height": 32, "width": 32}, [0.31, 0.42, 0.53], [0.21, 0.24, 0.27]
    return preprocess.Preprocess(ViTImageProcessorPil(size=size, image_mean=mean, image_std=std))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, labels, pre):
    """A folder with merged, nf4, nf4-calibrated, int8 and mixed checkpoints of a small random ViT."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("study") / "checkpoints"
    network = checkpoint.new("vit-micro", image_size=32, labels=labels).eval()
    with torch.no_grad():  # logits of random weights are all alike; a larger head makes classes differ
        network.classifier.weight.mul_(20)
    cpu = torch.device("cpu")
    checkpoint.save(network.half(), folder / "merged", pre=pre, labels=labels, provenance={"weights": "fp16"})
    pictures = torch.randn(16, 3, 32, 32)
    for weights in ("nf4", "nf4c", "int8"):
        quantized = checkpoint.quantize_checkpoint(folder / "merged", weights, cpu, pictures)
        name = FORMATS[weights].checkpoint
        checkpoint.save(quantized, folder / name, pre=pre, labels=labels, provenance={"weights": weights})
    chosen = dict(zip(plan.linears(network), itertools.cycle(["int8", "nf4", "fp16", "int8", "nf4"]), strict=False))
    checkpoint.save_mixed(folder, chosen, cpu, {})
    return folder


@pytest.fixture
def pixels() -> torch.Tensor:
    """Eight uint8 pictures (8, 3, 32, 32)."""
    return torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
