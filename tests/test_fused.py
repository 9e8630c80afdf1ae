"""The fused network against the plain one it is made from: the same function, in every weight format."""

import contextlib
import functools
import gc
import warnings
import weakref

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from vitlib import attention, engine, fused, kernels, linears, models, profile, quantize
from vitlib.ahead import WAYS, Ahead, BlockWeights
from vitlib.engine import Engine
from vitlib.variants import Variant

CPU = torch.device("cpu")
FORMATS = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "nf4": "nf4", "w8a16": "rows", "w8a8": "int8", "fp8": "fp16"}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def plain(checkpoints, weights: str) -> models.Loaded:
    return models.load(checkpoints, Variant(weights, "direct"), CPU)


def loaded_as(checkpoints, weights: str) -> models.Loaded:
    return models.load(checkpoints, Variant(weights, "direct", "fused"), CPU)


@pytest.fixture(scope="module")
def five() -> torch.Tensor:
    return torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def expected(checkpoints, five):
    """Logits of the plain networks; `rows` is the fp16 network with the weights that the int8 rows stand for."""
    networks = {w: plain(checkpoints, w) for w in {*FORMATS.values()} - {"rows"}}
    networks["rows"] = plain(checkpoints, "int8")
    quantize.dequantize_int8(networks["rows"].model)
    return {weights: engine.logits(Engine(loaded), five, 3) for weights, loaded in networks.items()}


@pytest.fixture
def kernel_paths(monkeypatch):
    """As on a GPU, but with the plain form that every kernel has."""
    monkeypatch.setattr(linears, "use_kernels", lambda device, fp8=False: True)


def take_kernels(network: fused.FusedViT) -> None:
    """This project's kernels wherever there is one, for the rows of three pictures."""
    for part in network.modules():
        if isinstance(part, linears.Tuned) and "fused" in part.paths(51):
            for rows in (3, 51):
                part.choose(rows, "fused", part.configurations(rows, "fused")[0])


TOLERANCES = {
    "fp32": 1e-5,
    "fp16": 1e-2,
    "bf16": 1e-2,
    "nf4": 1e-2,
    "w8a16": 5e-3,
    "w8a8": 4e-2,  # LLM.int8 keeps outliers in 16 bit; what it must be exactly is tested layer by layer
    "fp8": 0.2,  # three bits of mantissa, compared with fp16
}


@pytest.mark.parametrize("weights", FORMATS)
def test_fused_logits_are_those_of_the_plain_network(checkpoints, five, expected, weights):
    fast = Engine(loaded_as(checkpoints, weights), "fused", (1, 3))
    found = engine.logits(fast, five, 3)  # the last batch is odd
    assert relative(found, expected[FORMATS[weights]]) < TOLERANCES[weights]
    for index in range(5):
        torch.testing.assert_close(engine.logits(fast, five[index, None], 3)[0], found[index], rtol=0.03, atol=0.03)


@pytest.mark.parametrize("weights", ["nf4", "w8a16", "w8a8"])
def test_the_kernels_compute_the_same_logits(checkpoints, five, expected, weights, kernel_paths):
    fast = Engine(loaded_as(checkpoints, weights), "fused", (3,))
    linear = fast.network.blocks[0].mlp.first
    assert "fused" in linear.paths(51)
    take_kernels(fast.network)
    found = engine.logits(fast, five[:3], 3)
    assert relative(found, expected[FORMATS[weights]][:3]) < TOLERANCES[weights]


@pytest.mark.parametrize("weights", ["fp32", "nf4", "w8a16", "w8a8", "fp8"])
@pytest.mark.parametrize("gelu", [None, "erf", "tanh"])
def test_every_path_of_a_layer_gives_the_same_numbers(weights, gelu, request):
    torch.manual_seed(0)
    source = nn.Linear(128, 64).to(torch.float32 if weights == "fp32" else torch.float16)
    dense = weights in ("fp32", "fp8")
    stored = source if dense else quantize.quantize_linear(source, 4 if weights == "nf4" else 8)
    request.getfixturevalue("kernel_paths")
    layer = linears.of([stored], {"fp32": "dense"}.get(weights, weights))
    x = torch.randn(20, 128).to(source.weight.dtype)
    exact = linears.gelu_of(nn.functional.linear(x.double(), source.weight.double(), source.bias.double()), gelu)
    tolerance = {"fp32": 1e-6, "nf4": 0.12, "fp8": 0.06}.get(weights, 0.02)
    with torch.no_grad():
        reference = layer.run(layer.paths(20)[0], "", x, gelu)
        assert relative(reference, exact) < tolerance
        for path in layer.paths(20):
            assert relative(layer.run(path, layer.configurations(20, path)[0], x, gelu), reference) < 5e-3


