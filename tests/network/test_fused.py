"""The fused network against the plain one it is made from: the same function, in every weight format."""

import contextlib
import gc
import weakref
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from vitlib.measure import profile
from vitlib.network import attention, checkpoint, engine, fused, layers, quantize, tuning, verify
from vitlib.network.blocks import MODES, BlockBuffers, BlockWeights
from vitlib.network.engine import Engine, Graph
from vitlib.network.tuning import relative_error as relative
from vitlib.study.variants import FORMATS, Variant

CPU = torch.device("cpu")
FUSED = [row.name for row in FORMATS.values() if row.fused]
OF_ONE_FORMAT = [name for name in FUSED if not FORMATS[name].planned]
ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs, streams and kernels need a CUDA device")


def plain(checkpoints, weights: str) -> checkpoint.Loaded:
    return checkpoint.load(checkpoints, Variant(weights, "direct"), CPU)


def fused_engine(checkpoints, weights: str, *sizes: int, gelu: str = "checkpoint") -> Engine:
    variant = Variant(weights, "direct", "fused", gelu)
    return engine.load(checkpoints, variant.name, "cpu", sizes or (1,))


@pytest.fixture(scope="module")
def five() -> torch.Tensor:
    return torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def dequantize_int8(model: nn.Module) -> None:
    """Replace every int8 linear of `model` by a plain FP16 one: weight-only int8 without its kernels."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, bnb.nn.Linear8bitLt):
            plain = nn.Linear(layer.in_features, layer.out_features, device="meta")
            plain.weight, plain.bias = nn.Parameter(quantize.dequantized(layer).half(), requires_grad=False), layer.bias
            model.set_submodule(name, plain)


@pytest.fixture(scope="module")
def expected(checkpoints, five):
    """Logits of the plain networks by weight format; w8a16 is the FP16 network with dequantized int8 weights."""
    networks = {name: plain(checkpoints, FORMATS[name].reference) for name in FUSED}
    dequantize_int8(networks["w8a16"].model)
    return {weights: engine.logits(Engine(loaded), five, 3) for weights, loaded in networks.items()}


@pytest.fixture
def kernel_paths(monkeypatch):
    """As on a GPU, but with the plain form that every kernel has."""
    monkeypatch.setattr(layers, "use_kernels", lambda device, fp8=False: True)


def take_kernels(network: fused.FusedViT) -> None:
    """This project's kernels wherever there is one, for the rows of three pictures."""
    for part in network.modules():
        if isinstance(part, tuning.Tuned) and "fused" in part.implementations(51):
            for rows in (3, 51):
                part.choose(rows, "fused", part.configurations(rows, "fused")[0])


# w8a8: LLM.int8() keeps outliers in FP16, the exact test is that of the layers. fp8: three bits of mantissa.
TOLERANCES = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 1e-2, "nf4": 1e-2, "w8a16": 5e-3, "w8a8": 4e-2, "fp8": 0.2}
TOLERANCES |= {"nf4c": 1e-2, "mixed": 1e-2}


@pytest.mark.parametrize("weights", FUSED)
def test_fused_logits_are_those_of_the_plain_network(checkpoints, five, expected, weights):
    fast = fused_engine(checkpoints, weights, 1, 3)
    found = engine.logits(fast, five, 3)  # the last batch is odd
    assert relative(found, expected[weights]) < TOLERANCES[weights]
    for index in range(5):
        torch.testing.assert_close(engine.logits(fast, five[index, None], 3)[0], found[index], rtol=0.03, atol=0.03)
    assert fast(torch.empty(0, 3, 32, 32, dtype=fast.loaded.dtype)).shape == (0, 3)


