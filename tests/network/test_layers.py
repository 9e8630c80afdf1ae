"""Layers of each weight format: every implementation gives the same numbers, and joining layers changes no weight."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from vitlib.network import layers, quantize, tuning
from vitlib.network.tuning import relative_error as relative
from vitlib.study.variants import FORMATS

CLASSES = {row.fused: row for row in FORMATS.values() if row.fused and row.name != "bf16"}


@pytest.fixture
def kernel_paths(monkeypatch):
    """As on a GPU, but with the plain form that every kernel has."""
    monkeypatch.setattr(layers, "use_kernels", lambda device, fp8=False: True)


def stored(kind: str, sides: int = 256, count: int = 1) -> list[nn.Linear]:
    """Layers as transformers loads them for the class `kind`."""
    torch.manual_seed(0)
    bits = CLASSES[kind].bits if CLASSES[kind].stored != "Linear" else 0
    made = [nn.Linear(sides, sides).half() for _ in range(count)]
    return [quantize.quantize_linear(layer, bits) for layer in made] if bits else made


def dequantized(layer: nn.Linear) -> torch.Tensor:
    """The weight (N, K) in float64 that bitsandbytes' own layer stands for."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
    return layer.weight.CB.double() * layer.weight.SCB.double()[:, None] / 127


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("gelu", [None, "erf", "tanh"])
def test_every_implementation_gives_the_same_numbers(kind, gelu, kernel_paths):
    source = stored(kind, 128)
    layer = layers.make(source, [kind] * len(source))
    x = torch.randn(20, 128).half()
    exact_weight = source[0].weight.double() if CLASSES[kind].stored == "Linear" else dequantized(source[0])
    exact = layers.gelu_of(nn.functional.linear(x.double(), exact_weight, source[0].bias.double()), gelu)
    tolerance = {"FP8": 0.06, "W8A8": 0.02}.get(kind, 2e-3)
    with torch.no_grad():
        names = list(layer.implementations(20))
        reference = layer.run(names[0], None, 20, x, gelu)
        assert relative(reference, exact) < tolerance
        for name in names:
            for config in layer.configurations(20, name):
                assert relative(layer.run(name, config, 20, x, gelu), reference) < 5e-3
    assert ("fused" in names) == (kind in ("W8A8", "FP8"))
    if kind == "FP8":
        assert layer.rows.float().abs().amax(dim=1).eq(448).all()  # the whole range is used


@pytest.mark.parametrize("own_order", [False, True])
def test_joining_nf4_layers_and_expanding_their_scales_changes_no_weight(own_order, request):
    """1,024 blocks a layer: the scales of scales divide, and each layer has an offset of its own."""
    if own_order:
        request.getfixturevalue("kernel_paths")
    source = stored("NF4", count=3)
    joined = layers.make(source, ["NF4"] * len(source))
    assert joined.repacked == own_order
    assert torch.equal(joined.weight(torch.float16).double(), torch.cat([dequantized(layer) for layer in source]))
    assert torch.equal(joined.bias, torch.cat([layer.bias for layer in source]))


@pytest.mark.parametrize("kind", ["Int8WeightOnly", "W8A8"])
def test_joining_int8_layers_changes_no_weight(kind, kernel_paths):
    source = stored(kind, count=3)
    joined = layers.make(source, [kind] * len(source))
    assert torch.equal(joined.rows, torch.cat([layer.weight.CB for layer in source]))
    assert joined.rows.abs().amax(dim=1).eq(127).all()  # the whole range is used
    found = joined.rows.double() * joined.scales.double()[:, None]
    torch.testing.assert_close(found, torch.cat([dequantized(layer) for layer in source]), rtol=1e-6, atol=0)
    if kind == "Int8WeightOnly":
        assert torch.equal(joined.weight(torch.float32), joined.rows.float() * joined.scales[:, None])


def test_nf4_that_is_repacked_or_of_another_kind_is_refused():
    for change, message in (("packing_format_for_cpu", "freshly loaded"), ("blocksize", "blocks of 64")):
        source = stored("NF4")
        setattr(source[0].weight.quant_state, change, 128)
        with pytest.raises(ValueError, match=message):
            layers.make(source, ["NF4"] * len(source))


TIMES = {"first": 10.0, "close": 9.9, "wrong": 1.0, "second": 5.0}


class Fake(tuning.Tuned):
    """Four implementations with known times, of which one is wrong."""

    shape, device = "fake", torch.device("cuda")

    def implementations(self, rows):
        return {name: getattr(Fake, name) for name in TIMES}

    def configurations(self, rows, name):
        return ((1,), (2,), (3,), (4,)) if name == "second" else (None,)

    def example(self, rows):
        return (torch.ones(rows, 2),)

    def alike(self):
        return ()

    def first(self, x, config):
        return x

    close = first

    def wrong(self, x, config):
        return 1.1 * x

    def second(self, x, config):
        if config == (1,):
            raise NotImplementedError("does not fit\nmore")
        return x


@pytest.mark.parametrize(("count", "tried"), [(2, 3), (1, 2)])
def test_the_fastest_that_is_right_is_chosen(monkeypatch, count, tried):
    seen = []
    monkeypatch.setattr(tuning, "captured", lambda call, device: (seen.clear(), call(), None)[1:])
    monkeypatch.setattr(tuning, "_each", lambda parts, name, config, rows, inputs: seen.append((name, config, parts)))
    monkeypatch.setattr(
        tuning.timing, "replay_us", lambda _: len(seen[0][2]) * (TIMES[seen[0][0]] + (seen[0][1] == (2,)))
    )
    parts = nn.ModuleList(Fake() for _ in range(count))
    found = tuning.tune(parts, [3, 3])
    assert [trial.implementation for trial in found] == ["first", "close", "wrong", *["second"] * tried]
    chosen = next(trial for trial in found if trial.chosen)
    assert (chosen.config, chosen.us) == (("[3]", 5.0) if count == 2 else ("[2]", 6.0))
    assert sum(trial.chosen for trial in found) == 1
    assert [trial.note for trial in found if trial.note] == ["differs from the reference", "does not fit"]
    assert all(part.choices[3] == (Fake.second, (3,) if count == 2 else (2,)) for part in parts)
    assert all(trial.batch == 3 for trial in found)


def test_a_part_of_which_nothing_runs_is_an_error():
    class Broken(Fake):
        def implementations(self, rows):
            return {"first": Broken.broken}

        def broken(self, x, config):
            raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no implementation of Broken runs for 2 rows: no such kernel"):
        tuning.tune(Broken(), [2])