def three_layers(bits: int, sides: int = 256) -> list[nn.Module]:
    torch.manual_seed(0)
    return [quantize.quantize_linear(nn.Linear(sides, sides).half(), bits) for _ in range(3)]


@pytest.mark.parametrize("scales", ["expanded", "nested"])
def test_joining_nf4_layers_and_expanding_their_scales_changes_no_weight(scales):
    """1,024 blocks a layer: the scales of scales divide, each layer has an offset of its own."""
    layers = three_layers(4)
    each = [bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state) for layer in layers]
    joined = linears.of(layers, scales=scales)
    assert joined.nested == (scales == "nested")
    assert torch.equal(joined.dequantized(torch.float16), torch.cat(each))
    assert torch.equal(joined.bias, torch.cat([layer.bias for layer in layers]))


def test_repacked_codes_hold_the_same_weights(kernel_paths):
    layers = three_layers(4)
    each = [bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state) for layer in layers]
    joined = linears.of(layers)
    assert joined.repacked
    assert torch.equal(joined.dequantized(torch.float16), torch.cat(each))


def test_nested_scales_that_do_not_divide_are_refused_in_words():
    with pytest.raises(ValueError, match="expanded"):
        linears.of(three_layers(4, 192), scales="nested")


def test_joining_int8_layers_changes_no_weight():
    layers = three_layers(8)
    joined = linears.of(layers, "w8a16")
    each = [layer.weight.CB.double() * layer.weight.SCB.double()[:, None] / 127 for layer in layers]
    torch.testing.assert_close(joined.dequantized(torch.float16).double(), torch.cat(each), rtol=5e-4, atol=1e-7)
    assert torch.equal(joined.rows, torch.cat([layer.weight.CB for layer in layers]))


def test_a_layer_is_not_computed_in_a_format_that_its_checkpoint_does_not_hold():
    with pytest.raises(ValueError, match="load the checkpoint"):
        linears.of([nn.Linear(64, 64)], "w8a8")
    with pytest.raises(ValueError, match="no path 'fused'"):
        linears.of([nn.Linear(64, 64)]).choose(4, "fused")


def test_the_last_block_computes_the_class_token_only(checkpoints):
    network = Engine(loaded_as(checkpoints, "fp32"), "fused", (5,)).network
    seen = {}
    for number in (2, 3):
        for name in ("mlp", "attention.output"):
            module = network.blocks[number].get_submodule(name)
            module.register_forward_pre_hook(lambda _, x, key=(number, name): seen.update({key: x[0].shape[0]}))
    with torch.inference_mode():
        network(torch.randn(5, 3, 32, 32))
    assert seen == {(2, "mlp"): 85, (2, "attention.output"): 85, (3, "mlp"): 5, (3, "attention.output"): 5}


@pytest.mark.parametrize("weights", FORMATS)
def test_memory_is_that_of_the_checkpoint_and_of_expanded_scales(checkpoints, weights):
    loaded = loaded_as(checkpoints, weights)
    fast = Engine(loaded, "fused", (1,))
    if weights == "fp8":  # four blocks of 12·H² weights at one byte instead of two, and a scale for each of 9·H rows
        saved = (4 * 12 * 128**2 - 4 * 9 * 128 * 4) / 2**20
        assert fast.loaded.weights_mb == pytest.approx(loaded.weights_mb - saved, rel=1e-4)
    elif weights == "nf4":  # bitsandbytes' own tables of 16 and 256 values are not kept
        assert fast.network.scales_extra_mb > 0
        assert fast.loaded.weights_mb <= loaded.weights_mb + fast.network.scales_extra_mb
    else:
        assert fast.loaded.weights_mb == pytest.approx(loaded.weights_mb, rel=1e-6)


