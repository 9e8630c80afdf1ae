"""A killed run resumes exactly, and never from a damaged checkpoint; a compiled one gives the same numbers."""

import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from vitlib.network import checkpoint
from vitlib.pictures import preprocess
from vitlib.training import adapters, trainer
from vitlib.training.trainer import Examples, Recipe

CPU = torch.device("cpu")
RECIPE = Recipe(
    epochs=2, train_batch_size=8, learning_rate=1e-3, weight_decay=0.01, warmup=0.1, label_smoothing=0.1, crop_area=0.5,
    precision="fp32", seed=3,
)  # fmt: skip
COMPILED = replace(RECIPE, compile_training="always")
FULL = torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture(scope="module")
def examples():
    """20 pictures: two full batches of 8 and one of 4."""
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8, generator=draw)
    labels = torch.randint(0, 3, (20,), generator=draw)
    return {"train": Examples(pixels, labels), "valid": Examples(pixels[:6], labels[:6])}


@pytest.fixture(scope="module")
def train(examples, labels):
    """Trains a tiny ViT of `method` (full, head, or lora with its dropout); returns the network and the history."""

    def run(folder, *, recipe=RECIPE, method="full", dropout=0.0, data=examples, **options):
        torch.manual_seed(0)
        network = checkpoint.new("vit-micro", image_size=32, labels=labels)
        if method == "lora":
            settled = {"rank": 4, "alpha": 8, "dropout": dropout, "head": "classifier", "summed": not dropout}
            network = adapters.attach(network, **settled)
        if method == "head":
            network.vit.requires_grad_(False)
        run.network = network
        options = {"pre": preprocess.new(32), "recipe": recipe, "device": CPU, "backend": "aot_eager", **options}
        return network, trainer.train(network, data, folder=folder, **options)

    return run


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """An uninterrupted run of two epochs: network, history, folder."""
    folder = tmp_path_factory.mktemp("whole")
    return *train(folder), folder


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def seen(monkeypatch):
    """What the loss of each training batch was computed of."""
    calls, original = [], trainer.ImageTrainer.compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        if model.training:
            calls.append({key: value.clone() for key, value in inputs.items()})
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer.ImageTrainer, "compute_loss", spy)
    return calls


def same(found, expected) -> bool:
    return all(torch.equal(value, expected.state_dict()[name]) for name, value in found.state_dict().items())


# Resuming


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(train, whole, monkeypatch, tmp_path, method):
    """The Trainer alone continues from random weights here: it does not map a ViT's old module names back.

    Compiling draws random numbers for dropout; they must not be missing afterwards.
    """
    options = {"recipe": COMPILED, "method": "lora", "dropout": 0.1} if method == "lora" else {}
    expected, history = train(tmp_path / "whole", **options) if options else whole[:2]

    def stop(self, args, state, control, **_):
        if state.epoch > 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer._EpochClock, "on_step_end", stop)
        train(tmp_path / "run", **options)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    for _ in range(2):  # also where it was interrupted after training, while a checkpoint was saved
        found, again = train(tmp_path / "run", resume=True, **options)
        assert same(found, expected) and again["top1"].tolist() == history["top1"].tolist()
    assert again["epoch"].tolist() == [1, 2]
    assert again[["train_loss", "valid_loss", "top1", "top5", "epoch_s", "images_per_s"]].notna().all(axis=None)


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth", "manifest.json"]


def test_a_damaged_checkpoint_is_named_and_never_used(whole, tmp_path, capsys):
    run, copy = whole[2], tmp_path / "copy"
    identity = json.loads((run / "checkpoint-3" / trainer.MANIFEST).read_text())["identity"]
    assert trainer.newest_intact_checkpoint(run, identity).name == "checkpoint-6"
    for name in FILES:
        for harm in (_truncate, _flip, lambda path: path.unlink()):
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(run, copy)
            harm(copy / "checkpoint-6" / name)
            capsys.readouterr()
            chosen, said = trainer.newest_intact_checkpoint(copy, identity), capsys.readouterr().out
            if chosen is None:  # one bit of the manifest's settings
                assert name == "manifest.json" and "training starts again: checkpoint-6 is of another run" in said
            else:
                assert chosen.name == "checkpoint-3" and "checkpoint-6 is damaged" in said


def test_another_run_is_named_by_what_differs_and_replaced(train, whole, examples, tmp_path, capsys, monkeypatch):
    run, made = shutil.copytree(whole[2], tmp_path / "run"), trainer._arguments
    monkeypatch.setattr(trainer, "_arguments", lambda *_, **__: pytest.fail("before training"))
    other = {**examples, "train": Examples(examples["train"].pixels, examples["train"].labels.flip(0))}
    for said, change in (
        ("learning_rate 0.001 → 0.002", {"recipe": replace(RECIPE, learning_rate=2e-3)}),
        ("initial weights", {"method": "lora"}),
        ("method None → lora", {"about": {"method": "lora"}}),
        ("pictures", {"data": other}),
    ):
        shutil.copytree(whole[2], run, dirs_exist_ok=True)
        with pytest.raises(pytest.fail.Exception, match="before training"):
            train(run, resume=True, **change)
        printed = capsys.readouterr().out
        assert "training starts again: checkpoint-6 is of another run (" in printed and said in printed
        assert not run.exists()
    monkeypatch.setattr(trainer, "_arguments", made)
    (run / "checkpoint-1").mkdir(parents=True)
    train(run, recipe=replace(RECIPE, epochs=1))
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-3"]


