"""Segment an image of any size with a model of one size: windows that overlap, enlarged and averaged.

As in Segmenter (Strudel et al. 2021): the short side becomes the model's size, windows lie 15/16 of it apart and the last one at the
border; where they overlap, scores are averaged. Of several variants (sizes, mirror images) the probabilities are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np
from PIL import Image

from clipress.data.transforms import Preprocess, normalised
from clipress.metrics.classify import softmax
from clipress.metrics.retrieval import finite

Scores = Callable[[np.ndarray], np.ndarray]
"""Pixels float32 [B, 3, S, S] -> scores of patches [B, C, h, w]."""
LONGEST = 4  # the long side of an image, in short sides of the model; longer images are squeezed
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of multi-scale evaluation, each also mirrored
BATCH = 8  # windows at a time
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def segmented(
    image: Image.Image, run: Scores, preprocess: Preprocess, scales: Sequence[float] = (1.0,), mirror: bool = False
) -> np.ndarray:
    """Return the class of every pixel, int64 [H, W]. Raises ArtifactError for scores that are not finite."""
    total: np.ndarray | None = None
    for scale in scales:
        for flip in (False, True) if mirror else (False,):
            shown = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image
            scores = enlarged(_scores(_scaled(shown, preprocess, scale), run, preprocess), (image.height, image.width))
            scores = softmax(np.moveaxis(scores[..., ::-1] if flip else scores, 0, -1))
            total = scores if total is None else total + scores
    return total.argmax(-1)


def _scaled(image: Image.Image, preprocess: Preprocess, scale: float) -> Image.Image:
    """Resize an image to a multiple of the model's size, its short side at least to that."""
    short, longest = round(preprocess.size * scale), round(preprocess.size * LONGEST * scale)
    ratio = min(short / min(image.size), longest / max(image.size))
    ratio = max(ratio, preprocess.size / min(image.size))
    size = tuple(max(round(side * ratio), preprocess.size) for side in image.size)
    return image.resize(size, _FILTERS[preprocess.interpolation])


def _scores(image: Image.Image, run: Scores, preprocess: Preprocess) -> np.ndarray:
    """Return the mean scores of all windows, [C, H, W]."""
    size, pixels = preprocess.size, np.asarray(image, np.uint8)
    height, width = pixels.shape[:2]
    places = [(top, left) for top in starts(height, size) for left in starts(width, size)]
    total, times = None, np.zeros((height, width), np.float32)
    for first in range(0, len(places), BATCH):
        part = places[first : first + BATCH]
        windows = np.stack([pixels[top : top + size, left : left + size] for top, left in part])
        found = finite(run(normalised(windows, preprocess)), "image", "scores")
        for (top, left), scores in zip(part, found, strict=True):
            if total is None:
                total = np.zeros((len(scores), height, width), np.float32)
            total[:, top : top + size, left : left + size] += enlarged(scores, (size, size))
            times[top : top + size, left : left + size] += 1
    return total / times


def starts(side: int, size: int) -> Iterator[int]:
    """Yield where windows of a size begin on a side that is at least as long."""
    step = max(size - size // 16, 1)
    yield from range(0, side - size, step)
    yield side - size


def enlarged(scores: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize scores [C, h, w] to [C, H, W] bilinearly, as torch does without aligned corners."""
    rows, columns = (_weights(before, after) for before, after in zip(scores.shape[1:], size, strict=True))
    return rows @ scores.astype(np.float32) @ columns.T


@lru_cache(maxsize=64)
def _weights(before: int, after: int) -> np.ndarray:
    """Return the weights of linear interpolation, float32 [after, before]."""
    place = np.clip((np.arange(after) + 0.5) * before / after - 0.5, 0, before - 1)
    low = np.floor(place).astype(int)
    high, part = np.minimum(low + 1, before - 1), place - low
    weights = np.zeros((after, before), np.float32)
    np.add.at(weights, (np.arange(after), low), 1 - part)
    np.add.at(weights, (np.arange(after), high), part)
    return weights
