"""Photometric distortion: what each operation does, against colorsys, and what is drawn."""

import colorsys

import numpy as np
import pytest

from clipress.data.auto_augment import auto_augmented
from clipress.data.photometric import distorted, recolored
from clipress.data.transforms import Augment, Preprocess
from clipress.errors import RecipeError

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize(("saturation", "hue"), [(0.5, 0.0), (1.4, 0.0), (1.0, 0.1), (1.0, -0.1), (1.3, 0.05)])
def test_saturation_and_hue_change_as_in_colorsys(saturation, hue):
    def changed(pixel):
        h, s, v = colorsys.rgb_to_hsv(*(pixel / 255))
        return [255 * part for part in colorsys.hsv_to_rgb((h + hue) % 1, min(s * saturation, 1), v)]

    expected = np.asarray([[changed(pixel) for pixel in row] for row in PIXELS])
    assert np.abs(recolored(PIXELS, saturation, hue) - expected).mean() < 3  # hues and saturations have 8 bits


def test_what_is_not_drawn_changes_nothing_and_all_of_it_depends_on_the_generator():
    kinds = [distorted(PIXELS, np.random.default_rng(seed)) for seed in range(200)]
    same = [np.array_equal(found, PIXELS) for found in kinds]
    assert 1 <= sum(same) <= 40  # each of four is left out half of the time
    np.testing.assert_array_equal(
        kinds[3], auto_augmented(PIXELS, "photometric", Preprocess(size=8), np.random.default_rng(3))
    )
    means = np.asarray([found.mean() for found in kinds]) - PIXELS.mean()
    assert abs(means.mean()) < 8 and means.std() > 8


def test_a_region_is_chosen_by_one_setting():
    with pytest.raises(RecipeError, match="expected crop_scale or zoom, which both choose a region, found both"):
        Augment(zoom=(0.5, 2), crop_scale=(0.5, 1))
