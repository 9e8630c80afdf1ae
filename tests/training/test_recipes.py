"""Recipes start from one network and one head, train what they say, and their memory is counted part by part."""

import pytest
import torch

from vitlib.network import quantize
from vitlib.pictures import preprocess, sources
from vitlib.study import files, params
from vitlib.study.study import Study
from vitlib.training import recipes


@pytest.fixture(scope="module")
def compared(checkpoints, tmp_path_factory):
    """All recipes on 16 drawn pictures: the study, its record, and each recipe's head before and after."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "project_root", lambda: tmp_path_factory.mktemp("project"))
        chosen = {"base_model": str(checkpoints / "merged"), "image_size": 32, "pictures_per_class": 4, "limit": 18}
        chosen |= {"epochs": 1, "train_batch_size": 9, "precision": "fp32", "recipes": list(params.RECIPES)}
        study, heads = Study.of(params.check({"study": "unit", **chosen})), []
        fit = recipes.fit

        def spy(study, model, *given, **options):
            heads.append([_head(model)])
            history = fit(study, model, *given, **options)
            heads[-1].append(_head(model))
            return history

        patch.setattr(recipes, "fit", spy)
        dataset = sources.load(study.settings)
        decoded = sources.decode_splits(dataset, ("train", "valid"), preprocess.new(32), 1)
        frame = recipes.compare(study, dataset, decoded)
        return study.read("recipes"), frame.set_index("recipe"), dict(zip(params.RECIPES, heads, strict=True))


def _head(model):
    """The weights of the head that computes."""
    states = {name: value for name, value in model.state_dict().items() if name.endswith("weight")}
    names = [name for name in states if quantize.CLASSIFIER in name and "original_module" not in name]
    return states[names[0]].float().clone()


def test_all_start_from_one_head_and_only_the_frozen_one_keeps_it(compared):
    heads = compared[2]
    first = heads["head"][0]
    assert first.std() > 0 and all(torch.equal(before, first) for before, _ in heads.values())
    assert [name for name, (before, after) in heads.items() if torch.equal(before, after)] == ["lora-frozen-head"]


def test_each_trains_what_it_says_and_memory_is_counted_by_part(compared):
    written, rows, _ = compared
    assert list(written["recipe"]) == list(recipes.WAYS) == list(params.RECIPES)
    adapters, head = 4 * 8 * (4 * (128 + 128) + 2 * (128 + 512)), 128 * 18 + 18
    assert rows["trainable"][:4].tolist() == [head, adapters, adapters + head, adapters + head]
    assert (rows["gradients_mb"] * 2**20 == 4 * rows["trainable"]).all()
    assert (rows["optimizer_mb"] / rows["gradients_mb"]).between(2, 2.05).all()  # two states, and a count of steps
    assert rows["weights_mb"]["full"] == pytest.approx(rows["gradients_mb"]["full"])
    assert rows["weights_mb"]["qlora"] < rows["weights_mb"]["lora"] / 3
    assert rows[["activations_mb", "peak_mb"]].isna().all(axis=None)  # without a GPU
    assert rows["learning_rate"].tolist() == pytest.approx([0.03, 0.003, 0.003, 0.003, 0.0003])


def test_activations_are_what_the_peak_has_beyond_the_rest():
    memory = recipes.Memory(torch.nn.Linear(1, 1))
    memory.parts, memory.resident = {"weights_mb": 80.0, "gradients_mb": 4.0, "optimizer_mb": 8.0}, 300.0
    assert memory.split(1300.0) == {**memory.parts, "activations_mb": 1000.0, "peak_mb": 1092.0}
