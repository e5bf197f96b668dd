"""Images of any size are segmented as torch's bilinear interpolation and Segmenter's windows do."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clipress.data.transforms import Preprocess
from clipress.metrics.windows import SCALES, enlarged, segmented, starts

HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear"}


@pytest.mark.parametrize(("before", "after"), [((4, 6), (64, 96)), ((32, 32), (20, 45)), ((1, 3), (5, 3))])
def test_scores_are_enlarged_as_in_torch(before, after):
    scores = np.random.default_rng(0).standard_normal((3, *before)).astype(np.float32)
    wanted = F.interpolate(torch.from_numpy(scores)[None], size=after, mode="bilinear", align_corners=False)[0]
    np.testing.assert_allclose(enlarged(scores, after), wanted.numpy(), atol=1e-5)


def test_windows_lie_480_of_512_pixels_apart_and_the_last_one_at_the_border():
    assert [*starts(512, 512)] == [0] and [*starts(1024, 512)] == [0, 480, 512] and [*starts(530, 512)] == [0, 18]
    assert [*starts(992, 512)] == [0, 480]


def brightest(pixels):
    """Score three classes by the colour of every patch of 4 x 4 pixels."""
    batch, _, size, _ = pixels.shape
    return 9 * pixels.reshape(batch, 3, size // 4, 4, size // 4, 4).mean((3, 5))


@pytest.mark.parametrize("size", [(64, 64), (150, 70), (40, 90), (21, 20)])
@pytest.mark.parametrize("more", [{}, {"scales": SCALES, "mirror": True}])
def test_every_pixel_of_an_image_gets_the_class_of_its_place(size, more):
    width, height = size
    pixels = np.full((height, width, 3), 40, np.uint8)
    pixels[:, : width // 3, 0] = 220
    pixels[: height // 2, width // 3 :, 1] = 220
    pixels[height // 2 :, width // 3 :, 2] = 220
    found = segmented(Image.fromarray(pixels), brightest, Preprocess(size=64, **HALF), **more)
    assert found.shape == (height, width)
    assert (found == pixels.argmax(-1)).mean() > 0.9


def test_windows_are_averaged_where_they_overlap():
    def constant(pixels):
        seen.append(len(pixels))
        scores = np.zeros((len(pixels), 2, 4, 4), np.float32)
        scores[:, 1] = pixels.mean((1, 2, 3))[:, None, None]
        return scores

    seen = []
    image = Image.fromarray(np.full((64, 200, 3), 200, np.uint8))
    assert (segmented(image, constant, Preprocess(size=64, **HALF)) == 1).all()
    assert sum(seen) == len([*starts(200, 64)])
