"""Quantized products and norms against float64, as plain PyTorch and as Triton kernels.

On a CUDA machine the kernels run compiled. Elsewhere they run in Triton's interpreter, which must be chosen before
Triton is imported: one test starts this file once more in a process of its own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from vitlib import kernels

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
KERNELS_RUN = kernels.missing_triton(DEVICE) == ""
FORMS = ["plain", "triton"] if KERNELS_RUN else ["plain"]
CUT = KERNELS_RUN and not CUDA  # Triton's interpreter cuts bf16 off where a GPU rounds: a step farther away
EPS = {torch.float16: 2**-10, torch.bfloat16: 2**-6 if CUT else 2**-7}
FP8 = torch.float8_e4m3fn
SHAPES = [(37, 96, 256), (5, 100, 384)]  # M odd, N no multiple of a tile
SMALL = kernels.Config(32, 32, 128, 1, 4, 2)
GELUS = {False: lambda y: y, "tanh": lambda y: F.gelu(y, approximate="tanh"), "erf": F.gelu}


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
        for name in ("missing_triton", "missing_products", "missing_fp8"):
            monkeypatch.setattr(kernels, name, lambda device: "plain form wanted")
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
    codes = (blocks[:, :, None] / absmax[:, None, None] - torch.tensor(kernels.NF4)).abs().argmin(dim=2)
    codes = codes.to(torch.uint8).reshape(-1, 2)
    return codes[:, :1] << 4 | codes[:, 1:], absmax


def nf4_values(packed: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    codes = torch.stack([packed.reshape(-1) >> 4, packed.reshape(-1) & 15], dim=1).reshape(-1, 64)
    return (torch.tensor(kernels.NF4).double()[codes.long()] * absmax.double()[:, None]).reshape(shape)


def int8_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = weight.abs().amax(dim=1) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


def on(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


# ----------------------------------------------------------------------------------------------------------- 4 bit


@pytest.mark.skipif(KERNELS_RUN and not CUDA, reason="compared where bitsandbytes is imported anyway")
def test_the_code_table_is_bitsandbytes_own():
    functional = pytest.importorskip("bitsandbytes.functional")
    assert list(kernels.NF4) == functional.get_4bit_type("nf4", device="cpu").tolist()


@pytest.mark.skipif(KERNELS_RUN and not CUDA, reason="compared where bitsandbytes is imported anyway")
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_repacked_weights_are_exactly_those_that_bitsandbytes_dequantizes(random, double, dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = random(96, 256).to(dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double)
    absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset if double else state.absmax
    found = kernels.dequantize_nf4(*kernels.repack_nf4(packed, absmax, (96, 256)), dtype)
    # On some processors bitsandbytes rounds the scale before the product too: a step of fp16 away.
    tolerance = 2**-10 if dtype == torch.float16 else 0
    torch.testing.assert_close(found, functional.dequantize_4bit(packed, state).to(dtype), rtol=tolerance, atol=0)


def test_nf4_dequantizes_to_its_values_rounded_once(random, form):
    for shape in ((100, 256), (33, 128)):
        packed, absmax = nf4_weight(random(*shape))
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            repacked = on(*kernels.repack_nf4(packed, absmax, shape))
            expected = nf4_values(packed, absmax, shape).float().to(dtype)
            check_rounded(kernels.dequantize_nf4(*repacked, dtype), expected)
    out = torch.empty(33, 128, dtype=dtype, device=DEVICE)
    assert kernels.dequantize_nf4(*repacked, dtype, out) is out
    check_rounded(out, expected)


def test_a_run_of_nf4_matrices_is_dequantized_at_once(random, form):
    shapes = [(33, 256), (7, 128), (5, 384)]
    weights = [nf4_weight(random(*shape)) for shape in shapes]
    repacked = [kernels.repack_nf4(*weight, shape) for weight, shape in zip(weights, shapes, strict=True)]
    packed = torch.cat([codes.reshape(-1) for codes, _ in repacked])
    scales = torch.cat([laid.contiguous().reshape(-1) for _, laid in repacked])
    for dtype in (torch.float32, *EPS):
        expected = torch.cat([nf4_values(*w, shape).reshape(-1) for w, shape in zip(weights, shapes, strict=True)])
        out = torch.full((len(expected) + 1,), 7.0, dtype=dtype, device=DEVICE)
        kernels.dequantize_nf4_run(*on(packed, scales), out[:-1])
        check_rounded(out[:-1], expected.float().to(dtype))
        assert out[-1] == 7  # nothing is written behind the run
    with pytest.raises(ValueError, match="do not fit"):
        kernels.dequantize_nf4_run(*on(packed, scales), out)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(("gelu", "split"), [(False, 1), ("erf", 1), ("tanh", 2)])
def test_nf4_product(random, form, dtype, gelu, split):
    for m, n, k in SHAPES:
        x, bias = random(m, k).to(dtype), random(n).to(dtype)
        packed, absmax = nf4_weight(random(n, k) / k**0.5)
        expected = GELUS[gelu](x.double() @ nf4_values(packed, absmax, (n, k)).T + bias.double())
        config = SMALL._replace(split_k=split)
        device = on(x, *kernels.repack_nf4(packed, absmax, (n, k)), bias)
        found = kernels.linear_nf4(*device, gelu=gelu, config=config)
        assert (found.dtype, found.shape) == (dtype, (m, n))
        assert relative(found, expected) < 1.5 * EPS[dtype]


def test_nf4_scales_may_be_fp16_and_lie_either_way(random, form):
    packed, absmax = nf4_weight(random(96, 256) / 16)
    x, expected = random(37, 256).half(), None
    codes, scales = on(*kernels.repack_nf4(packed, absmax, (96, 256), scale_dtype=torch.float16))
    for laid in (scales, scales.contiguous()):
        found = kernels.linear_nf4(x.to(DEVICE), codes, laid, config=SMALL)
        expected = found if expected is None else expected
        assert torch.equal(found, expected)
    assert relative(found, x.double() @ nf4_values(packed, absmax, (96, 256)).T) < 2 * EPS[torch.float16]


def test_repacking_refuses_what_the_kernels_cannot_read(random):
    packed, absmax = nf4_weight(random(4, 192))
    with pytest.raises(ValueError, match="multiple of 128"):
        kernels.repack_nf4(packed, absmax, (4, 192))
    with pytest.raises(ValueError, match="has 256 bytes of codes and 8 scales"):
        kernels.repack_nf4(packed, absmax, (4, 128))


def run_assembly(text: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The few PTX instructions that decode weights, on int64 tensors of 32-bit words."""
    registers = dict(inputs)

    def prmt(a, b, control):
        pool = a | b << 32
        return sum((pool >> (8 * (control >> 4 * i & 7)) & 255) << 8 * i for i in range(4))

    operations = {
        "shr.u32": lambda a, b: a >> b,
        "and.b32": lambda a, b: a & b,
        "or.b32": lambda a, b: a | b,
        "xor.b32": lambda a, b: a ^ b,
        "mov.b32": lambda a: a,
        "prmt.b32": prmt,
        "sub.f16x2": lambda a, b: words(halves(a) - halves(b)),
    }
    for name, target, sources in re.findall(r"([a-z]+\.\w+) ([\w$]+), ([^;]+);", text.split(";", 1)[1]):
        like = next(iter(inputs.values()))
        values = [s.strip() for s in sources.split(",")]
        values = [registers[v] if v in registers else torch.full_like(like, int(v, 0)) for v in values]
        registers[target] = operations[name](*values)
    return registers


