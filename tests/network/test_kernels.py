"""8-bit products, dequantization, norms and attention against float64, as plain PyTorch and as Triton kernels.

On a CUDA machine the kernels run compiled. Elsewhere they run in Triton's interpreter, which must be chosen before
Triton is imported: one test runs this file again in a process of its own.
"""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional
from torch.nn import functional as F

from vitlib.network.kernels import attention, dequantize, norms, products, triton_support
from vitlib.network.kernels.products import LIMITS

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
KERNELS_RUN = triton_support.use_kernels(DEVICE)
FORMS = ["plain", "triton"] if KERNELS_RUN else ["plain"]
CUT = KERNELS_RUN and not CUDA  # Triton's interpreter cuts bf16 off where a GPU rounds: a step farther away
EPS = {torch.float16: 2**-10, torch.bfloat16: 2**-6 if CUT else 2**-7}
FP8 = torch.float8_e4m3fn
SHAPE = (37, 48, 80)  # M odd, N no multiple of a tile, K no multiple of a step
SMALL = products.Config(32, 32, 64, 1, 4, 2)
NF4 = functional.get_4bit_type("nf4", device="cpu")
GELUS = {None: lambda y: y, "tanh": lambda y: F.gelu(y, approximate="tanh"), "erf": F.gelu}


@pytest.fixture
def random():
    """Fresh numbers every run; the seed is printed, so that a failure can be had again."""
    seed = int(os.environ.get("KERNELS_SEED", torch.seed() % 2**31))
    print(f"KERNELS_SEED={seed}")
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Both forms of every function; the plain one is forced by saying that Triton is missing."""
    if request.param == "plain":
        monkeypatch.setattr(triton_support, "use_kernels", lambda device, fp8=False: False)
    return request.param


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.double().cpu()
    return ((found.double().cpu() - expected).norm() / expected.norm()).item()


def check_rounded(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to the bit; in the interpreter bf16 may be cut off instead of rounded."""
    cut = found.dtype == torch.bfloat16 and CUT
    torch.testing.assert_close(found.cpu(), expected, rtol=2**-7 if cut else 0, atol=0)


def nf4_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of an fp32 weight in bitsandbytes' layout, written out plainly."""
    blocks = weight.reshape(-1, 64)
    absmax = blocks.abs().amax(dim=1)
    codes = (blocks[:, :, None] / absmax[:, None, None] - NF4).abs().argmin(dim=2)
    codes = codes.to(torch.uint8).reshape(-1, 2)
    return codes[:, :1] << 4 | codes[:, 1:], absmax


