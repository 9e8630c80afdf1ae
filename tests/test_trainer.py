"""A killed run resumes exactly, and never from a damaged checkpoint; a compiled one gives the same numbers."""

import json
import shutil
import warnings
from dataclasses import replace

import peft
import pytest
import torch
from torch._dynamo.utils import counters

from vitlib import adapters, checkpoint, preprocess, trainer
from vitlib.trainer import Examples, Recipe, ResumeError

CPU = torch.device("cpu")
RECIPE = Recipe(
    epochs=2, batch_size=8, learning_rate=1e-3, weight_decay=0.01, warmup=0.1, label_smoothing=0.1, crop_area=0.5,
    precision="fp32", seed=3,
)  # fmt: skip
COMPILED = replace(RECIPE, compile="always")
FULL = torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture
def examples():
    """20 pictures: two full batches of 8 and one of 4."""
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8, generator=draw)
    labels = torch.randint(0, 3, (20,), generator=draw)
    return {"train": Examples(pixels, labels), "valid": Examples(pixels[:6], labels[:6])}


@pytest.fixture
def train(examples, labels, tmp_path):
    """Trains a tiny ViT of `method` (full, head, or lora with its dropout); returns the network and the history."""

    def run(folder="run", *, recipe=RECIPE, method="full", dropout=0.0, backend="aot_eager", **options):
        torch.manual_seed(0)
        network = checkpoint.new("vit-micro", image_size=32, labels=labels)
        if method == "lora":
            config = adapters.config(rank=4, alpha=8, dropout=dropout, head="classifier", summed=not dropout)
            network = peft.get_peft_model(network, config)
        if method == "head":
            network.vit.requires_grad_(False)
        run.network = network
        options = {"pre": preprocess.new(32), "recipe": recipe, "device": CPU, "backend": backend, **options}
        return network, trainer.train(network, examples, folder=tmp_path / folder, **options)

    torch._dynamo.reset()
    counters.clear()
    yield run
    torch._dynamo.reset()


def kill(train, monkeypatch, **options):
    """A run that is stopped in its second epoch."""

    def stop(self, args, state, control, **_):
        if state.epoch > 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer._EpochClock, "on_step_end", stop)
        train(**options)


def same(found, expected) -> bool:
    return all(torch.equal(value, expected.state_dict()[name]) for name, value in found.state_dict().items())


# Resuming


@pytest.mark.parametrize(
    "options",
    [{"method": "full"}, {"method": "lora", "dropout": 0.1, "recipe": COMPILED}],
    ids=["full", "compiled lora with dropout"],
)
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(train, monkeypatch, tmp_path, capsys, options):
    """The Trainer alone continues from random weights here: it does not map a ViT's old module names back.

    Compiling draws random numbers for dropout; they must not be missing afterwards.
    """
    expected, whole = train("whole", **options)
    kill(train, monkeypatch, **options)
    found, history = train(resume=True, **options)
    assert "resuming from checkpoint-3" in capsys.readouterr().out
    assert same(found, expected)
    assert history["epoch"].tolist() == [1, 2]
    assert history[["train_loss", "valid_loss", "top1", "top5", "epoch_s", "images_per_s"]].notna().all(axis=None)
    # Usually it was interrupted after training, while a checkpoint was saved.
    again, repeated = train(resume=True, **options)
    assert same(again, expected) and repeated["top1"].tolist() == whole["top1"].tolist()


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth", "manifest.json"]


def test_a_damaged_checkpoint_is_named_and_never_used(train, tmp_path, capsys):
    train()
    run, copy = tmp_path / "run", tmp_path / "copy"
    identity = json.loads((run / "checkpoint-3" / trainer.MANIFEST).read_text())["identity"]
    assert trainer.newest_intact_checkpoint(run, identity).name == "checkpoint-6"
    for name in FILES:
        for harm in (_truncate, _flip, lambda path: path.unlink()):
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(run, copy)
            harm(copy / "checkpoint-6" / name)
            capsys.readouterr()
            try:
                chosen = trainer.newest_intact_checkpoint(copy, identity)
            except ResumeError:  # one bit of the manifest's settings: refused, not used
                assert name == "manifest.json"
            else:
                assert chosen.name == "checkpoint-3"
                assert "checkpoint-6 is damaged" in capsys.readouterr().out