def test_training_and_validation_see_the_same_normalisation(train, examples, monkeypatch, tmp_path):
    """The original study trained with mean and deviation 0.5 and evaluated with ImageNet's."""
    found, pre = [], preprocess.new(32)
    spy = lambda self, *given: found.append(original(self, *given)) or found[-1]  # noqa: E731
    original = preprocess.Preprocess.normalise
    monkeypatch.setattr(preprocess.Preprocess, "normalise", spy)
    monkeypatch.setattr(trainer.preprocess, "augment", lambda batch, **_: batch)  # without crops
    train(tmp_path, recipe=replace(RECIPE, epochs=1), data={**examples, "train": examples["valid"]}, pre=pre)
    trained, validated = (batch.flatten(1).sum(1).sort().values for batch in found)
    torch.testing.assert_close(trained, validated)


# Compiled


@pytest.mark.parametrize(("method", "precision"), [("lora", "bf16"), ("full", "fp32"), ("head", "fp32")])
def test_one_compilation_serves_a_run_that_ends_where_the_uncompiled_one_does(
    train, tmp_path, monkeypatch, method, precision
):
    """Also the last batch: its padding must count for nothing."""
    monkeypatch.setattr(trainer.preprocess, "augment", lambda batch, **_: batch)
    recipe = replace(COMPILED, precision=precision)
    compiled, history = train(tmp_path / "compiled", recipe=recipe, method=method)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert history["compile_s"].iloc[0] > 0 and history["compile_s"].iloc[1:].tolist() == [0.0]
    assert all(module._compiled_call_impl is None for module in compiled.modules())
    assert compiled.config._attn_implementation == "sdpa"
    if method == "lora":  # the class that adds adapters into the weights must not be needed to read them
        saved = next((tmp_path / "compiled").glob("checkpoint-*")) / "adapter_config.json"
        assert adapters.SummedLinear.__name__ not in saved.read_text()
    plain, expected = train(tmp_path / "plain", recipe=replace(recipe, compile_training="never"), method=method)
    assert expected["compile_s"].tolist() == [0.0, 0.0]
    torch.testing.assert_close(history["train_loss"].tolist(), expected["train_loss"].tolist(), rtol=2e-2, atol=0)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-2, atol=2e-3)


def _advises(graph, inputs):
    """A backend with the compiler's advice for fp32 weights: it has no place in a report."""
    warnings.warn("TensorFloat32 tensor cores for float32 matrix multiplication available", stacklevel=1)
    return graph.forward


def test_every_picture_counts_once_an_epoch_and_every_batch_is_full(train, examples, seen, tmp_path):
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        train(tmp_path, recipe=COMPILED, backend=_advises)
    assert not [str(warning.message) for warning in shown if "TensorFloat32" in str(warning.message)]
    batches = seen[1:]  # the first compiles
    assert [len(batch["labels"]) for batch in batches] == [8] * 6
    for epoch in (batches[:3], batches[3:]):
        counted = torch.cat([batch["pixels"][batch["labels"] != trainer.PADDING] for batch in epoch]).flatten(1)
        assert counted.sum(1).sort().values.equal(examples["train"].pixels.flatten(1).sum(1).sort().values)
    assert not batches[0]["pixels"].equal(batches[3]["pixels"])


def test_auto_compiles_only_where_it_pays(labels):
    network, auto = checkpoint.new("vit-micro", image_size=32, labels=labels), replace(RECIPE, compile_training="auto")
    assert not trainer.compiles(auto, network, 10**9, CPU)
    assert trainer.compiles(COMPILED, network, 1, CPU)
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


# What does not work


def _broken(*_):
    raise RuntimeError("no C compiler")


def fail_first(error: Exception, monkeypatch) -> None:
    """The first batch fails with `error`."""
    original, left = trainer.ImageTrainer.compute_loss, [error]

    def compute_loss(self, *given, **named):
        loss = original(self, *given, **named)
        if left:
            raise left.pop()
        return loss

    monkeypatch.setattr(trainer.ImageTrainer, "compute_loss", compute_loss)


def test_where_the_compiler_fails_auto_says_so_and_trains_without_it(train, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(trainer, "compiles", lambda *_: True)
    failed = torch._dynamo.exc.BackendCompilerFailed(_broken, RuntimeError("no C compiler"), None)
    fail_first(failed, monkeypatch)
    _, history = train(tmp_path, recipe=replace(RECIPE, compile_training="auto", epochs=1))
    assert "not compiled, " in capsys.readouterr().out and len(history) == 1
    with pytest.raises(RuntimeError, match="no C compiler"):
        train(tmp_path, recipe=replace(COMPILED, epochs=1), backend=_broken)


def test_a_batch_that_does_not_fit_is_refused_and_leaves_the_network_for_another_try(train, monkeypatch, tmp_path):
    fail_first(FULL, monkeypatch)
    with pytest.raises(MemoryError, match="set train_batch_size to a smaller number"):
        train(tmp_path, recipe=replace(COMPILED, precision="bf16"))
    assert not hasattr(train.network, "_original_forward")  # no autocast is left around its forward
