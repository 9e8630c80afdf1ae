"""The compiled step: compiled once, for one shape, and with the numbers of the uncompiled one."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from vitlib import adapters, checkpoint, finetune, params, preprocess, training
from vitlib.finetune import Base
from vitlib.training import Examples, Recipe

CPU = torch.device("cpu")
RECIPE = Recipe(
    epochs=2, batch_size=8, learning_rate=1e-3, weight_decay=0.01, warmup=0.1, label_smoothing=0.1, crop_area=0.5,
    precision="fp32", seed=3, compile="always",
)  # fmt: skip


@pytest.fixture
def examples():
    """20 pictures: two full batches of 8 and one of 4."""
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8, generator=draw)
    labels = torch.randint(0, 3, (20,), generator=draw)
    return {"train": Examples(pixels, labels), "valid": Examples(pixels[:6], labels[:6])}


@pytest.fixture
def train(examples, labels, tmp_path):
    """Trains a tiny ViT of `method`; returns its weights and the history."""

    def run(folder="run", *, recipe=RECIPE, method="lora", dropout=0.0, resume=False):
        torch.manual_seed(0)
        base = Base(checkpoint.new("vit-micro", image_size=32, labels=labels), preprocess.new(32), labels, CPU, {})
        chosen = params.check({"precision": recipe.precision, "method": method, "lora_dropout": dropout})
        network = finetune.make_trainable(base, chosen)
        history = training.train(
            network, examples, pre=base.preprocess, recipe=recipe, folder=tmp_path / folder, device=CPU,
            resume=resume, backend="aot_eager",
        )  # fmt: skip
        return network, history

    torch._dynamo.reset()
    counters.clear()
    yield run
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("method", "dropout", "precision"),
    [("lora", 0.1, "bf16"), ("lora", 0.0, "bf16"), ("full", 0.0, "fp32"), ("head", 0.0, "bf16")],
)
def test_one_compilation_serves_all_blocks_all_epochs_and_validation(train, method, dropout, precision):
    network, history = train(recipe=replace(RECIPE, precision=precision), method=method, dropout=dropout)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert history["compile_s"].iloc[0] > 0
    assert history["compile_s"].iloc[1:].tolist() == [0.0]
    assert all(m._compiled_call_impl is None for m in network.modules())
    assert (network.get_base_model() if method == "lora" else network).config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("method", "dropout"), [("lora", 0.0), ("lora", 0.1), ("full", 0.0)])
def test_the_compiled_run_ends_where_the_uncompiled_one_does(train, method, dropout, monkeypatch):
    """Also the last batch: its padding must count for nothing. Crops and dropout draw for it too: not compared."""
    if not dropout:
        monkeypatch.setattr(training.preprocess, "augment", lambda batch, **_: batch)
    recipe = RECIPE if not dropout else replace(RECIPE, batch_size=10)
    compiled, history = train("compiled", recipe=recipe, method=method, dropout=dropout)
    plain, expected = train("plain", recipe=replace(recipe, compile="never"), method=method, dropout=dropout)
    assert expected["compile_s"].tolist() == [0.0, 0.0]
    torch.testing.assert_close(history["train_loss"].tolist(), expected["train_loss"].tolist(), rtol=2e-2, atol=0)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-2, atol=2e-3)


def test_a_compiled_run_that_is_resumed_ends_with_the_weights_of_one_never_stopped(train, monkeypatch):
    """Dropout draws random numbers while compiling: they must not be missing afterwards."""
    expected, _ = train("whole", dropout=0.1)

    def stop(self, args, state, control, **_):
        if state.epoch > 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training._EpochClock, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            train(dropout=0.1)
    found, history = train(dropout=0.1, resume=True)
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in found.state_dict().items())
    assert len(history) == 2


def test_compiling_leaves_the_random_stream_as_it_was(train, examples, monkeypatch):
    """Else a run that compiles first would drop other inputs than the same run going on from a checkpoint."""
    states = []
    original = training.ImageTrainer.warm_up

    def spy(self):
        states.append(torch.get_rng_state())
        seconds = original(self)
        states.append(torch.get_rng_state())
        return seconds

    monkeypatch.setattr(training.ImageTrainer, "warm_up", spy)
    train(dropout=0.1)
    assert torch.equal(*states)


def test_every_picture_counts_once_an_epoch_and_every_batch_is_full(train, examples, monkeypatch):
    batches = []
    original = training.ImageTrainer.compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        if model.training:
            batches.append({key: value.clone() for key, value in inputs.items()})
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(training.ImageTrainer, "compute_loss", spy)
    train()
    batches = batches[1:]  # the first compiles
    assert [len(batch["labels"]) for batch in batches] == [8] * 6
    for epoch in (batches[:3], batches[3:]):
        counted = torch.cat([batch["pixels"][batch["labels"] != training.PADDING] for batch in epoch]).flatten(1)
        assert counted.sum(1).sort().values.equal(examples["train"].pixels.flatten(1).sum(1).sort().values)
    assert not batches[0]["pixels"].equal(batches[3]["pixels"])


def test_auto_compiles_only_where_it_pays(labels):
    network, auto = checkpoint.new("vit-micro", image_size=32, labels=labels), replace(RECIPE, compile="auto")
    assert not training.compiles(auto, network, 10**9, CPU)
    assert training.compiles(replace(auto, compile="always"), network, 1, CPU)
    assert not training.compiles(auto, network, 1000, torch.device("cuda"))


def test_a_block_without_mask_gives_what_transformers_gives(labels):
    network = checkpoint.new("vit-micro", image_size=32, labels=labels).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = network(pixel_values=x).logits
        network.set_attn_implementation("direct")
        torch.testing.assert_close(network(pixel_values=x).logits, expected)


def test_the_configuration_saved_while_compiled_names_no_attention_of_ours(labels, tmp_path):
    network = checkpoint.new("vit-micro", image_size=32, labels=labels)
    with training.compiled_blocks(network, "eager"):
        network.save_pretrained(tmp_path)
    assert "direct" not in (tmp_path / "config.json").read_text()


def test_adapters_saved_by_the_trainer_are_plain_pefts(train, tmp_path):
    """The class that adds adapters into the weights must not be needed to read them."""
    train(dropout=0.0)
    names = (tmp_path / "run" / "checkpoint-6" / "adapter_config.json").read_text()
    assert adapters.SummedLinear.__name__ not in names


def _advises(graph, inputs):
    """A backend with the compiler's advice for fp32 weights: it has no place in a report."""
    warnings.warn(
        "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled", stacklevel=1
    )
    return graph.forward