def test_another_run_is_refused_by_what_differs_and_replaced_without_resume(train, monkeypatch, examples, tmp_path):
    kill(train, monkeypatch)
    for said, change in (
        ("learning_rate 0.001 → 0.002", {"recipe": replace(RECIPE, learning_rate=2e-3)}),
        ("initial weights", {"method": "lora"}),
        ("method None → lora", {"about": {"method": "lora"}}),
    ):
        with pytest.raises(ResumeError, match=said):
            train(resume=True, **change)
    examples["train"].labels[0] += 1
    with pytest.raises(ResumeError, match="pictures"):
        train(resume=True)
    (tmp_path / "run" / "checkpoint-1").mkdir()
    train(recipe=replace(RECIPE, epochs=1))
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]


def test_training_and_validation_see_the_same_normalisation(train, examples, monkeypatch):
    """The original study trained with mean and deviation 0.5 and evaluated with ImageNet's."""
    seen = {True: [], False: []}
    original = trainer.ImageTrainer.compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        handle = model.register_forward_pre_hook(
            lambda module, args, kwargs: seen[module.training].append(kwargs["pixel_values"]), with_kwargs=True
        )
        try:
            return original(self, model, inputs, *args, **kwargs)
        finally:
            handle.remove()

    monkeypatch.setattr(trainer.ImageTrainer, "compute_loss", spy)
    monkeypatch.setattr(trainer.preprocess, "augment", lambda batch, **_: batch)  # without crops
    examples["train"] = examples["valid"]
    train(recipe=replace(RECIPE, epochs=1))
    order = [batch.flatten(1).sum(1).sort().values for batch in (seen[True][0], seen[False][0])]
    torch.testing.assert_close(order[0], order[1])


# Compiled


@pytest.mark.parametrize(
    ("method", "dropout", "precision"),
    [("lora", 0.0, "bf16"), ("lora", 0.1, "fp32"), ("full", 0.0, "fp32"), ("head", 0.0, "fp32")],
)
def test_one_compilation_serves_a_run_that_ends_where_the_uncompiled_one_does(
    train, tmp_path, monkeypatch, method, dropout, precision
):
    """Also the last batch: its padding must count for nothing. Dropout draws for the padding too: no padding there."""
    if not dropout:
        monkeypatch.setattr(trainer.preprocess, "augment", lambda batch, **_: batch)
    recipe = replace(COMPILED, precision=precision, batch_size=10 if dropout else 8)
    compiled, history = train(recipe=recipe, method=method, dropout=dropout)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert history["compile_s"].iloc[0] > 0 and history["compile_s"].iloc[1:].tolist() == [0.0]
    assert all(module._compiled_call_impl is None for module in compiled.modules())
    base = compiled.get_base_model() if method == "lora" else compiled
    assert base.config._attn_implementation == "sdpa"
    if method == "lora":  # the class that adds adapters into the weights must not be needed to read them
        saved = next((tmp_path / "run").glob("checkpoint-*")) / "adapter_config.json"
        assert adapters.SummedLinear.__name__ not in saved.read_text()
    plain, expected = train("plain", recipe=replace(recipe, compile="never"), method=method, dropout=dropout)
    assert expected["compile_s"].tolist() == [0.0, 0.0]
    torch.testing.assert_close(history["train_loss"].tolist(), expected["train_loss"].tolist(), rtol=2e-2, atol=0)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-2, atol=2e-3)


def _advises(graph, inputs):
    """A backend with the compiler's advice for fp32 weights: it has no place in a report."""
    warnings.warn(
        "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled", stacklevel=1
    )
    return graph.forward


def test_every_picture_counts_once_an_epoch_and_every_batch_is_full(train, examples, monkeypatch):
    batches, original = [], trainer.ImageTrainer.compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        if model.training:
            batches.append({key: value.clone() for key, value in inputs.items()})
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer.ImageTrainer, "compute_loss", spy)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        train(recipe=COMPILED, backend=_advises)
    assert not [str(warning.message) for warning in shown if "TensorFloat32" in str(warning.message)]
    batches = batches[1:]  # the first compiles
    assert [len(batch["labels"]) for batch in batches] == [8] * 6
    for epoch in (batches[:3], batches[3:]):
        counted = torch.cat([batch["pixels"][batch["labels"] != trainer.PADDING] for batch in epoch]).flatten(1)
        assert counted.sum(1).sort().values.equal(examples["train"].pixels.flatten(1).sum(1).sort().values)
    assert not batches[0]["pixels"].equal(batches[3]["pixels"])


