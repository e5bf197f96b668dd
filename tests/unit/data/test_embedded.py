"""The embedded datasets: identical bytes everywhere, disjoint splits, five full captions per scene."""

import hashlib

import numpy as np
import pytest

from clipress.data import digits, scenes


def sha(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def test_the_bytes_are_the_same_on_every_machine():
    assert sha(scenes.images("test", 0)) == "2103c221cdb3f9e2"
    assert sha(scenes.images("val", 3)) == "b10835b4df3fa16e"
    assert sha(digits.digits("test")[0]) == "cad65b30c5f8d01d"
    text = "\n".join(caption for scene in scenes.scenes(0)["test"] for caption in scenes.captions(scene))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "a8a88a5c703dd199"


def test_another_seed_draws_other_scenes():
    assert scenes.scenes(0)["test"] != scenes.scenes(1)["test"]


def test_no_description_occurs_twice_in_any_split():
    splits = scenes.scenes(0)
    everything = [scene for split in splits.values() for scene in split]
    assert len(set(everything)) == len(everything) == sum(scenes.SPLITS.values())
    assert len(splits["train"]) >= 2000
    assert scenes.descriptions() >= 20_000


def test_five_different_captions_describe_the_whole_scene():
    rng = np.random.RandomState(0)
    for _ in range(200):
        scene = scenes.random_scene(rng)
        captions = scenes.captions(scene)
        assert len(set(captions)) == 5
        for caption in captions:
            assert scene.background in caption
            for shape, colour, _ in scene.objects:
                assert f"{colour} {shape}" in caption


def test_different_scenes_never_share_a_caption():
    owners: dict[str, scenes.Scene] = {}
    for split in scenes.scenes(0).values():
        for scene in split:
            for caption in scenes.captions(scene):
                assert owners.setdefault(caption, scene) == scene


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_an_object_is_drawn_where_its_caption_says(shape):
    scene = scenes.Scene("beside", "black", ((shape, "red", "large"), (shape, "blue", "small")))
    image = scenes.draw(scene, np.random.RandomState(0)).astype(int)
    red, blue = image[..., 0] - image[..., 2] > 80, image[..., 2] - image[..., 0] > 80
    assert red[:, :16].sum() > 2 * blue[:, 16:].sum() > 0  # Large on the left, small on the right.
    assert not red[:, 18:].any() and not blue[:, :14].any()


def test_digits_hold_out_a_fixed_fifth():
    train, test = digits.digits("train"), digits.digits("test")
    assert len(train[0]) + len(test[0]) == 1797 and len(test[0]) == 360
    seen = {image.tobytes() for image in train[0]}
    shared = sum(image.tobytes() in seen for image in test[0])
    assert shared == 0
    assert set(train[1]) == set(test[1]) == set(range(10))


def test_enlarging_is_catmull_rom():
    rng = np.random.default_rng(0)
    line = rng.integers(0, 256, (1, 8))

    def kernel(x):  # Keys (1981) with a = -1/2.
        x = abs(x)
        if x < 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    padded = np.concatenate([line[0, :1].repeat(2), line[0], line[0, -1:].repeat(2)])
    wanted = [sum(padded[i + 2] * kernel((out + 0.5) / 4 - 0.5 - i) for i in range(-2, 10)) for out in range(32)]
    np.testing.assert_allclose(digits.enlarge_axis(line, 1)[0] / 1024, wanted, atol=1e-9)