def test_the_engine_holds_the_fused_network_and_not_the_plain_one(checkpoints):
    loaded = loaded_as(checkpoints, "fp32")
    fast = Engine(loaded, "fused", (1,))
    assert isinstance(fast.network, fused.FusedViT)
    held = {id(t) for t in (*fast.network.parameters(), *fast.network.buffers())}
    assert id(loaded.model.vit.layers[0].attention.q_proj.weight) not in held
    shared = loaded.model.vit.layers[0].mlp.fc1.weight.data_ptr()
    assert fast.network.blocks[0].mlp.first.weight.data_ptr() == shared  # not laid anew, so not copied


def test_tanh_gelu_is_only_what_was_asked_for(checkpoints):
    loaded = plain(checkpoints, "fp32")
    assert fused.fuse(loaded).gelu == "erf"
    assert fused.fuse(loaded, gelu="tanh").gelu == "tanh"
    found = fused.gelu_difference(loaded, torch.randn(4, 3, 32, 32))
    assert 0 < found.relative < 1e-3 and found.max_abs > 0
    with pytest.raises(ValueError, match="gelu is 'fast'"):
        fused.fuse(loaded, gelu="fast")


def test_another_activation_stays_what_it_is(checkpoints):
    loaded = plain(checkpoints, "fp32")
    loaded.model.config.hidden_act = "relu"
    for layer in loaded.model.vit.layers:
        layer.mlp.activation_fn = nn.ReLU()
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(
            fused.fuse(loaded)(pixel_values), loaded.model(pixel_values).logits, rtol=1e-4, atol=1e-4
        )
    with pytest.raises(ValueError, match="only a GELU"):
        fused.fuse(loaded, gelu="tanh")


def test_pictures_of_another_size_are_refused(checkpoints):
    with pytest.raises(ValueError, match="takes 32×32"):
        fused.fuse(plain(checkpoints, "fp32"))(torch.zeros(1, 3, 48, 48))


def test_tuning_covers_every_shape_and_number_of_rows(checkpoints):
    fast = Engine(loaded_as(checkpoints, "nf4"), "fused", (1, 3))
    table = fast.tuning
    assert list(table.columns) == list(linears.TUNING_COLUMNS)
    assert table.groupby(["layer", "shape", "rows"])["chosen"].sum().eq(1).all()
    assert set(table.loc[(table["layer"] == "NF4") & (table["shape"] == "128 → 384"), "rows"]) == {17, 51}
    assert set(table.loc[table["layer"] == "Dense", "rows"]) == {1, 3, 16, 48}  # head and patches


@pytest.mark.parametrize("weights", ["fp16", "nf4", "w8a8"])
def test_the_profiler_knows_the_parts_of_a_fused_network(checkpoints, weights):
    fast = Engine(loaded_as(checkpoints, weights), "fused", (2,))
    pixel_values = torch.randn(2, 3, 32, 32, dtype=fast.loaded.dtype)
    frame = profile.profile(lambda: fast(pixel_values), fast.network, CPU, passes=2)
    expected_parts = {"patch embedding", "attention", "mlp", "norm", "head"}
    assert expected_parts | ({"quantization"} if weights != "fp16" else set()) <= set(frame["part"])
    assert frame.attrs["unattributed_share"] < 0.05
    assert "scaled_dot_product" in profile.attention_kernel(frame)


def test_an_attention_that_is_named_is_never_replaced(checkpoints, kernel_paths):
    attends = {
        (weights, name): fused.fuse(models.load(checkpoints, Variant(weights, name), CPU)).blocks[0].attention.attend
        for weights, name in (("fp16", "direct"), ("fp32", "direct"), ("fp16", "direct_math"))
    }
    assert [attend.paths(17) for attend in attends.values()] == [("library", "fused"), ("library",), ("library",)]
    open_ = attends["fp16", "direct"]
    states = open_.example(3 * 17)
    assert [tuple(state.shape) for state in states] == [(3, 17, 2, 64)] * 3
    assert relative(open_.run("fused", "", *states), open_.run("library", "", *states)) < 2e-3