def test_auto_compiles_only_where_it_pays(labels):
    network, auto = checkpoint.new("vit-micro", image_size=32, labels=labels), replace(RECIPE, compile="auto")
    assert not trainer.compiles(auto, network, 10**9, CPU)
    assert trainer.compiles(replace(auto, compile="always"), network, 1, CPU)
    assert not trainer.compiles(auto, network, 1000, torch.device("cuda"))


def test_a_block_without_mask_gives_what_transformers_gives_and_is_not_named_in_a_checkpoint(labels, tmp_path):
    network, x = checkpoint.new("vit-micro", image_size=32, labels=labels).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = network(pixel_values=x).logits
        with trainer.compiled_blocks(network, "eager"):
            assert network.config._attn_implementation == "direct"
            torch.testing.assert_close(network(pixel_values=x).logits, expected)
            network.save_pretrained(tmp_path)
    assert "direct" not in (tmp_path / "config.json").read_text()


def _broken(*_):
    raise RuntimeError("no C compiler")


def test_where_the_compiler_fails_auto_says_so_and_trains(train, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "compiles", lambda *_: True)
    once = replace(RECIPE, epochs=1)
    _, history = train(recipe=replace(once, compile="auto"), backend=_broken)
    assert len(history) == 1 and "not compiled, backend" in capsys.readouterr().out
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="no C compiler"):
        train(recipe=replace(once, compile="always"), backend=_broken)


# Too large a batch


def fail_first_batches(errors: list[Exception], monkeypatch) -> list[bool]:
    """The first batches that are tried fail with `errors`; the list says for each try if activations are recomputed."""
    original, tried = trainer.ImageTrainer._one_batch, []

    def one_batch(self):
        tried.append(self.model.is_activation_checkpointing)
        if len(tried) <= len(errors):
            raise errors[len(tried) - 1]
        return original(self)

    monkeypatch.setattr(trainer.ImageTrainer, "_one_batch", one_batch)
    return tried


@pytest.mark.parametrize(("method", "dropout"), [("lora", 0.1), ("full", 0.0)])
def test_a_batch_that_does_not_fit_is_trained_with_recomputation(train, method, dropout, monkeypatch, capsys):
    options = {"method": method, "dropout": dropout, "recipe": replace(COMPILED, epochs=1)}
    expected, history = train("plain", **options)
    recomputed, step = [], trainer.ImageTrainer.training_step

    def spy(self, model, *rest):
        recomputed.append(model.is_activation_checkpointing)
        return step(self, model, *rest)

    monkeypatch.setattr(trainer.ImageTrainer, "training_step", spy)
    fail_first_batches([FULL], monkeypatch)
    network, found = train("small", **options)
    assert recomputed == [True] * 3
    assert "a training batch of 8 pictures does not fit" in capsys.readouterr().out
    torch.testing.assert_close(found["train_loss"].tolist(), history["train_loss"].tolist(), rtol=1e-4, atol=0)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    assert found["recomputed"].all() and not history["recomputed"].any()
    assert not network.is_activation_checkpointing  # what comes after training keeps its speed


def test_where_the_compiler_fails_too_the_plain_step_is_tried_before_training(train, monkeypatch, capsys):
    """It keeps more than a compiled one, so that one may fit and the other not."""
    monkeypatch.setattr(trainer, "compiles", lambda *_: True)
    failed = torch._dynamo.exc.BackendCompilerFailed(_broken, RuntimeError("no C compiler"), None)
    tried = fail_first_batches([failed, FULL], monkeypatch)
    _, history = train(recipe=replace(RECIPE, compile="auto", epochs=1))
    said = capsys.readouterr().out
    assert tried == [False, False, True] and history["recomputed"].all()
    assert said.index("not compiled") < said.index("does not fit")


def test_a_batch_that_never_fits_is_refused_and_leaves_the_network_for_another_try(train, monkeypatch):
    tried = fail_first_batches([FULL, FULL], monkeypatch)
    with pytest.raises(MemoryError, match="set train_batch_size to a smaller number"):
        train(recipe=replace(COMPILED, precision="bf16"))
    assert tried == [False, True] and not train.network.is_activation_checkpointing
    assert not hasattr(train.network, "_original_forward")  # no autocast is left around its forward