@pytest.mark.parametrize("weights", ["fp16", "nf4", "w8a16", "w8a8", "fp8"])
def test_the_kernels_compute_the_same_logits(checkpoints, five, expected, weights, kernel_paths):
    fast, seen = fused_engine(checkpoints, weights, 3), []
    assert "fused" in fast.network.blocks[0].attention.attend.implementations(51)
    take_kernels(fast.network)
    for block in fast.network.blocks:
        block.mlp.first.register_forward_pre_hook(lambda _, x: seen.append(isinstance(x[0], layers.Quantized)))
    assert relative(engine.logits(fast, five[:3], 3), expected[weights][:3]) < TOLERANCES[weights]
    # A norm quantizes the rows for the one 8-bit layer that reads them. The last norm feeds the classifier, and the one
    # before the last attention two layers: both stay in 16 bit.
    eight_bit, norms = (
        weights in ("w8a8", "fp8"),
        [module for module in fast.network.modules() if hasattr(module, "codes")],
    )
    assert seen == [eight_bit] * 4
    assert [norm.codes is not None for norm in norms] == [eight_bit] * 5 + [False, eight_bit, False]
    first, second = (fast.network.blocks[number].attention.qkv for number in (0, 1))
    assert (first.alike() != second.alike()) == eight_bit  # nothing is added before the first norm: tuned apart


def test_the_last_block_computes_the_class_token_only(checkpoints):
    network, seen = fused_engine(checkpoints, "fp32").network, {}
    for number in (2, 3):
        for name in ("mlp", "attention.output"):
            module = network.blocks[number].get_submodule(name)
            module.register_forward_pre_hook(lambda _, x, key=(number, name): seen.update({key: x[0].shape[0]}))
    with torch.inference_mode():
        network(torch.randn(5, 3, 32, 32))
    assert seen == {(2, "mlp"): 85, (2, "attention.output"): 85, (3, "mlp"): 5, (3, "attention.output"): 5}


@pytest.mark.parametrize("weights", OF_ONE_FORMAT)
def test_memory_is_that_of_the_checkpoint_and_of_expanded_scales(checkpoints, weights):
    loaded = checkpoint.load(checkpoints, Variant(weights, "direct", "fused"), CPU)
    weight_count = 4 * 12 * 128**2  # four blocks of 12·H² weights
    extra = {
        "fp8": 4 * 9 * 128 * 4 - weight_count,  # one byte instead of two, and a scale for each of 9·H rows a block
        # a scale of 4 bytes a block instead of 1; no second level, no tables: of each of 6 layers a block
        "nf4": weight_count // 64 * 3 - 4 * (weight_count // 64 // 256) - 4 * 6 * 4 * (1 + 16 + 256),
    }
    extra["nf4c"] = extra["nf4"]
    fast = Engine(loaded, "fused", (1,))
    assert fast.loaded.weights_mb == pytest.approx(loaded.weights_mb + extra.get(weights, 0) / 2**20, rel=1e-6)


def test_tanh_gelu_is_only_what_was_asked_for(checkpoints, five, expected):
    exact, tanh = (fused_engine(checkpoints, "fp32", 5, gelu=gelu) for gelu in ("checkpoint", "tanh"))
    assert (exact.network.gelu, tanh.network.gelu) == ("erf", "tanh")
    assert 1e-6 < relative(engine.logits(tanh, five, 5), expected["fp32"]) < 1e-3


def test_another_activation_stays_what_it_is(checkpoints):
    model, pixels = plain(checkpoints, "fp32").model, torch.randn(2, 3, 32, 32)
    model.config.hidden_act = "relu"
    for layer in model.vit.layers:
        layer.mlp.activation_fn = nn.ReLU()
    with torch.inference_mode():
        found = fused.fuse(model, Variant("fp32", "direct", "fused"))(pixels)
        torch.testing.assert_close(found, model(pixels).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="only a GELU"):
        fused.fuse(model, Variant("fp32", "direct", "fused", "tanh"))


def test_what_cannot_be_fused_is_refused(checkpoints):
    with pytest.raises(ValueError, match="takes 32×32"):
        fused_engine(checkpoints, "fp32")(torch.zeros(1, 3, 48, 48))
    sdpa = checkpoint.load(checkpoints, Variant("fp32"), CPU)
    for variant in (sdpa.variant, Variant("fp32", "direct", "fused")):
        with pytest.raises(ValueError, match="with the attention 'sdpa' cannot be fused"):
            fused.fuse(sdpa.model, variant)
    with pytest.raises(ValueError, match="a Linear cannot be fused"):
        fused.fuse(nn.Linear(2, 2), variant)
    with pytest.raises(ValueError, match=r"no execution 'grpah'.*graph"):
        Engine(sdpa, "grpah")
    with pytest.raises(ValueError, match="did you mean 'nf4-sdpa'"):
        engine.load(checkpoints, "nf4-spda")