def nf4_values(packed: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    codes = torch.stack([packed.reshape(-1) >> 4, packed.reshape(-1) & 15], dim=1).reshape(-1, 64)
    return (NF4.double()[codes.long()] * absmax.double()[:, None]).reshape(shape)


def int8_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = weight.abs().amax(dim=1) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


def on(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


@pytest.mark.skipif(KERNELS_RUN and not CUDA, reason="compared without the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_repacked_weights_are_exactly_those_that_bitsandbytes_dequantizes(random, dtype):
    weight = random(96, 192).to(dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    found = dequantize.dequantize_nf4(dequantize.repack_nf4(packed), absmax, torch.empty(96 * 192, dtype=dtype))
    # On some processors bitsandbytes rounds the scale before the product too: a step of fp16 away.
    tolerance, expected = 2**-10 if dtype == torch.float16 else 0, functional.dequantize_4bit(packed, state)
    torch.testing.assert_close(found.view(96, 192), expected.to(dtype), rtol=tolerance, atol=0)


def test_a_run_of_nf4_matrices_is_dequantized_to_its_values_rounded_once(random, form):
    shapes = [(33, 128), (6, 192)]  # the last has rows that end inside a group
    weights = [nf4_weight(random(*shape)) for shape in shapes]
    packed = torch.cat([dequantize.repack_nf4(codes) for codes, _ in weights])
    scales = torch.cat([absmax for _, absmax in weights])
    for dtype in (torch.float32, *EPS):
        expected = torch.cat([nf4_values(*w, shape).reshape(-1) for w, shape in zip(weights, shapes, strict=True)])
        out = torch.full((len(expected) + 1,), 7.0, dtype=dtype, device=DEVICE)
        dequantize.dequantize_nf4(*on(packed, scales), out[:-1])
        check_rounded(out[:-1], expected.float().to(dtype))
        assert out[-1] == 7  # nothing is written behind the run
    with pytest.raises(ValueError, match="do not fit"):
        dequantize.dequantize_nf4(*on(packed, scales), out)
    with pytest.raises(ValueError, match="multiple of 128"):
        dequantize.repack_nf4(nf4_weight(random(3, 64))[0])


@pytest.mark.parametrize("shapes", [((33, 128), (50, 64)), ((7, 192), (5, 96))])
def test_a_run_of_int8_matrices_is_dequantized_to_its_values_rounded_once(random, form, shapes):
    """In chunks of 64 and of 96 numbers, which is no power of two."""
    (wide, wide_scale), (tall, tall_scale) = (int8_weight(random(*shape)) for shape in shapes)
    rows = torch.cat([wide.reshape(-1), tall.reshape(-1)])
    scales = torch.cat([wide_scale.repeat_interleave(2), tall_scale])
    expected = torch.cat([(w.float() * s[:, None]).reshape(-1) for w, s in ((wide, wide_scale), (tall, tall_scale))])
    for dtype in (torch.float32, *EPS):
        out = torch.full((len(expected) + 1,), 7.0, dtype=dtype, device=DEVICE)
        dequantize.dequantize_int8(*on(rows, scales), out[:-1])
        check_rounded(out[:-1], expected.to(dtype))
        assert out[-1] == 7
    with pytest.raises(ValueError, match="do not fit"):
        dequantize.dequantize_int8(*on(rows, scales[:-1]), out[:-1])


@pytest.mark.parametrize("dtype", LIMITS)
def test_rows_are_quantized_to_the_nearest_step(random, form, dtype):
    x = random(7, 100)
    x[2], x[3] = 0, x[3] * 1e4  # a row of zeros, and one that would overflow if it shared a scale
    q, scale = (t.cpu() for t in products.quantize_rows(x.half().to(DEVICE), dtype))
    x = x.half().float()
    largest = x.abs().amax(dim=1)
    torch.testing.assert_close(scale, largest / LIMITS[dtype])
    assert (q[2].float() == 0).all()
    if dtype == FP8 and CUT:  # the interpreter loses the carry of a number that rounds up to a power of two
        assert relative(q.float() * scale[:, None], x) < 0.25
        return
    step = {torch.int8: 0.5001 * scale[:, None], FP8: x.abs() * 2**-4 + scale[:, None] * 2**-10}[dtype]
    assert ((q.float() * scale[:, None] - x).abs() <= step).all()
    end = {torch.int8: 127, FP8: 448}[dtype]  # the largest codes that the formats have, all of which are used
    assert q.float().abs().amax(dim=1)[[0, 3]].tolist() == [end] * 2


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("gelu", "split"), [(None, 1), ("erf", 1), ("tanh", 2)])
def test_8_bit_product(random, form, dtype, gelu, split):
    m, n, k = SHAPE
    q, q_scale = products.plain_quantize(random(m, k), dtype)
    rows, scale = products.plain_quantize(random(n, k) / k**0.5, dtype)
    bias = random(n).half()
    y = (q.double() * q_scale.double()[:, None]) @ (rows.double() * scale.double()[:, None]).T
    config = SMALL._replace(split_k=split)
    found = products.linear_8bit(*on(q, q_scale, rows, scale, bias), gelu=gelu, config=config)
    assert found.dtype == torch.float16
    assert relative(found, GELUS[gelu](y + bias.double())) < 2**-10


def test_int8_sums_do_not_overflow(form):
    """127 · 127 · 2048 is over 2¹⁶ and 2²⁴: neither 16-bit nor fp32 sums would be exact."""
    q = torch.full((3, 2048), 127, dtype=torch.int8)
    q[:, 0] = 126
    ones, rows = torch.ones(3), torch.full((32, 2048), 127, dtype=torch.int8)
    scale = torch.full((32,), 2.0**-20)
    found = products.linear_8bit(*on(q, ones, rows, scale), dtype=torch.float32, config=SMALL)
    assert relative(found, torch.full((3, 32), (2047 * 127 * 127 + 126 * 127) / 2**20)) < 1e-7


@pytest.mark.parametrize("dtype", EPS)
def test_sum_and_norm(random, form, dtype):
    m, n = 5, 96
    x, residual = random(m, n).to(dtype), 30 + random(m, n).to(dtype)
    weight, bias = random(n).to(dtype), random(n).to(dtype)
    found, normed, _ = norms.add_layer_norm(*on(x, residual, weight, bias), 1e-6)
    assert relative(found, x.double() + residual.double()) < EPS[dtype]
    assert found.dtype == normed.dtype == dtype
    expected = F.layer_norm(found.double().cpu(), (n,), weight.double(), bias.double(), 1e-6)
    assert relative(normed, expected) < EPS[dtype]


@pytest.mark.parametrize("dtype", LIMITS)
def test_sum_norm_and_quantization(random, form, dtype):
    x, residual, weight, bias = random(6, 96).half(), random(6, 96).half(), random(96).half(), random(96).half()
    arguments = on(x, residual, weight, bias)
    found, q, scale = norms.add_layer_norm(*arguments, 1e-6, dtype)
    assert relative(found, x.double() + residual.double()) < EPS[torch.float16]
    expected = F.layer_norm(found.double().cpu(), (96,), weight.double(), bias.double(), 1e-6)
    torch.testing.assert_close(scale.cpu(), expected.abs().amax(dim=1).float() / LIMITS[dtype], rtol=1e-5, atol=0)
    assert q.dtype == dtype
    if dtype == torch.int8:  # half a step away at most, whatever was drawn
        steps = (q.cpu().double() - expected / scale.cpu().double()[:, None]).abs().max()
        assert 0.25 < steps < 0.501
    else:
        assert relative(q.float() * scale[:, None], expected) < (0.25 if CUT else 0.05)


def test_configurations_are_different_fit_and_fill_the_device():
    for m, (n, k) in itertools.product((1, 197, 1576, 25216), ((1024, 1024), (4096, 1024), (1024, 4096))):
        found = products.configs(m, n, k)
        assert len(set(found)) == len(found) >= 2
        assert all(config.shared_bytes <= 227 * 1024 and 1 <= config.split_k <= 8 for config in found)
        assert products.configs(m, n, k, shared_bytes=48 * 1024)  # the smallest cards get something too
    config = products.configs(197, 1024, 4096)[1]  # few tiles: the sum is split
    tiles = -(-197 // config.bm) * -(-1024 // config.bn)
    assert config.split_k > 1 and 66 < tiles * config.split_k <= 165


def test_wrong_inputs_are_refused(random):
    x = random(4, 256).half()
    (q, q_scale), (rows, scale) = products.quantize_rows(x), products.quantize_rows(random(32, 256).half())
    for message, call in {
        r"pass \.contiguous": lambda: products.linear_8bit(q[:, ::2], q_scale, rows, scale),
        "256 were expected": lambda: products.linear_8bit(q, q_scale, rows[:, :128].contiguous(), scale),
        "same": lambda: norms.add_layer_norm(x, x[:3], x[0], x[0], 1e-6),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_rows_longer_than_a_kernel_takes_go_through_the_plain_form(random):
    x = random(3, 5120).half()  # the MLP of ViT-H
    codes, scales = products.quantize_rows(x)
    assert (codes.float() * scales[:, None] - x.float()).abs().max() <= scales.max() / 2 * 1.01
    total, normed, _ = norms.add_layer_norm(x, x, torch.ones(5120).half(), torch.zeros(5120).half(), 1e-6)
    assert total.shape == normed.shape == (3, 5120) and normed.float().std().sub(1).abs() < 0.01


@pytest.mark.skipif(not CUDA, reason="every configuration is compiled for the device at hand")
@pytest.mark.parametrize("m", [197, 1576])
def test_every_configuration_is_right(random, m):
    x, weight = random(m, 1024).half().to(DEVICE), random(1024, 1024) / 32
    int8, expected = on(*int8_weight(weight)), x.double().cpu() @ weight.double().T
    for config in products.configs_for(m, 1024, 1024, DEVICE):
        found = products.linear_8bit(*products.quantize_rows(x), *int8, config=config)
        assert relative(found, expected) < 0.02


def exact_attention(query, key, value, scaling):
    scores = torch.einsum("nihw,njhw->nhij", query.double(), key.double()) * scaling
    return torch.einsum("nhij,njhw->nihw", scores.softmax(dim=-1), value.double())


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(
    ("count", "rows", "tokens", "heads", "width"),
    [(2, 37, 37, 2, 64), (1, 1, 50, 3, 32), (1, 9, 9, 2, 24)],
)
def test_attention_on_views_of_one_product(random, form, dtype, count, rows, tokens, heads, width):
    """Rows beyond a tile, tokens beyond a step, a single query, a width that is no power of two; scores far from 0."""
    made = random(count, tokens, 3, heads, width).mul(2).to(dtype).to(DEVICE)
    query, key, value = made.unbind(2)
    query, scaling = query[:, :rows], 0.7 * width**-0.5
    expected = exact_attention(query.cpu(), key.cpu(), value.cpu(), scaling)
    for config in (attention.AttentionConfig(16, 16), attention.AttentionConfig(32, 128)):
        found = attention.attention(query, key, value, scaling, config)
        assert found.shape == query.shape and found.is_contiguous() and found.dtype == dtype
        assert relative(found, expected) < 2 * EPS[dtype]


def test_attention_refuses_what_does_not_fit(random):
    query = random(1, 4, 2, 16).half()
    for key, value in ((query[..., :8], query[..., :8]), (query, query[:, :3]), (query[:, :0], query[:, :0])):
        with pytest.raises(ValueError, match="attention takes"):
            attention.attention(query, key, value, 1.0)
    with pytest.raises(ValueError, match="contiguous in width"):
        attention.attention(*[random(1, 4, 16, 2).half().transpose(2, 3)] * 3, 1.0)


@pytest.mark.skipif(not CUDA, reason="every configuration is compiled for the device at hand")
def test_every_configuration_of_attention_is_right(random):
    query, key, value = random(2, 197, 3, 16, 64).half().to(DEVICE).unbind(2)
    expected = exact_attention(query.cpu(), key.cpu(), value.cpu(), 0.125)
    for config in {*attention.FEW_TILES, *attention.MANY_TILES}:
        assert relative(attention.attention(query, key, value, 0.125, config), expected) < 2 * EPS[torch.float16]


@pytest.mark.skipif(CUDA or KERNELS_RUN, reason="the kernels run in this process")
def test_the_kernels_pass_all_of_this_in_tritons_interpreter():
    if triton_support.triton is None:
        pytest.skip("the package triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "-k", "triton", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 22, done.stdout
