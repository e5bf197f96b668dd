"""Photometric distortion of training images, as mmsegmentation does it for Segmenter (Liu et al. 2016, SSD).

Each with probability 1/2: brightness by up to 32 of 255; contrast, saturation and hue. Contrast comes before or after the other two.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

BRIGHTNESS = 32.0
FACTOR = (0.5, 1.5)  # of contrast and of saturation
HUE = 18 / 180  # of the color circle


def distorted(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return pixels uint8 [S, S, 3] with random brightness, contrast, saturation and hue."""
    shift = rng.uniform(-BRIGHTNESS, BRIGHTNESS) if rng.integers(2) else 0.0
    contrast_first, contrast, saturation = bool(rng.integers(2)), _factor(rng), _factor(rng)
    hue = rng.uniform(-HUE, HUE) if rng.integers(2) else 0.0
    pixels = _linear(pixels, 1.0, shift)
    if contrast_first:
        pixels = _linear(pixels, contrast, 0.0)
    pixels = recolored(pixels, saturation, hue)
    return pixels if contrast_first else _linear(pixels, contrast, 0.0)


def recolored(pixels: np.ndarray, saturation: float, hue: float) -> np.ndarray:
    """Return pixels with their saturation multiplied, and their hue turned by a part of the color circle."""
    if saturation == 1 and hue == 0:
        return pixels
    planes = np.asarray(Image.fromarray(pixels).convert("HSV"), np.float32)
    planes[..., 0] = (planes[..., 0] + 255 * hue) % 255
    planes[..., 1] = (planes[..., 1] * saturation).clip(0, 255)
    return np.asarray(Image.fromarray(planes.round().astype(np.uint8), "HSV").convert("RGB"), np.uint8)


def _factor(rng: np.random.Generator) -> float:
    return float(rng.uniform(*FACTOR)) if rng.integers(2) else 1.0


def _linear(pixels: np.ndarray, factor: float, shift: float) -> np.ndarray:
    return (pixels * np.float32(factor) + np.float32(shift)).clip(0, 255).astype(np.uint8)