def test_a_graph_that_dequantizes_blocks_takes_no_way_of_a_quantized_layer_but_all_others(checkpoints):
    fast = Engine(loaded_as(checkpoints, "nf4"), "fused", (1, 3))
    fast._unchoose(3)
    left = fast.tuning[fast.tuning["batch"] == 3].groupby("layer")["chosen"].all()
    assert left.to_dict() == {"Dense": True, "NF4": False, "ScaledDotProduct": True}
    assert fast.tuning.loc[fast.tuning["batch"] == 1, "chosen"].all()


@pytest.mark.parametrize("name", ["direct", "direct_math"])
def test_attention_without_a_mask_is_that_of_transformers(checkpoints, five, expected, name):
    found = engine.logits(Engine(models.load(checkpoints, Variant("fp32", name), CPU)), five, 5)
    assert relative(found, expected["fp32"]) < 1e-5
    fast = Engine(models.load(checkpoints, Variant("fp32", name, "fused"), CPU), "fused", (5,))
    assert fast.network.attention_name == name
    assert relative(engine.logits(fast, five, 5), expected["fp32"]) < 1e-5


def test_no_mask_is_made_and_none_is_taken(checkpoints, monkeypatch):
    seen = []
    original = attention.attend
    monkeypatch.setattr(attention, "_refuse_mask", lambda name, mask: seen.append(mask))
    monkeypatch.setattr(
        attention, "attend", lambda name, *states, **kw: seen.append(name) or original(name, *states, **kw)
    )
    plain(checkpoints, "fp32").model(torch.randn(1, 3, 32, 32))
    assert seen == [None, *[None, "direct"] * 4]  # the mask function once, then each of four layers
    monkeypatch.undo()
    with pytest.raises(ValueError, match="takes no mask"):
        attention.AttentionMaskInterface()["direct"](attention_mask=torch.ones(1, 17))


@pytest.mark.parametrize("execution", ["compile", "fused-compile"])
def test_a_batch_size_is_compiled_once(checkpoints, five, expected, execution):
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    fast = Engine(models.load(checkpoints, Variant("fp32", "direct", execution), CPU), execution, (3,), backend="eager")
    assert relative(engine.logits(fast, five, 3), expected["fp32"]) < 1e-5
    graphs = counters["stats"]["unique_graphs"]
    engine.logits(fast, five, 3)
    engine.logits(fast, five[:1], 1)
    assert counters["stats"]["unique_graphs"] == graphs == 1
    assert not counters["graph_break"]
    assert list(fast.compile_s) == [3]


def test_many_engines_of_a_process_are_all_compiled(checkpoints, five):
    """The compiler counts per function, and beyond 8 it would run eagerly under the name of compiled code."""
    torch._dynamo.reset()
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    for weights in ("fp32", "fp16", "bf16"):
        fast = Engine(loaded_as(checkpoints, weights), "fused-compile", (1, 2, 3, 4), backend=backend)
        for size in fast.sizes:
            before = len(compiled)
            fast(torch.randn(size, 3, 32, 32, dtype=fast.loaded.dtype))
            assert len(compiled) == before + 1


def test_an_unknown_execution_is_refused(checkpoints):
    with pytest.raises(ValueError, match=r"no execution 'grpah'.*graph"):
        Engine(plain(checkpoints, "fp32"), "grpah")


