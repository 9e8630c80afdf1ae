"""Device time is a sum, complete, and belongs to the module that launched it."""

import pytest
import torch

from vitlib.measure import profile
from vitlib.network import checkpoint
from vitlib.study.variants import Variant

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["fp32", "nf4", "int8"])
def profiled(request, checkpoints):
    loaded = checkpoint.load(checkpoints, Variant(request.param), CPU)
    pixel_values = torch.randn(2, 3, 32, 32, dtype=loaded.dtype)
    with torch.inference_mode():
        frame = profile.profile(lambda: loaded.model(pixel_values=pixel_values), loaded.model, CPU, passes=2)
    return request.param, frame


def test_device_time_is_the_sum_of_what_is_listed_and_attributed(profiled):
    _, frame = profiled
    assert frame["device_time_us"].sum() == pytest.approx(frame.attrs["total_us"], rel=1e-6)
    assert profile.by_part(frame).sum() == pytest.approx(frame["device_time_us"].sum())
    assert frame.attrs["unattributed_share"] < 0.05


def test_attention_of_an_sdpa_row_is_found(profiled):
    _, frame = profiled
    assert profile.attention_time_us(frame) > 0
    assert "scaled_dot_product" in profile.attention_kernel(frame)
    inside = frame[frame["operation"] == profile.ATTENTION_FUNCTION].set_index("kernel")
    assert inside.loc[profile.attention_kernel(frame), "calls"] == 4  # one a block and pass


def test_every_part_of_a_vit_is_there(profiled):
    weights, frame = profiled
    expected = {"patch embedding", "attention", "mlp", "norm", "residual", "head"}
    assert expected <= set(frame["part"])
    if weights != "nf4":  # some CPUs multiply NF4 without dequantizing it first
        assert ("quantization" in set(frame["part"])) == (weights == "int8")


def test_every_call_counts(checkpoints):
    """The original study added up averages per call: eight times the calls gave the same number."""
    loaded = checkpoint.load(checkpoints, Variant("fp32"), CPU)
    pixel_values = torch.randn(1, 3, 32, 32)

    def calls(repeats: int) -> float:
        with torch.inference_mode():
            frame = profile.profile(
                lambda: [loaded.model(pixel_values=pixel_values) for _ in range(repeats)], loaded.model, CPU, passes=1
            )
        assert frame["device_time_us"].sum() == pytest.approx(frame.attrs["total_us"], rel=1e-6)
        inside = frame[frame["operation"] == profile.ATTENTION_FUNCTION].set_index("kernel")["calls"]
        return inside[inside.index.str.startswith("aten::_scaled_dot_product")].sum()

    assert (calls(1), calls(8)) == (4, 32)  # one a block


def test_profiling_leaves_the_network_as_it_was(checkpoints):
    loaded = checkpoint.load(checkpoints, Variant("fp32"), CPU)
    before = dict(profile.ALL_ATTENTION_FUNCTIONS.items())
    with profile.annotated(loaded.model):
        pass
    assert dict(profile.ALL_ATTENTION_FUNCTIONS.items()) == before
    assert not any("forward" in vars(module) for module in loaded.model.modules())


def test_every_bitsandbytes_operator_seen_has_a_known_kind(profiled):
    """A new operator of bitsandbytes would be booked under its layer without anybody having decided that."""
    products = ("int8_linear_matmul", "int8_scaled_mm", "int8_mixed_scaled_mm", "gemm_4bit", "gemv_4bit")
    known = (*profile._QUANTIZATION, *(f"bitsandbytes::{name}" for name in products))
    names = {name for name in profiled[1]["operation"] if name.startswith("bitsandbytes::")}
    assert all(name.startswith(known) for name in names)
