"""The generator of flowers: reproducible, distinct classes, no picture in two splits."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from vitlib.pictures.synthetic import classes, render

TARGET_CLASSES, PRETRAIN_CLASSES = classes("in the study"), classes("before it")
ALL_CLASSES = TARGET_CLASSES + PRETRAIN_CLASSES
PINNED_MEANS = (153.31, 169.46, 185.62)  # grey levels of R, G, B
ROOT = Path(__file__).resolve().parents[2]


def picture(flower=TARGET_CLASSES[0], *, index=0, split="train", seed=0, size=32):
    return render(flower, index=index, split=split, seed=seed, size=size)


@pytest.mark.parametrize("flower", ALL_CLASSES, ids=lambda flower: flower.key)
def test_every_class_has_pictures(flower):
    pixels = picture(flower)
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8
    assert pixels.std() > 10  # not one colour


@pytest.mark.parametrize("size", [16, 33, 224])
def test_a_picture_is_square_at_any_size(size):
    assert picture(size=size).shape == (size, size, 3)


def test_a_picture_does_not_depend_on_those_before_it():
    forward = [picture(index=index) for index in range(4)]
    backward = [picture(index=index) for index in reversed(range(4))]
    np.testing.assert_array_equal(forward, backward[::-1])


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_a_picture_is_the_same_in_another_process(hash_seed):
    code = (
        "import sys; from vitlib.pictures.synthetic import classes, render;"
        "p = render(classes('in the study')[-1], index=3, split='valid', seed=7, size=32);"
        "sys.stdout.buffer.write(p.tobytes())"
    )
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout
    assert found == picture(TARGET_CLASSES[-1], index=3, split="valid", seed=7).tobytes()


def test_no_two_pictures_are_equal():
    """Neither in one split nor between splits, seeds or classes."""
    choices = list(product(TARGET_CLASSES[:2], ("train", "valid", "test"), (0, 1), range(12)))
    distinct = {picture(flower, split=s, seed=seed, index=i, size=16).tobytes() for flower, s, seed, i in choices}
    assert len(distinct) == len(choices)


@pytest.mark.parametrize("change", [{"split": "valid"}, {"index": 1}, {"seed": 1}, {"key": "twin"}])
def test_pose_and_light_follow_every_argument(change):
    """More than noise changes; a class of another name has its own poses."""
    flower = TARGET_CLASSES[0]._replace(key=change["key"]) if "key" in change else TARGET_CLASSES[0]
    other = picture(flower, **{name: value for name, value in change.items() if name != "key"})
    assert np.abs(picture().astype(int) - other).mean() > 5


def test_the_means_of_one_picture_are_pinned():
    """A tolerance of one grey level lets float rounding of another platform pass, and no other change."""
    means = picture(split="test", size=64).mean(axis=(0, 1))
    np.testing.assert_allclose(means, PINNED_MEANS, atol=1.0)


def test_classes_are_distinct_and_pretraining_has_every_family_of_the_target():
    assert (len(TARGET_CLASSES), len(PRETRAIN_CLASSES)) == (18, 30)
    for trait in (lambda f: f.key, lambda f: f.name, lambda f: (f.family, f.petals, f.colour)):
        assert len({trait(flower) for flower in ALL_CLASSES}) == len(ALL_CLASSES)
    assert {f.family for f in TARGET_CLASSES} <= {f.family for f in PRETRAIN_CLASSES}


@pytest.mark.parametrize("change", [{"petals": 9}, {"family": "daisy"}, {"colour": "red"}, {"base": "red"}])
def test_every_trait_of_a_class_changes_its_pictures(change):
    """With the same key, pose and background are the same: the difference is the trait."""
    changed = TARGET_CLASSES[0]._replace(**change)
    assert np.abs(picture().astype(int) - picture(changed)).mean() > 0.5


@pytest.mark.parametrize("change", [{"split": "dev"}, {"index": -1}, {"seed": -1}, {"size": 8}])
def test_a_bad_argument_is_an_error(change):
    (name, value) = next(iter(change.items()))
    with pytest.raises(ValueError, match=f"{name} {value!r}"):
        picture(**change)