def test_attention_without_a_mask_is_that_of_transformers(checkpoints, five, expected, monkeypatch):
    sdpa = engine.logits(engine.load(checkpoints, "fp32-sdpa", "cpu"), five, 5)
    assert relative(expected["fp32"], sdpa) < 1e-5
    seen, original, direct = [], attention.attend, attention.AttentionMaskInterface()["direct"]
    monkeypatch.setattr(attention, "attend", lambda *states, **kw: seen.append("attend") or original(*states, **kw))
    noted = lambda *states, **kw: seen.append("mask") or direct(*states, **kw)  # noqa: E731
    monkeypatch.setitem(attention.AttentionMaskInterface()._global_mapping, "direct", noted)
    plain(checkpoints, "fp32").model(torch.randn(1, 3, 32, 32))
    assert seen == ["mask", *["attend"] * 4]  # the mask function once, then each of four layers
    with pytest.raises(ValueError, match="takes no mask"):
        direct(attention_mask=torch.ones(1, 17))


@pytest.mark.parametrize("weights", OF_ONE_FORMAT)
def test_a_fused_network_proves_what_it_is(checkpoints, weights):
    network = fused_engine(checkpoints, weights).network
    found = verify.verify(network, Variant(weights, "direct", "fused"))
    assert found["encoder_linears"] == {FORMATS[weights].fused: 3 * 4 + 5}  # the last block has its query apart
    for other in FUSED:
        if FORMATS[other].fused != FORMATS[weights].fused or FORMATS[other].dtype != FORMATS[weights].dtype:
            with pytest.raises(verify.EvidenceError, match="asked was"):
                verify.verify(network, Variant(other, "direct", "fused"))


@pytest.mark.parametrize("weights", ["fp16", "nf4", "w8a16", "w8a8"])
def test_the_profiler_knows_the_parts_of_a_fused_network(checkpoints, weights):
    fast = fused_engine(checkpoints, weights, 2)
    pixel_values = torch.randn(2, 3, 32, 32, dtype=fast.loaded.dtype)
    frame = profile.profile(lambda: fast(pixel_values), fast.network, CPU, passes=2)
    expected_parts = {"patch embedding", "attention", "mlp", "norm", "head"}
    assert expected_parts | ({"quantization"} if weights != "fp16" else set()) <= set(frame["part"])
    assert not frame.loc[frame["part"] == "other", "kernel"].str.contains("mm|scaled_dot|norm").any()
    inside = frame.loc[frame["operation"] == profile.ATTENTION_FUNCTION, "kernel"]  # not which of them took longest
    assert inside.str.contains("scaled_dot_product").any()


def test_every_module_that_may_launch_a_kernel_of_our_own_is_part_of_a_range(checkpoints, kernel_paths):
    """Kernels are launched outside operators, so only the open ranges say which part of the model they belong to."""
    for weights in ("nf4", "w8a8"):
        network = fused_engine(checkpoints, weights).network
        for name, module in network.blocks.named_modules():
            if isinstance(module, (fused.ScaledDotProduct, fused.AddNorm, layers.Step)):
                assert module.part in (profile.ATTENTION_FUNCTION, *profile.PARTS), name
            elif isinstance(module, layers.Linear):
                path = [network.blocks.get_submodule(name.rsplit(".", k)[0]) for k in (1, 2) if name.count(".") >= k]
                assert {getattr(parent, "part", None) for parent in path} & {"attention", "mlp"}, name


def test_tuning_covers_every_shape_and_number_of_rows(checkpoints):
    fast = fused_engine(checkpoints, "nf4", 1, 3)
    table = engine.tunings({"a": fast, "b": Engine(plain(checkpoints, "fp16"))}, "variant")
    assert list(table.columns) == [*tuning.COLUMNS, "variant"] and table["variant"].eq("a").all()
    assert table.groupby(["layer", "shape", "rows"])["chosen"].sum().eq(1).all()
    assert set(table.loc[(table["layer"] == "NF4") & (table["shape"] == "128 → 384"), "rows"]) == {17, 51}
    assert set(table.loc[table["layer"] == "Dense", "rows"]) == {1, 3, 16, 48}  # head and patches


