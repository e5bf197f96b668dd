"""*digits*: scikit-learn's bundled scans of handwritten digits, enlarged to 32 x 32 RGB. Real images, ten classes.

The scans are enlarged four times with Catmull-Rom, whose weights are multiples of 1/1024: integer arithmetic gives the
same bytes on every machine. A fixed fifth, every fifth image, is held out.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

SIZE = 32
CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a photo of the number {}",
    "a handwritten {}",
    "the digit {}",
    "a scan of the digit {}",
    "the number {} written by hand",
)


def enlarge_axis(images: np.ndarray, axis: int) -> np.ndarray:
    """Enlarge one axis by four with Catmull-Rom weights; int64 in and out, the result scaled by 1024."""
    moved = np.moveaxis(images, axis, -1)
    padded = np.concatenate([moved[..., :1]] * 2 + [moved] + [moved[..., -1:]] * 2, axis=-1)
    n = moved.shape[-1]
    out = np.empty((*moved.shape[:-1], 4 * n), np.int64)
    for phase, eighths in enumerate((-3, -1, 1, 3)):  # offset of the output pixel from the input pixel's centre
        base, t = (-1, eighths + 8) if eighths < 0 else (0, eighths)  # t: eighths past the pixel to the left
        weights = (
            -t * t * t + 16 * t * t - 64 * t,  # 1024 * Catmull-Rom at t / 8
            3 * t * t * t - 40 * t * t + 1024,
            -3 * t * t * t + 32 * t * t + 64 * t,
            t * t * t - 8 * t * t,
        )
        out[..., phase::4] = sum(
            w * padded[..., 2 + base + k : 2 + base + k + n] for k, w in zip((-1, 0, 1, 2), weights, strict=True)
        )
    return np.moveaxis(out, -1, axis)


@lru_cache(maxsize=1)
def _all() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    bundle = load_digits()
    grey = (bundle.images.astype(np.int64) * 255) // 16  # [1797, 8, 8]
    large = enlarge_axis(enlarge_axis(grey, 1), 2) >> 20
    pixels = large.clip(0, 255).astype(np.uint8)
    return np.repeat(pixels[..., None], 3, axis=-1), bundle.target.astype(np.int64)


def digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a split's images, uint8 [N, 32, 32, 3], and labels, int64 [N]. val and test are the held-out fifth."""
    images, labels = _all()
    held_out = np.arange(len(labels)) % 5 == 0
    keep = ~held_out if split == "train" else held_out
    return images[keep], labels[keep]
