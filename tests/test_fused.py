"""The fused network against the plain one it is made from: the same function, in every weight format."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from vitlib import attention, engine, fused, linears, models, profile, quantize
from vitlib.engine import Engine
from vitlib.variants import VARIANTS, Variant

CPU = torch.device("cpu")


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def plain(checkpoints, weights: str) -> models.Loaded:
    return models.load(checkpoints, Variant(weights, "direct"), CPU)


def loaded_as(checkpoints, weights: str) -> models.Loaded:
    return models.load(checkpoints, Variant(weights, "direct", "fused"), CPU)


@pytest.fixture(scope="module")
def expected(checkpoints):
    """Logits of the plain networks, computed in the precision that separates formats from rounding."""
    pixels = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = {
        w: engine.logits(Engine(plain(checkpoints, w)), pixels, 3) for w in ("fp32", "fp16", "bf16", "nf4", "int8")
    }
    return pixels, found


@pytest.mark.parametrize(
    ("weights", "of", "tolerance"),
    [
        ("fp32", "fp32", 1e-5),
        ("fp16", "fp16", 1e-2),
        ("bf16", "bf16", 5e-2),
        ("nf4", "nf4", 2e-2),
        ("w8a16", "int8", 3e-2),  # LLM.int8 quantizes its input as well
        ("w8a8", "int8", 3e-2),
        ("fp8", "fp16", 0.15),
    ],
)
def test_fused_logits_are_those_of_the_plain_network(checkpoints, expected, weights, of, tolerance):
    pixels, found = expected
    fast = Engine(loaded_as(checkpoints, weights), "fused", (1, 3))
    assert relative(engine.logits(fast, pixels, 3), found[of]) < tolerance  # five pictures: the last batch is odd
    assert models.verify(fast.network, Variant(weights, "direct", "fused"))["encoder_linears"]