def halves(word: torch.Tensor, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """(…, 2) numbers in 32-bit words."""
    return torch.stack([word & 0xFFFF, word >> 16], dim=-1).to(torch.int32).to(torch.int16).view(dtype)


def words(numbers: torch.Tensor) -> torch.Tensor:
    parts = numbers.view(torch.int16).long() & 0xFFFF
    return parts[..., 0] | parts[..., 1] << 16


@pytest.mark.parametrize("dtype", EPS)
def test_the_nf4_assembly_decodes_every_pair_of_bytes(dtype):
    pairs = torch.arange(2**16)
    other = (pairs * 40503 + 977) % 2**16  # the upper two bytes, which go through the same steps
    word = pairs | other << 16
    registers = run_assembly(kernels._nf4_assembly(dtype), {"$4": word})
    codes = torch.stack([word >> 8 * i & 255 for i in range(4)], dim=1)
    table = torch.tensor(kernels.NF4).to(dtype)
    high = torch.cat([halves(registers["$0"], dtype), halves(registers["$1"], dtype)], dim=1)
    low = torch.cat([halves(registers["$2"], dtype), halves(registers["$3"], dtype)], dim=1)
    assert torch.equal(high, table[codes >> 4])
    assert torch.equal(low, table[codes & 15])


def test_the_int8_assembly_decodes_every_byte():
    numbers = torch.arange(-128, 128)
    bytes_ = torch.stack([numbers.roll(shift) for shift in (0, 1, 77, 130)], dim=1)
    word = sum((bytes_[:, i] & 255) << 8 * i for i in range(4))
    registers = run_assembly(kernels.INT8_ASSEMBLY, {"$2": word})
    assert torch.equal(torch.cat([halves(registers["$0"]), halves(registers["$1"])], dim=1).long(), bytes_)


# ----------------------------------------------------------------------------------------------------------- 8 bit


def test_a_run_of_int8_matrices_is_dequantized_at_once(random, form):
    (wide, wide_scale), (tall, tall_scale) = int8_weight(random(33, 256)), int8_weight(random(50, 64))
    rows = torch.cat([wide.reshape(-1), tall.reshape(-1)])
    scales = torch.cat([wide_scale.repeat_interleave(4), tall_scale])
    expected = torch.cat([(w.float() * s[:, None]).reshape(-1) for w, s in ((wide, wide_scale), (tall, tall_scale))])
    for dtype in (torch.float32, *EPS):
        out = torch.full((len(expected) + 1,), 7.0, dtype=dtype, device=DEVICE)
        kernels.dequantize_int8_run(*on(rows, scales), out[:-1])
        check_rounded(out[:-1], expected.to(dtype))
        assert out[-1] == 7
    with pytest.raises(ValueError, match="do not fit"):
        kernels.dequantize_int8_run(*on(rows, scales[:-1]), out[:-1])


def test_int8_dequantizes_to_its_values_rounded_once(random, form):
    rows, scale = int8_weight(random(33, 200))
    for dtype in (torch.float32, *EPS):
        check_rounded(kernels.dequantize_int8(*on(rows, scale), dtype), (rows.float() * scale[:, None]).to(dtype))


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(("gelu", "split"), [(False, 1), ("erf", 1), ("tanh", 2)])
def test_int8_product(random, form, dtype, gelu, split):
    for m, n, k in (*SHAPES, (9, 40, 80)):  # the last has no whole step of the sum
        x, bias = random(m, k).to(dtype), random(n).to(dtype)
        rows, scale = int8_weight(random(n, k) / k**0.5)
        expected = GELUS[gelu](x.double() @ (rows.double() * scale.double()[:, None]).T + bias.double())
        config = SMALL._replace(bk=64, split_k=split)
        found = kernels.linear_int8(*on(x, rows, scale, bias), gelu=gelu, config=config)
        assert (found.dtype, found.shape) == (dtype, (m, n))
        assert relative(found, expected) < 1.5 * EPS[dtype]


@pytest.mark.parametrize("dtype", kernels.LIMITS)
def test_rows_are_quantized_to_the_nearest_step(random, form, dtype):
    x = random(7, 100)
    x[2], x[3] = 0, x[3] * 1e4  # a row of zeros, and one that would overflow if it shared a scale
    q, scale = (t.cpu() for t in kernels.quantize_rows(x.half().to(DEVICE), dtype))
    x = x.half().float()
    largest = x.abs().amax(dim=1)
    torch.testing.assert_close(scale, largest / kernels.LIMITS[dtype])
    assert (q[2].float() == 0).all()
    if dtype == FP8 and CUT:  # the interpreter loses the carry of a number that rounds up to a power of two
        assert relative(q.float() * scale[:, None], x) < 0.25
        return
    step = {torch.int8: 0.5001 * scale[:, None], FP8: x.abs() * 2**-4 + scale[:, None] * 2**-10}[dtype]
    assert ((q.float() * scale[:, None] - x).abs() <= step).all()
    assert q.float().abs().amax(dim=1)[[0, 3]].tolist() == [kernels.LIMITS[dtype]] * 2


@pytest.mark.parametrize("dtype", kernels.LIMITS)
@pytest.mark.parametrize(("gelu", "split"), [(False, 1), ("erf", 1), ("tanh", 2)])
def test_8_bit_product(random, form, dtype, gelu, split):
    for m, n, k in (*SHAPES, (9, 48, 80)):
        q, q_scale = kernels._plain_quantize(random(m, k), dtype)
        rows, scale = kernels._plain_quantize(random(n, k) / k**0.5, dtype)
        bias = random(n).half()
        y = (q.double() * q_scale.double()[:, None]) @ (rows.double() * scale.double()[:, None]).T
        config = SMALL._replace(bk=64, split_k=split)
        found = kernels.linear_w8a8(*on(q, q_scale, rows, scale, bias), gelu=gelu, config=config)
        assert found.dtype == torch.float16
        assert relative(found, GELUS[gelu](y + bias.double())) < 2**-10


def test_int8_sums_do_not_overflow(form):
    """127 · 127 · 4096 is over 2¹⁶ and 2²⁴: neither 16-bit nor fp32 sums would be exact."""
    q = torch.full((3, 4096), 127, dtype=torch.int8)
    q[:, 0] = 126
    ones, rows = torch.ones(3), torch.full((32, 4096), 127, dtype=torch.int8)
    scale = torch.full((32,), 2.0**-20)
    found = kernels.linear_w8a8(*on(q, ones, rows, scale), out_dtype=torch.float32, config=SMALL)
    assert relative(found, torch.full((3, 32), (4095 * 127 * 127 + 126 * 127) / 2**20)) < 1e-7


# ------------------------------------------------------------------------------------------- partial sums and norms


@pytest.mark.parametrize("kind", ["nf4", "int8", "w8a8"])
def test_parts_of_a_product_add_up_to_it(random, form, kind):
    x, weight, bias, config = random(37, 512).half(), random(96, 512), random(96).half(), SMALL._replace(split_k=4)
    if kind == "nf4":
        function, arguments = kernels.linear_nf4, (x, *kernels.repack_nf4(*nf4_weight(weight), (96, 512)))
    elif kind == "int8":
        function, arguments = kernels.linear_int8, (x, *int8_weight(weight))
    else:
        function, arguments = (
            kernels.linear_w8a8,
            (*kernels._plain_quantize(x.float(), torch.int8), *int8_weight(weight)),
        )
    arguments = on(*arguments)
    partials = function(*arguments, config=config, partials=True)
    assert (partials.dtype, partials.shape) == (
        torch.float32,
        (4 if form == "triton" and not kernels.missing_products(DEVICE) else 1, 37, 96),
    )
    whole = function(*arguments, bias.to(DEVICE), gelu="tanh", config=config)
    summed = kernels.reduce_partials(partials, bias.to(DEVICE), "tanh", torch.float16)
    assert relative(summed, whole) < 2**-11


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("addends", ["x", "x residual", "partials residual", "x residual partials", "partials"])
def test_sum_and_norm(random, form, dtype, addends):
    m, n = 5, 96
    given = {"x": random(m, n).to(dtype), "residual": 30 + random(m, n).to(dtype), "partials": random(3, m, n)}
    given = {name: tensor if name in addends.split() else None for name, tensor in given.items()}
    linear_bias = random(n).to(dtype) if "partials" in addends else None
    weight, bias = random(n).to(dtype), random(n).to(dtype)
    parts = [
        given["x"],
        given["residual"],
        None if given["partials"] is None else given["partials"].sum(0),
        linear_bias,
    ]
    total = sum(part.double() for part in parts if part is not None)
    given = {name: None if tensor is None else tensor.to(DEVICE) for name, tensor in given.items()}
    device_bias = None if linear_bias is None else linear_bias.to(DEVICE)
    arguments = (given["x"], given["residual"], *on(weight, bias), 1e-6)
    found, normed = kernels.add_layer_norm(*arguments, partials=given["partials"], linear_bias=device_bias)
    assert relative(found, total) < EPS[dtype]
    assert found.dtype == normed.dtype == dtype
    expected = F.layer_norm(found.double().cpu(), (n,), weight.double(), bias.double(), 1e-6)
    assert relative(normed, expected) < EPS[dtype]
    if addends == "x":
        assert found.data_ptr() == given["x"].data_ptr() or form == "plain"


@pytest.mark.parametrize("dtype", kernels.LIMITS)
def test_sum_norm_and_quantization(random, form, dtype):
    x, residual, weight, bias = random(6, 96).half(), random(6, 96).half(), random(96).half(), random(96).half()
    arguments = on(x, residual, weight, bias)
    found, q, scale = kernels.add_layer_norm_quantize(*arguments, 1e-6, dtype)
    assert relative(found, x.double() + residual.double()) < EPS[torch.float16]
    expected = F.layer_norm(found.double().cpu(), (96,), weight.double(), bias.double(), 1e-6)
    torch.testing.assert_close(
        scale.cpu(), expected.abs().amax(dim=1).float() / kernels.LIMITS[dtype], rtol=1e-5, atol=0
    )
    assert q.dtype == dtype
    if dtype == torch.int8:  # half a step away at most, whatever was drawn
        steps = (q.cpu().double() - expected / scale.cpu().double()[:, None]).abs().max()
        assert 0.25 < steps < 0.501
    else:
        assert relative(q.float() * scale[:, None], expected) < (0.25 if CUT else 0.05)


# ------------------------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize("kind", kernels.CANDIDATES)
@pytest.mark.parametrize("m", [197, 1576, 6304, 25216])
def test_candidates_are_few_different_and_fit(kind, m):
    for n, k in ((1024, 1024), (3072, 1024), (4096, 1024), (1024, 4096)):
        found = kernels.configs(kind, m, n, k)
        assert 2 <= len(found) <= 8
        assert len(set(found)) == len(found)
        for config in found:
            assert config.shared_bytes(kind) <= 227 * 1024
            assert 1 <= config.split_k <= 8
            assert kind != "nf4" or config.bk == kernels.GROUP
    assert kernels.configs(kind, m, 1024, 1024, shared_bytes=16 * 1024)  # the smallest cards get something too


def test_few_tiles_are_split_until_they_fill_the_device():
    config = kernels.configs("nf4", 197, 1024, 4096)[0]
    tiles = -(-197 // config.bm) * -(-1024 // config.bn)
    assert 66 < tiles * config.split_k <= 165


def test_unknown_kinds_and_wrong_inputs_are_refused(random):
    codes, scales = kernels.repack_nf4(*nf4_weight(random(32, 128)), (32, 128))
    x = random(4, 256).half()
    with pytest.raises(ValueError, match="unknown kind"):
        kernels.configs("nf5", 1, 1, 1)
    with pytest.raises(ValueError, match=r"pass \.contiguous"):
        kernels.linear_nf4(x[:, ::2], codes, scales)
    with pytest.raises(ValueError, match="128 were expected"):
        kernels.linear_nf4(x, codes, scales)
    with pytest.raises(ValueError, match="gelu must be"):
        kernels.linear_nf4(x[:, :128].contiguous(), codes, scales, gelu=True)
    with pytest.raises(ValueError, match="rows are quantized to"):
        kernels.quantize_rows(x, torch.float16)


def test_rows_longer_than_a_kernel_takes_go_through_the_plain_form(random):
    x = random(3, 5120).half()  # the MLP of ViT-H
    codes, scales = kernels.quantize_rows(x)
    assert (codes.float() * scales[:, None] - x.float()).abs().max() <= scales.max() / 2 * 1.01
    total, normed = kernels.add_layer_norm(x, x, torch.ones(5120).half(), torch.zeros(5120).half(), 1e-6)
    assert total.shape == normed.shape == (3, 5120) and normed.float().std().sub(1).abs() < 0.01


# -------------------------------------------------------------------------------------------------------- execution


@pytest.mark.skipif(not CUDA, reason="CUDA graphs need a CUDA device")
@pytest.mark.parametrize("decode", ["table", "asm"])
def test_products_replay_from_a_cuda_graph(random, decode):
    weight, x = random(1024, 1024) / 32, random(197, 1024).half().to(DEVICE)
    nf4 = on(*kernels.repack_nf4(*nf4_weight(weight), (1024, 1024)))
    int8 = on(*int8_weight(weight))

    @torch.inference_mode()
    def work():
        config = kernels.Config(64, 64, 128, 2, 4, 3, decode)
        return kernels.linear_nf4(x, *nf4, config=config), kernels.linear_int8(x, *int8, config=config)

    expected = [t.clone() for t in work()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert relative(expected[1], x.cpu().double() @ weight.double().T) < 0.02


@pytest.mark.skipif(not CUDA, reason="every candidate is compiled for the device at hand")
@pytest.mark.parametrize("kind", kernels.CANDIDATES)
def test_every_candidate_is_right(random, kind):
    m, n, k = 197, 1024, 1024
    x, weight = random(m, k).half().to(DEVICE), random(n, k) / 32
    nf4, int8 = on(*kernels.repack_nf4(*nf4_weight(weight), (n, k))), on(*int8_weight(weight))
    calls = {
        "nf4": lambda config: kernels.linear_nf4(x, *nf4, config=config),
        "int8": lambda config: kernels.linear_int8(x, *int8, config=config),
        "w8a8": lambda config: kernels.linear_w8a8(*kernels.quantize_rows(x), *int8, config=config),
    }
    for config in kernels.configs(kind, m, n, k):
        assert relative(calls[kind](config), x.double().cpu() @ weight.double().T) < {"nf4": 0.12}.get(kind, 0.02)


# -------------------------------------------------------------------------------------------------------- attention


def exact_attention(query, key, value, scaling):
    scores = torch.einsum("nihw,njhw->nhij", query.double(), key.double()) * scaling
    return torch.einsum("nhij,njhw->nihw", scores.softmax(dim=-1), value.double())


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(
    ("count", "rows", "tokens", "heads", "width"),
    [(2, 37, 37, 2, 64), (1, 1, 50, 3, 32), (3, 9, 9, 2, 24), (2, 70, 70, 1, 16)],
)
def test_attention_on_views_of_one_product(random, form, dtype, count, rows, tokens, heads, width):
    """Rows beyond a tile, tokens beyond a step, a single query, a width that is no power of two; scores far from 0."""
    made = random(count, tokens, 3, heads, width).mul(2).to(dtype).to(DEVICE)
    query, key, value = made.unbind(2)
    query, scaling = query[:, :rows], 0.7 * width**-0.5
    expected = exact_attention(query.cpu(), key.cpu(), value.cpu(), scaling)
    for config in (None, kernels.AttentionConfig(16, 16), kernels.AttentionConfig(32, 128)):
        found = kernels.attention(query, key, value, scaling, config)
        assert found.shape == query.shape and found.is_contiguous() and found.dtype == dtype
        assert relative(found, expected) < 2 * EPS[dtype]


def test_attention_refuses_what_does_not_fit(random):
    query = random(1, 4, 2, 16).half()
    for key, value in ((query[..., :8], query[..., :8]), (query, query[:, :3]), (query[:, :0], query[:, :0])):
        with pytest.raises(ValueError, match="attention takes"):
            kernels.attention(query, key, value, 1.0)
    with pytest.raises(ValueError, match="contiguous in width"):
        kernels.attention(*[random(1, 4, 16, 2).half().transpose(2, 3)] * 3, 1.0)


def test_attention_is_cut_finer_where_there_is_little_of_it():
    cpu = torch.device("cpu")
    few, many = kernels.attention_configs(1, 197, 16, cpu)[0], kernels.attention_configs(32, 197, 16, cpu)[0]
    assert few.bm < many.bm


@pytest.mark.skipif(not CUDA, reason="every candidate is compiled for the device at hand")
def test_every_candidate_of_attention_is_right(random):
    query, key, value = random(2, 197, 3, 16, 64).half().to(DEVICE).unbind(2)
    expected = exact_attention(query.cpu(), key.cpu(), value.cpu(), 0.125)
    for config in {*kernels.FEW_TILES, *kernels.MANY_TILES}:
        assert relative(kernels.attention(query, key, value, 0.125, config), expected) < 2 * EPS[torch.float16]


@pytest.mark.skipif(CUDA or KERNELS_RUN, reason="the kernels run in this process")
def test_the_kernels_pass_all_of_this_in_tritons_interpreter():
    if kernels.triton is None:
        pytest.skip("the package triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "-k", "triton", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 43, done.stdout


@pytest.mark.skipif(CUDA or KERNELS_RUN, reason="the kernels run in this process")
def test_a_machine_without_triton_or_gpu_says_so_in_one_line():
    assert kernels.missing_triton(torch.device("cpu")) in (
        "Triton kernels need a CUDA device",
        "the package triton is not installed",
    )
