"""BLIP's random operations are Pillow's with the published parameters, and are drawn as often as published."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image

from clipress.data import blip_augment
from clipress.data.auto_augment import auto_augmented
from clipress.data.blip_augment import OPERATIONS, blip_augmented, changed
from clipress.data.transforms import Augment, Preprocess

SIGNS = (1, -1)


@pytest.fixture(scope="module")
def pixels():
    return np.ascontiguousarray(load_sample_image("flower.jpg")[100:164, 200:264]) // 2 + 40


def bilinear(pixels, rows):
    """Sample pixels where `rows` say, in whole pixels from the first one's centre; NaN where that needs pixels outside."""
    height, width, _ = pixels.shape
    y, x = np.mgrid[:height, :width].astype(float)
    sx, sy = (a * x + b * y + c for a, b, c in rows)
    left, top = np.floor(sx).astype(int), np.floor(sy).astype(int)
    inside = (left >= 0) & (top >= 0) & (left + 1 < width) & (top + 1 < height)
    found = np.zeros(pixels.shape)
    for down in (0, 1):
        for right in (0, 1):
            share = np.where(right, sx - left, 1 - sx + left) * np.where(down, sy - top, 1 - sy + top)
            rows_, columns = (top + down).clip(0, height - 1), (left + right).clip(0, width - 1)
            found += share[..., None] * pixels[rows_, columns]
    return np.where(inside[..., None], found, np.nan)


def assert_close(found, wanted):
    inside = ~np.isnan(wanted)
    assert inside.mean() > 0.6 and abs(found[inside] - wanted[inside]).max() <= 1.01


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("operation", ["identity", "brightness", "sharpness"])
def test_some_operations_do_nothing_at_this_strength(pixels, operation, sign):
    assert changed(pixels, operation, sign) is pixels


def test_contrast_and_equalisation_are_pillow_s_per_channel(pixels):
    planes = [Image.fromarray(plane) for plane in np.moveaxis(pixels, 2, 0)]
    for operation, theirs in (("autocontrast", ImageOps.autocontrast), ("equalize", ImageOps.equalize)):
        wanted = np.stack([np.asarray(theirs(plane)) for plane in planes], 2)
        found = changed(pixels, operation, 1)
        np.testing.assert_array_equal(found, wanted)
        assert not np.array_equal(found, pixels)


@pytest.mark.parametrize("sign", SIGNS)
def test_translations_are_five_pixels_with_grey_behind(pixels, sign):
    for axis, operation in ((1, "translate-x"), (0, "translate-y")):
        wanted = np.roll(pixels, 5 * sign, axis)
        edge = slice(None, 5) if sign > 0 else slice(-5, None)
        wanted[(slice(None), edge) if axis else edge] = 128
        np.testing.assert_array_equal(changed(pixels, operation, sign), wanted)


@pytest.mark.parametrize("sign", SIGNS)
def test_a_shear_moves_row_y_by_15_hundredths_of_y(pixels, sign):
    assert_close(changed(pixels, "shear-x", sign), bilinear(pixels, [(1, -0.15 * sign, 0), (0, 1, 0)]))
    assert_close(changed(pixels, "shear-y", sign), bilinear(pixels, [(1, 0, 0), (-0.15 * sign, 1, 0)]))
    outside = changed(pixels, "shear-x", 1)[-1, :9]
    assert (outside == 128).all()


@pytest.mark.parametrize("sign", SIGNS)
def test_a_rotation_is_pillow_s_by_15_degrees_about_the_middle(pixels, sign):
    found = changed(pixels, "rotate", sign)
    theirs = Image.fromarray(pixels).rotate(
        15 * sign, Image.Resampling.BILINEAR, center=(32.5, 32.5), fillcolor=(128,) * 3
    )
    assert abs(found.astype(int) - np.asarray(theirs)).max() <= 1
    assert (found[0, 0] == 128).all() and not np.array_equal(found, pixels)


def test_two_of_ten_are_drawn_each_with_probability_one_half_and_any_sign(pixels, monkeypatch):
    done = []
    monkeypatch.setattr(blip_augment, "changed", lambda rows, name, sign: done.append((name, sign)) or rows)
    for seed in range(4000):
        blip_augmented(pixels, np.random.default_rng(seed))
    names, signs = Counter(name for name, _ in done), Counter(sign for _, sign in done)
    assert names.keys() == set(OPERATIONS) and len(OPERATIONS) == 10
    assert abs(len(done) - 4000) < 4 * (8000 / 4) ** 0.5
    assert all(abs(count - 400) < 4 * 20 for count in names.values()) and abs(signs[1] - signs[-1]) < 4 * 4000**0.5


def test_it_is_one_of_the_named_policies(pixels):
    augment, made = Augment(auto_augment="blip"), Preprocess(size=64)
    assert not augment.is_view
    for seed in range(8):
        found = auto_augmented(pixels, augment.auto_augment, made, np.random.default_rng(seed))
        np.testing.assert_array_equal(found, blip_augmented(pixels, np.random.default_rng(seed)))