def test_a_mode_of_whole_blocks_is_chosen_by_its_time(checkpoints, monkeypatch):
    """Two sizes: at 1 the last mode is fastest, at 3 none is; the third fails at 3 and leaves what was found."""
    fast = fused_engine(checkpoints, "nf4", 1, 3)
    times = {"layer by layer": {1: 100.0, 3: 100.0}, "by block": {1: 90.0, 3: 99.5}, "ahead": {1: 80.0}}

    def graph(size, mode="layer by layer"):
        return Graph(SimpleNamespace(replay=int, us=times[mode][size]), torch.zeros(size, 3), torch.ones(size, 3), 7.0)

    def capture(size):
        if size not in times[fast.network.block_buffers.mode]:
            raise RuntimeError("out of memory\nmore")
        return graph(size, fast.network.block_buffers.mode)

    def buffers(blocks, mode, shared_with):
        return SimpleNamespace(mode=mode, megabytes=2.0, shared_with=shared_with)

    monkeypatch.setattr(engine, "BlockBuffers", buffers)
    monkeypatch.setattr(fast, "_capture", capture)
    monkeypatch.setattr(tuning.timing, "replay_us", lambda graph, repeats: graph.us)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    fast.network.block_weights, fast.graphs, layer_trials = ["of each block"], {1: graph(1), 3: graph(3)}, fast.trials
    fast._choose_modes()
    found = [trial for trial in fast.trials if trial.part == "all blocks"]
    assert [(t.batch, t.implementation, t.us, t.chosen) for t in found if not t.note] == [
        *[(1, "layer by layer", 100.0, False), (1, "by block", 90.0, False)],
        *[(3, "layer by layer", 100.0, True), (3, "by block", 99.5, False), (1, "ahead", 80.0, True)],
    ]
    assert [(t.batch, t.implementation, t.note) for t in found if t.note] == [(3, "ahead", "out of memory")]
    assert fast.by_block(1) and not fast.by_block(3) and fast.pool_mb == {1: 9.0, 3: 7.0}
    assert fast.graphs[1].buffers.shared_with.mode == "by block" and fast.network.block_buffers is None
    # A chosen mode takes the place of the quantized layers' implementations, and of nothing else.
    unchosen = {t.part for t in fast.trials if t.batch == 1 and t in [o._replace(chosen=False) for o in layer_trials]}
    assert unchosen == {"NF4"} and all(t in fast.trials for t in layer_trials if t.batch == 3)


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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weights", ["nf4", "w8a16"])
def test_weights_of_a_block_are_dequantized_in_time_and_not_overwritten_in_use(
    checkpoints, five, weights, mode, kernel_paths, monkeypatch
):
    fast = fused_engine(checkpoints, weights, 3)
    network, main = fast.network, FakeStream()
    network.put_side_by_side()
    in_turn, queue, depth = engine.logits(fast, five[:3], 3), [main], MODES[mode]

    @contextlib.contextmanager
    def on_stream(stream):
        queue.append(stream)
        yield
        queue.pop()

    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: queue[-1])
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    network.block_buffers = BlockBuffers(network.block_weights, mode)
    blocks, written = network.block_weights, []
    original = BlockWeights.dequantize_into

    def write(block, buffer):
        number = blocks.index(block)
        before = blocks[number - depth].layers if number >= depth else []
        used = [("read", number - depth, id(layer)) for layer in before]
        assert queue[-1].known.issuperset(used), f"block {number - depth}'s buffer is filled while it may be in use"
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
    assert all(layer.prepared is None for block in blocks for layer in block.layers)


