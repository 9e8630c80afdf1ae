"""Training that is killed goes on where it was, and never from half of a checkpoint."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from vitlib import checkpoint, preprocess, training
from vitlib.training import Examples, Recipe, ResumeError

CPU = torch.device("cpu")
RECIPE = Recipe(
    epochs=3, batch_size=8, learning_rate=1e-3, weight_decay=0.01, warmup=0.1, label_smoothing=0.1, crop_area=0.5,
    precision="fp32", seed=3,
)  # fmt: skip


class Killed(Exception):
    pass


@pytest.fixture
def examples():
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8, generator=draw)
    labels = torch.randint(0, 3, (24,), generator=draw)
    return {"train": Examples(pixels, labels), "valid": Examples(pixels[:6], labels[:6])}


@pytest.fixture
def train(examples, labels, tmp_path):
    def run(folder="run", *, resume=False, recipe=RECIPE, adapters=False, about=None):
        torch.manual_seed(0)
        network = checkpoint.new("vit-micro", image_size=32, labels=labels)
        if adapters:
            config = LoraConfig(target_modules=["q_proj", "fc1"], lora_dropout=0.1, modules_to_save=["classifier"])
            network = get_peft_model(network, config)
        history = training.train(
            network,
            examples,
            pre=preprocess.new(32),
            recipe=recipe,
            folder=tmp_path / folder,
            device=CPU,
            resume=resume,
            about=about,
        )
        return network.state_dict(), history

    return run


@pytest.fixture
def kill(train, monkeypatch, tmp_path):
    """Starts a training run that is stopped while its third epoch runs; returns its folder."""

    def stop(self, args, state, control, **_):
        if state.epoch > 2:
            raise Killed

    def run(**options):
        with monkeypatch.context() as patch:
            patch.setattr(training._EpochClock, "on_step_end", stop)
            with pytest.raises(Killed):
                train(**options)
        return tmp_path / "run"

    return run


@pytest.fixture
def killed_after_two_epochs(kill):
    return kill()


def test_history_has_a_row_an_epoch_with_every_column(train):
    _, history = train()
    assert history["epoch"].tolist() == [1, 2, 3]
    assert history[["train_loss", "valid_loss", "top1", "top5", "epoch_s", "images_per_s"]].notna().all(axis=None)


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_a_resumed_run_ends_with_the_weights_of_one_never_stopped(train, kill, adapters, capsys):
    """The Trainer alone goes on from random weights here: it does not map a ViT's old module names back."""
    expected, _ = train("whole", adapters=adapters)
    kill(adapters=adapters)
    found, history = train(resume=True, adapters=adapters)
    assert "going on from checkpoint-6" in capsys.readouterr().out
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(history) == 3


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGED = ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth", "manifest.json"]


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize(
    "harm", [_truncate, _flip, lambda path: path.unlink()], ids=["truncated", "one bit", "missing"]
)
def test_a_damaged_checkpoint_is_named_and_passed_over(killed_after_two_epochs, name, harm, capsys):
    newest = killed_after_two_epochs / "checkpoint-6"
    harm(newest / name)
    identity = json.loads((killed_after_two_epochs / "checkpoint-3" / training.MANIFEST).read_text())["identity"]
    try:
        chosen = training.newest_whole_checkpoint(killed_after_two_epochs, identity)
    except ResumeError:  # one bit of the manifest's settings: refused, not used
        assert name == "manifest.json"
    else:
        assert chosen.name == "checkpoint-3"
        assert "checkpoint-6 is not whole" in capsys.readouterr().out


def test_other_settings_are_refused_by_name(train, killed_after_two_epochs):
    with pytest.raises(ResumeError, match=r"learning_rate 0.001 → 0.002"):
        train(resume=True, recipe=replace(RECIPE, learning_rate=2e-3))


def test_another_start_or_other_adapters_are_refused(train, killed_after_two_epochs, examples):
    with pytest.raises(ResumeError, match="initial weights"):
        train(resume=True, adapters=True)
    with pytest.raises(ResumeError, match="method None → lora"):
        train(resume=True, about={"method": "lora"})
    examples["train"].labels[0] += 1
    with pytest.raises(ResumeError, match="pictures"):
        train(resume=True)


def test_resuming_a_finished_run_changes_nothing(train):
    """The usual reason to resume: training ended and saving a checkpoint afterwards was interrupted."""
    expected, first = train()
    found, again = train(resume=True)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert again["top1"].tolist() == first["top1"].tolist()


def test_without_resume_old_checkpoints_are_gone(train, killed_after_two_epochs):
    _, history = train()
    assert history["epoch"].tolist() == [1, 2, 3]
    assert sorted(p.name for p in killed_after_two_epochs.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-9"]


def test_training_and_validation_see_the_same_normalisation(examples, labels, tmp_path, monkeypatch):
    """The original study trained with mean and deviation 0.5 and evaluated with ImageNet's."""
    seen = {True: [], False: []}
    original = training.ImageTrainer.compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        handle = model.register_forward_pre_hook(
            lambda module, args, kwargs: seen[module.training].append(kwargs["pixel_values"]), with_kwargs=True
        )
        try:
            return original(self, model, inputs, *args, **kwargs)
        finally:
            handle.remove()

    monkeypatch.setattr(training.ImageTrainer, "compute_loss", spy)
    monkeypatch.setattr(training.preprocess, "augment", lambda batch, **_: batch)  # crops aside
    same = {"train": examples["valid"], "valid": examples["valid"]}
    network = checkpoint.new("vit-micro", image_size=32, labels=labels)
    recipe = replace(RECIPE, epochs=1)
    training.train(network, same, pre=preprocess.new(32), recipe=recipe, folder=tmp_path, device=CPU)
    order = [batch.flatten(1).sum(1).sort().values for batch in (seen[True][0], seen[False][0])]
    torch.testing.assert_close(order[0], order[1])
