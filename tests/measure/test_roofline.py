"""The roofline's counts and arithmetic, and that its ceiling is the product of a linear layer."""

import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vitlib.measure import roofline
from vitlib.network import checkpoint
from vitlib.pictures.sources import Labels

SIZES = {"batch": 1, "bytes_per_weight": 2, "bytes_per_value": 2}


@pytest.fixture(scope="module")
def network():
    with torch.device("meta"):
        return checkpoint.new("vit-large", image_size=224, labels=Labels(*[tuple(map(str, range(102)))] * 2))


def test_operations_are_those_that_pytorch_counts(network):
    counted = roofline.work(network.config, **SIZES, class_token_only=False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval().float()(torch.empty(1, 3, 224, 224, device="meta"))
    assert counted["gflop"].sum() == pytest.approx(counter.get_total_flops() / 1e9)
    assert counted["gflop"].sum() == pytest.approx(123.1, abs=0.1)
    weights = counted.loc[["attention", "mlp"], "mb"].sum() * 1e6
    assert weights > 24 * 12 * 1024**2 * 2  # every weight moves at least once


def test_a_fused_network_does_less_in_its_last_block(network):
    """Keys and values of all patches, everything else for the class token."""
    full, less = (roofline.work(network.config, **SIZES, class_token_only=only) for only in (False, True))
    query_and_output, scores, mlp = 2 * 2 * 1024**2, 2 * 2 * 197 * 1024, 2 * 2 * 1024 * 4096
    assert (full - less)["gflop"].sum() == pytest.approx(196 * (query_and_output + scores + mlp) / 1e9)
    assert (full - less).loc["patch embedding"].abs().sum() == 0


def test_floor_is_the_larger_of_arithmetic_and_bytes():
    counted = pd.DataFrame({"gflop": [1000.0, 0.0], "mb": [1.0, 1000.0]}, index=["mlp", "norm"])
    peak = roofline.Ceilings({"float16": 100.0}, gb_s=1000.0)
    times = pd.Series({"mlp": 20000.0, "norm": 2000.0})
    found = roofline.achieved(counted, times, peak, "float16")
    assert found["floor_us"].to_dict() == {"mlp": 10000.0, "norm": 1000.0}
    assert found["bound"].to_dict() == {"mlp": "arithmetic", "norm": "memory"}
    assert found["share_of_floor"].to_dict() == {"mlp": 0.5, "norm": 0.5}
    assert found["tflop_s"]["mlp"] == pytest.approx(50.0)


def test_eight_bit_products_have_their_own_ceiling_and_conversions_only_their_time():
    counted = pd.DataFrame({"gflop": [1000.0, 10.0], "mb": [1.0, 1.0]}, index=["mlp", "head"])
    peak = roofline.Ceilings({"float16": 100.0, "int8": 200.0}, gb_s=1000.0)
    times = pd.Series({"mlp": 20000.0, "head": 1000.0, "quantization": 7000.0})
    found = roofline.achieved(counted, times, peak, "float16", linears="int8")
    assert found["ceiling_tflop_s"].dropna().to_dict() == {"mlp": 200.0, "head": 100.0}
    assert found["floor_us"]["mlp"] == 5000.0
    assert found["device_time_us"].sum() == 28000.0 and found.loc["quantization", "bound"] == ""
    without = roofline.achieved(
        counted, times, roofline.Ceilings({"float16": 100.0}, 1000.0), "float16", linears="int8"
    )
    assert without["ceiling_tflop_s"]["mlp"] == 100.0  # where no 8-bit product runs


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_products_in_8_bit_run_as_the_ceiling_measures_them(dtype):
    assert roofline.product(dtype, 64, torch.device("cpu"))().shape == (64, 64)  # slow: no ceiling of anything


def test_the_ceiling_is_the_product_that_a_linear_layer_makes(monkeypatch):
    """x w in FP16 is many times slower than x wᵀ on a CPU: a ceiling below the network's own rate is none."""
    seen, linear = [], torch.nn.functional.linear

    def spy(x, weight):
        seen.append((weight.dtype, weight.is_contiguous()))
        return linear(x, weight)

    def once(call, device):
        call()
        return 1.0

    monkeypatch.setattr(roofline.F, "linear", spy)
    monkeypatch.setattr(roofline, "_seconds", once)
    found = roofline.ceilings(torch.device("cpu"))
    assert dict.fromkeys(seen) == {(dtype, True): None for dtype in (torch.float32, torch.float16, torch.bfloat16)}
    assert found.tflops["float32"] == pytest.approx(2 * 1024**3 / 1e12) and found.gb_s > 0


def test_a_share_over_105_percent_is_no_number():
    counted = pd.DataFrame({"gflop": [1000.0, 1000.0], "mb": [1.0, 1.0]}, index=["mlp", "head"])
    peak = roofline.Ceilings({"float16": 100.0}, gb_s=1000.0)
    found = roofline.achieved(counted, pd.Series({"mlp": 10000.0 / 1.04, "head": 10000.0 / 1.06}), peak, "float16")
    assert found["share_of_floor"]["mlp"] == pytest.approx(1.04) and found["bound"]["mlp"] == "arithmetic"
    assert pd.isna(found["share_of_floor"]["head"]) and found["bound"]["head"] == "ceiling not measured"
    assert found["tflop_s"]["head"] == pytest.approx(106.0)  # what was measured stays