def test_the_compiler_does_not_trace_the_question_whether_kernels_run(monkeypatch):
    monkeypatch.setattr(kernels, "missing_products", functools.cache(lambda device: ""))
    asked = torch.compile(lambda x: x + linears.use_kernels(torch.device("cuda")), backend="eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert asked(torch.zeros(1)).item() == 1


@pytest.mark.parametrize("weights", ["nf4", "w8a8"])
def test_the_kernels_are_whole_operators_for_the_compiler(checkpoints, five, expected, weights, kernel_paths):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fast = Engine(loaded_as(checkpoints, weights), "fused-compile", (3,), backend="aot_eager")
    take_kernels(fast.network)
    found = engine.logits(fast, five[:3], 3)
    assert relative(found, expected[FORMATS[weights]][:3]) < TOLERANCES[weights]
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("w8a8", "direct"), "need a fused execution"),
        (("int8", "direct", "fused"), "w8a16 or w8a8"),
        (("fp16", "sdpa", "fused"), "takes the attentions direct"),
    ],
)
def test_rows_that_make_no_sense_are_refused(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        Variant(*arguments)


@pytest.mark.parametrize("weights", ["w8a8", "fp8"])
def test_a_norm_hands_quantized_rows_to_the_one_layer_that_reads_them(
    checkpoints, five, expected, weights, kernel_paths
):
    fast = Engine(loaded_as(checkpoints, weights), "fused", (3,))
    norms = [norm for block in fast.network.blocks for norm in (block.middle_norm, block.following_norm)]
    # The last norm feeds the classifier, and the one before the last attention two layers: both stay in 16 bit.
    assert [norm.codes is None for norm in norms[-3:]] == [True, False, True]
    assert all(norm.codes is not None for norm in norms[:-3])
    quantized, seen = linears.Quantized, []
    for block in fast.network.blocks:
        block.mlp.first.register_forward_pre_hook(lambda _, inputs: seen.append(isinstance(inputs[0], quantized)))
    assert relative(engine.logits(fast, five[:3], 3), expected[FORMATS[weights]][:3]) < TOLERANCES[weights]
    assert seen and all(seen)


class FakeStream:
    """A stream that runs at once what is queued on it, and knows only of work that it has waited for."""

    def __init__(self, *_, **__):
        self.known: set[tuple[str, int]] = set()

    def wait_stream(self, other):
        self.known |= other.known

    def wait_event(self, event):
        self.known |= event

    def record_event(self):
        return frozenset(self.known)


@pytest.mark.parametrize("depth", WAYS.values())
@pytest.mark.parametrize("weights", ["nf4", "w8a16"])
def test_weights_of_a_block_are_dequantized_in_time_and_not_overwritten_in_use(
    checkpoints, five, weights, depth, kernel_paths, monkeypatch
):
    fast = Engine(loaded_as(checkpoints, weights), "fused", (3,))
    network, main = fast.network, FakeStream()
    network.lay_side_by_side()
    in_turn, queue = engine.logits(fast, five[:3], 3), [main]

    @contextlib.contextmanager
    def on_stream(stream):
        queue.append(stream)
        yield
        queue.pop()

    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: queue[-1])
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    network.ahead = Ahead(network.block_weights, torch.float16, CPU, depth)
    blocks, written = network.block_weights, []
    original = BlockWeights.dequantize_into

    def write(block, buffer):
        number = blocks.index(block)
        used = (
            [("read", number - depth, id(layer)) for layer in blocks[number - depth].layers] if number >= depth else []
        )
        assert queue[-1].known.issuperset(used), (
            f"the buffer of block {number - depth} is filled while it may be in use"
        )
        original(block, buffer)
        queue[-1].known.add(("written", number))
        written.append(number)

    monkeypatch.setattr(BlockWeights, "dequantize_into", write)

    def reading(number):
        def read(layer, _):
            assert ("written", number) in main.known, "a weight is used that may not be written yet"
            main.known.add(("read", number, id(layer)))

        return read

    for number, block in enumerate(blocks):
        for layer in block.layers:
            layer.register_forward_pre_hook(reading(number))
    assert torch.equal(engine.logits(fast, five[:3], 3), in_turn)
    assert written == list(range(len(blocks))) and len(blocks) > depth
    assert ("written", written[-1]) in main.known  # joined: what comes next may free the buffers
    assert all(layer.ahead is None for block in blocks for layer in block.layers)