def test_the_compilers_advice_on_fp32_is_not_shown(examples, labels, tmp_path):
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        training.train(
            checkpoint.new("vit-micro", image_size=32, labels=labels), examples, pre=preprocess.new(32), recipe=RECIPE,
            folder=tmp_path, device=CPU, backend=_advises,
        )  # fmt: skip
    assert not [str(warning.message) for warning in shown if "TensorFloat32" in str(warning.message)]


def _broken(*_):
    raise RuntimeError("no C compiler")


def test_where_the_compiler_fails_auto_says_so_and_trains(examples, labels, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "compiles", lambda *_: True)
    torch._dynamo.reset()

    def run(compile_):
        network = checkpoint.new("vit-micro", image_size=32, labels=labels)
        return training.train(
            network, examples, pre=preprocess.new(32), recipe=replace(RECIPE, compile=compile_), folder=tmp_path,
            device=CPU, backend=_broken,
        )  # fmt: skip

    assert len(run("auto")) == 2
    assert "not compiled, backend" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="no C compiler"):
        run("always")


def _first_batches(errors: list[Exception], monkeypatch) -> list[bool]:
    """The first batches that are tried fail with `errors`; the list says, a try each, if activations are not kept."""
    original, tried = training.ImageTrainer._one_batch, []

    def one_batch(self):
        tried.append(self.model.is_activation_checkpointing)
        if len(tried) <= len(errors):
            raise errors[len(tried) - 1]
        return original(self)

    monkeypatch.setattr(training.ImageTrainer, "_one_batch", one_batch)
    return tried


FULL = torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(("method", "dropout"), [("lora", 0.0), ("lora", 0.1), ("full", 0.0)])
def test_a_batch_that_does_not_fit_is_trained_without_keeping_activations(train, method, dropout, monkeypatch, capsys):
    expected, history = train("plain", method=method, dropout=dropout)
    recomputed, forward = [], training.ImageTrainer.training_step
    monkeypatch.setattr(
        training.ImageTrainer,
        "training_step",
        lambda self, model, *rest: (recomputed.append(model.is_activation_checkpointing), forward(self, model, *rest))[
            1
        ],
    )
    _first_batches([FULL], monkeypatch)
    network, found = train("small", method=method, dropout=dropout)
    assert all(recomputed) and len(recomputed) == 6
    assert "a training batch of 8 pictures does not fit" in capsys.readouterr().out
    torch.testing.assert_close(found["train_loss"].tolist(), history["train_loss"].tolist(), rtol=1e-4, atol=0)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    assert found["recomputed"].all() and not history["recomputed"].any()
    assert not network.is_activation_checkpointing  # what comes after training keeps its speed


def test_where_the_compiler_fails_too_the_plain_step_is_tried_before_training(train, monkeypatch, capsys):
    """It keeps more than a compiled one, so that one may fit and the other not."""
    monkeypatch.setattr(training, "compiles", lambda *_: True)
    failed = torch._dynamo.exc.BackendCompilerFailed(_broken, RuntimeError("no C compiler"), None)
    tried = _first_batches([failed, FULL], monkeypatch)
    _, history = train(recipe=replace(RECIPE, compile="auto"))
    said = capsys.readouterr().out
    assert tried == [False, False, True] and history["recomputed"].all()
    assert said.index("not compiled") < said.index("does not fit")


def test_a_batch_that_never_fits_is_refused_and_the_next_try_starts_afresh(train, monkeypatch):
    tried, network = _first_batches([FULL, FULL], monkeypatch), []
    original = finetune.make_trainable
    monkeypatch.setattr(finetune, "make_trainable", lambda *given: (network.append(original(*given)), network[-1])[1])
    with pytest.raises(MemoryError, match="set train_batch_size to a smaller number"):
        train(recipe=replace(RECIPE, precision="bf16"))
    assert tried == [False, True] and not network[0].is_activation_checkpointing
    assert not hasattr(network[0], "_original_forward")  # no autocast is left around its forward