def test_modes_share_their_buffers(checkpoints, kernel_paths, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    network = fused_engine(checkpoints, "nf4").network
    network.put_side_by_side()
    one = BlockBuffers(network.block_weights, "by block")
    two = BlockBuffers(network.block_weights, "ahead", one)
    assert two.buffers[0] is one.buffers[0] and len(two.buffers) == 2
    assert BlockBuffers(network.block_weights, "by block", two).buffers == two.buffers[:1]
    assert two.megabytes == 2 * one.megabytes == 2 * 12 * 128**2 * 2 / 2**20


@pytest.mark.parametrize(("weights", "codes"), [("nf4", "packed"), ("w8a16", "rows"), ("fp16", "")])
def test_layers_keep_views_of_weights_that_are_side_by_side(checkpoints, weights, codes, kernel_paths):
    network = fused_engine(checkpoints, weights).network
    before, _ = verify.model_mb(network), network.put_side_by_side()
    assert bool(network.block_weights) == bool(codes)  # FP16 has nothing to dequantize
    for block in network.block_weights:
        start, end = block.codes.data_ptr(), block.codes.data_ptr() + block.codes.nbytes
        assert all(start <= getattr(layer, codes).data_ptr() < end for layer in block.layers)
    verify.verify(network, Variant(weights, "direct", "fused-graph"))
    # The scales of int8 rows are there twice, and counted.
    repeated = sum(block.scales.nbytes for block in network.block_weights if weights == "w8a16") / 2**20
    assert verify.model_mb(network) == pytest.approx(before + repeated, abs=1e-6)


@ON_CUDA
@pytest.mark.parametrize("weights", ["fp16", "nf4", "w8a16", "w8a8", "fp8"])
def test_graphs_give_the_logits_of_the_plain_network(checkpoints, five, expected, weights):
    variant = Variant(weights, "direct", "fused-graph")
    if reason := attention.not_runnable(variant, torch.device("cuda")):
        pytest.skip(reason)
    fast = engine.load(checkpoints, variant.name, "cuda", (1, 3))
    for size in (1, 3):  # a graph each
        assert relative(engine.logits(fast, five, size), expected[weights]) < TOLERANCES[weights]
    assert fast.pool_mb.keys() == {1, 3} and min(fast.pool_mb.values()) > 0
    modes = engine.tunings({"": fast}, "variant").query("layer == 'all blocks'")
    if weights in ("nf4", "w8a16"):
        assert modes.groupby("batch")["chosen"].sum().to_dict() == {1: 1, 3: 1}
    else:
        assert modes.empty


@ON_CUDA
@pytest.mark.parametrize("weights", ["nf4", "w8a16"])
def test_a_second_stream_changes_no_logit(checkpoints, weights):
    network = engine.load(checkpoints, f"{weights}-direct-fused", "cuda", (1,)).network
    network.put_side_by_side()
    pixels = torch.randn(64, 3, 32, 32, device="cuda", dtype=torch.float16)
    with torch.inference_mode():
        in_turn = network(pixels)
        for mode in MODES:
            network.block_buffers = BlockBuffers(network.block_weights, mode)
            for _ in range(20):
                torch.testing.assert_close(network(pixels), in_turn, rtol=1e-3, atol=1e-3)


@ON_CUDA
@pytest.mark.parametrize("weights", ["fp16", "nf4", "w8a8"])
def test_kernels_outside_operators_belong_to_a_part(checkpoints, weights):
    fast = engine.load(checkpoints, f"{weights}-direct-fused", "cuda", (3,))
    take_kernels(fast.network)
    pixels = torch.randn(3, 3, 32, 32, device="cuda", dtype=torch.float16)
    frame = profile.profile(lambda: fast(pixels), fast.network, torch.device("cuda"))
    assert frame.attrs["unattributed_share"] < 0.05
    assert "_attention_kernel" in profile.attention_kernel(frame)


def test_a_dropped_engine_is_gone_without_the_collector(checkpoints):
    gc.collect()
    gc.disable()
    try:
        for name in ("fp16-direct", *(f"{weights}-direct-fused" for weights in ("fp16", "nf4", "w8a8", "fp8"))):
            fast = engine.load(checkpoints, name, "cpu", (1,))
            network = weakref.ref(fast.network)
            del fast
            assert network() is None, f"an engine of {name} holds its network in a cycle"
    finally:
        gc.enable()
