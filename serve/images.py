"""Images as callers have them, and the pixels that a graph takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from clipress.data.transforms import Preprocess, fitted, normalised, open_image, upright_rgb
from clipress.errors import DataError

ImageFile = str | Path | bytes
"""A path, or the content of an image file."""
ImageLike = ImageFile | Image.Image | np.ndarray
"""A path, the content of an image file, a Pillow image, or uint8 pixels [H, W, 3] in RGB."""


def is_one(images: ImageLike | Sequence[ImageLike]) -> bool:
    """Return whether this is a single image."""
    if isinstance(images, np.ndarray):
        return images.ndim != 4
    return isinstance(images, str | Path | bytes | Image.Image)


def as_list(images: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    """Return one image or several as a list."""
    return [images] if is_one(images) else list(images)


def opened(image: ImageLike) -> Image.Image | np.ndarray:
    """Return an image upright and in RGB. Raises DataError for one that cannot be read."""
    if isinstance(image, Image.Image):
        return upright_rgb(image)
    if not isinstance(image, np.ndarray):
        return open_image(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise DataError(
            f"Image array: expected uint8 [H, W, 3] in RGB, found {image.dtype} {list(image.shape)}. Convert it first."
        )
    return image


def pixels_of(images: Sequence[ImageLike], preprocess: Preprocess) -> np.ndarray:
    """Return a graph's input, float32 [N, 3, S, S]. Raises DataError for an image that cannot be read."""
    return normalised(np.stack([fitted(opened(image), preprocess) for image in images]), preprocess)