def test_ways_to_dequantize_blocks_share_their_buffers_and_they_count_once(checkpoints, kernel_paths, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    fast = Engine(loaded_as(checkpoints, "nf4"), "fused", (3,))
    fast.network.lay_side_by_side()
    weights = fast.network.block_weights
    one = Ahead(weights, torch.float16, CPU, 1)
    two = Ahead(weights, torch.float16, CPU, 2, one)
    assert two.buffers[0] is one.buffers[0] and len(two.buffers) == 2
    assert Ahead(weights, torch.float16, CPU, 1, two).buffers == two.buffers[:1]
    fast._aheads = {1: two, 32: one}
    assert fast.buffers_mb == pytest.approx(two.megabytes) and two.megabytes == 2 * one.megabytes


@pytest.mark.parametrize(("weights", "codes"), [("nf4", "packed"), ("w8a16", "rows")])
def test_layers_keep_views_of_weights_that_lie_side_by_side(checkpoints, weights, codes, kernel_paths):
    apart = fused.fused_loaded(loaded_as(checkpoints, weights))
    network = fused.fused_loaded(loaded_as(checkpoints, weights), side_by_side=True)
    for block in network.model.block_weights:
        start, end = block.codes.data_ptr(), block.codes.data_ptr() + block.codes.nbytes
        assert all(start <= getattr(layer, codes).data_ptr() < end for layer in block.layers)
    models.verify(network.model, Variant(weights, "direct", "fused-graph"))
    # The scales of int8 rows are there once more, and counted.
    repeated = sum(block.scales.nbytes for block in network.model.block_weights) / 2**20 if weights == "w8a16" else 0.0
    assert network.weights_mb == pytest.approx(apart.weights_mb + repeated, abs=1e-6)


def test_layers_that_get_other_inputs_are_tuned_apart(checkpoints, kernel_paths, monkeypatch):
    network = fused.fused_loaded(loaded_as(checkpoints, "w8a8")).model
    first, second = network.blocks[0].attention.qkv, network.blocks[1].attention.qkv
    assert (first.norm_quantizes, second.norm_quantizes) == (False, True)  # nothing is added before the first norm
    measured, groups = linears._measured, []
    monkeypatch.setattr(linears, "_measured", lambda layers, *way: (groups.append(layers), measured(layers, *way))[1])
    linears.tune(network, [3])
    linear = [layers for layers in groups if isinstance(layers[0], linears.Linear)]
    assert linear and all(len({layer.norm_quantizes for layer in layers}) == 1 for layers in linear)


def test_tuning_again_replaces_what_was_found(checkpoints):
    network = fused.fused_loaded(loaded_as(checkpoints, "nf4")).model
    once = linears.tune(network, [1, 3])
    assert len(linears.tune(network, [3])) == len(once)
    assert once["chosen"].all() and set(once["batch"]) == {1, 3}


def test_dense_weights_have_nothing_to_dequantize_ahead(checkpoints):
    assert not fused.fused_loaded(loaded_as(checkpoints, "fp16"), side_by_side=True).model.block_weights


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
@pytest.mark.parametrize("weights", ["fp16", "nf4", "w8a16", "w8a8"])
def test_graphs_give_the_logits_of_the_plain_network(checkpoints, five, expected, weights):
    loaded = models.load(checkpoints, Variant(weights, "direct", "fused-graph"), torch.device("cuda"))
    fast = Engine(loaded, "fused-graph", (1, 3))
    for size in (1, 3):  # a graph each
        assert relative(engine.logits(fast, five, size), expected[FORMATS[weights]]) < TOLERANCES[weights]
    assert fast.pool_mb.keys() == {1, 3} and min(fast.pool_mb.values()) > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a second stream needs a CUDA device")
@pytest.mark.parametrize("weights", ["nf4", "w8a16"])
def test_a_second_stream_changes_no_logit(checkpoints, weights):
    loaded = models.load(checkpoints, Variant(weights, "direct", "fused"), torch.device("cuda"))
    network = fused.fused_loaded(loaded, side_by_side=True).model
    pixels = torch.randn(64, 3, 32, 32, device="cuda", dtype=torch.float16)
    with torch.inference_mode():
        in_turn = network(pixels)
        for depth in WAYS.values():
            network.ahead = Ahead(network.block_weights, torch.float16, torch.device("cuda"), depth)
            for _ in range(20):
                torch.testing.assert_close(network(pixels), in_turn, rtol=1e-3, atol=1e-3)


def test_a_dropped_engine_is_gone_without_the_collector(checkpoints):
    gc.collect()
    gc.disable()
    try:
        for execution in ("eager", "fused"):
            loaded = plain(checkpoints, "fp16") if execution == "eager" else loaded_as(checkpoints, "fp16")
            fast = Engine(loaded, execution, (1,))
            network = weakref.ref(fast.network)
            del fast, loaded
            assert network() is None, f"an {execution} engine holds its network in a cycle"
    finally:
        gc.enable()


def test_a_batch_of_nothing_has_no_logits(checkpoints):
    for execution in ("eager", "fused"):
        loaded = plain(checkpoints, "fp16") if execution == "eager" else loaded_as(checkpoints, "fp16")
        assert Engine(loaded, execution, (1,))(torch.empty(0, 3, 32, 32, dtype=torch.float16)).shape == (0, 3)
