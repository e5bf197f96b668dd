"""timm's policies change images as timm does, drawn from our generators."""

import random

import numpy as np
import pytest
from sklearn.datasets import load_sample_image

from clipress.data.auto_augment import auto_augmented
from clipress.data.dataset import TrainingSet
from clipress.data.sampler import Batches, Draw
from clipress.data.sources import open_source
from clipress.data.spec import SourceSpec
from clipress.data.transforms import Augment, Preprocess
from clipress.errors import DataError, RecipeError

PREPROCESS = Preprocess(size=64)
POLICIES = ["rand-m9-mstd0.5-inc1", "rand-m5-n2", "augmix-m3-w2", "original", "v0-mstd0.5", "3a"]


@pytest.fixture(scope="module")
def pixels():
    return np.ascontiguousarray(load_sample_image("flower.jpg")[100:164, 200:264])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_is_timm_s_and_leaves_the_global_generators_alone(pixels, policy):
    from timm.data import create_transform

    random.seed(5)
    before = random.getstate(), np.random.get_state()[1].copy()
    found = [auto_augmented(pixels, policy, PREPROCESS, np.random.default_rng(seed)) for seed in range(12)]
    assert random.getstate() == before[0] and np.array_equal(np.random.get_state()[1], before[1])
    again = auto_augmented(pixels, policy, PREPROCESS, np.random.default_rng(3))
    assert np.array_equal(found[3], again) and again.shape == (64, 64, 3) and again.dtype == np.uint8
    assert len({one.tobytes() for one in found}) >= 3
    theirs = create_transform(
        64, is_training=True, auto_augment=policy, interpolation="bicubic", mean=PREPROCESS.mean, std=PREPROCESS.std
    )
    (own,) = [one for one in theirs.transforms if "ugment" in type(one).__name__ or "AugMix" in type(one).__name__]
    seed = int(np.random.default_rng(3).integers(1 << 32))
    random.seed(seed)
    np.random.seed(seed)
    from PIL import Image

    np.testing.assert_array_equal(np.asarray(own(Image.fromarray(pixels))), again)


@pytest.mark.parametrize("policy", ["rand-q9", "rand--m9", "random", "augmix-n3", "v0-m3", "rand-m9; rm"])
def test_an_unknown_policy_is_refused(policy):
    with pytest.raises(RecipeError, match=r"auto_augment: expected a policy in timm's words"):
        Augment(auto_augment=policy)


def digits_set(augment, **more):
    source = open_source(SourceSpec(format="digits", limit=16))
    return TrainingSet([source], Preprocess(size=32), None, augment, 0, **more)


def test_every_showing_of_an_image_is_augmented_anew():
    made = digits_set(Augment(auto_augment="rand-m9"))
    first, again, other = (made.__getitems__([Draw(0, 3, epoch)])["pixels"] for epoch in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_repeats_show_every_image_several_times_in_a_row_and_leave_an_epoch_as_long():
    plain, repeated = (Batches([10], [1.0], 5, 6, 0, repeats=repeats) for repeats in (1, 3))
    draws = [draw for step in range(6) for draw in repeated.at(step)]
    order = [draw.index for step in range(2) for draw in plain.at(step)]
    assert [draw.index for draw in draws] == [index for index in order for _ in range(3)]
    assert [draw.epoch for draw in draws[:4]] == [0, 1, 2, 0] and len(
        {(draw.index, draw.epoch) for draw in draws}
    ) == 30


def test_a_teacher_with_another_size_cannot_see_what_changes_pixels():
    with pytest.raises(DataError, match="teacher and student must have the same preprocessing"):
        digits_set(Augment(auto_augment="rand-m9"), of_teachers=[Preprocess(size=48)])
