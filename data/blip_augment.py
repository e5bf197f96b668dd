"""BLIP's random operations on a training image: two draws out of ten, each done with probability one half.

Brightness and sharpness are drawn too, and change nothing at BLIP's strength, which is the middle of their range. Source: BLIP's
`RandomAugment(2, 5)` (Li et al. 2022), after RandAugment (Cubuk et al. 2020). It computes with OpenCV, this with Pillow: what comes into
the image from outside is not blended at the border.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageOps

OPERATIONS = (
    *("identity", "autocontrast", "brightness", "sharpness", "equalize"),
    *("shear-x", "shear-y", "translate-x", "translate-y", "rotate"),
)
DRAWS, PROBABILITY = 2, 0.5
SHEAR, PIXELS, DEGREES = 0.15, 5.0, 15.0  # each with a random sign
FILL = (128, 128, 128)

Rows = tuple[tuple[float, float, float], tuple[float, float, float]]


def blip_augmented(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return pixels uint8 [H, W, 3] after the operations that were drawn."""
    for place in rng.integers(len(OPERATIONS), size=DRAWS):
        if rng.random() < PROBABILITY:
            pixels = changed(pixels, OPERATIONS[place], 1 if rng.random() < 0.5 else -1)
    return pixels


def changed(pixels: np.ndarray, operation: str, sign: int) -> np.ndarray:
    """Return pixels uint8 [H, W, 3] after one of OPERATIONS."""
    if operation in ("identity", "brightness", "sharpness"):
        return pixels
    image = Image.fromarray(pixels)
    if operation == "autocontrast":
        return np.asarray(ImageOps.autocontrast(image), np.uint8)
    if operation == "equalize":
        return np.asarray(ImageOps.equalize(image), np.uint8)
    return np.asarray(_moved(image, _source_of(operation, sign, image.size)), np.uint8)


def _source_of(operation: str, sign: int, size: tuple[int, int]) -> Rows:
    """Return the affine map from a pixel of the result to where it comes from, both counted from the centre of the first pixel."""
    kind, _, axis = operation.partition("-")
    if kind == "shear":
        reach = -sign * SHEAR
        return ((1, reach, 0), (0, 1, 0)) if axis == "x" else ((1, 0, 0), (reach, 1, 0))
    if kind == "translate":
        reach = -sign * PIXELS
        return ((1, 0, reach), (0, 1, 0)) if axis == "x" else ((1, 0, 0), (0, 1, reach))
    cos, sin = math.cos(math.radians(sign * DEGREES)), math.sin(math.radians(sign * DEGREES))
    x, y = (side / 2 for side in size)  # half a pixel beside the image's centre, as in OpenCV's words
    return (cos, -sin, x - cos * x + sin * y), (sin, cos, y - sin * x - cos * y)


def _moved(image: Image.Image, rows: Rows) -> Image.Image:
    """Return an image whose pixels come from an affine map of their places; Pillow counts places from the image's edge."""
    data = [value for a, b, c in rows for value in (a, b, c + 0.5 - (a + b) / 2)]
    return image.transform(image.size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR, fillcolor=FILL)
