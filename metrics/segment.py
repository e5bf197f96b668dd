"""Semantic segmentation: the mean over classes of intersection over union, of all images together.

    IoU_c = sum over images of |predicted c and labelled c| / sum over images of |predicted c or labelled c|

Classes that are neither labelled nor predicted in any image are left out, as are pixels labelled IGNORED.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from clipress.data.transforms import IGNORED
from clipress.metrics.outcomes import Outcomes


def confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Count pixels by label and prediction, int64 [C, C]; both are ints [H, W]."""
    counted = labels != IGNORED
    pairs = labels[counted].astype(np.int64) * classes + predicted[counted]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def score_masks(counts: Iterable[np.ndarray]) -> dict[str, Outcomes]:
    """Return mean IoU and pixel accuracy from the `confusion` of every image; images are the units of their errors."""
    table = np.stack(list(counts))  # [N, C, C]
    both = table.diagonal(axis1=1, axis2=2).astype(float)  # [N, C]
    labelled, predicted = table.sum(2), table.sum(1)
    union = labelled + predicted - both
    images, classes = both.shape
    of_image = np.repeat(np.arange(images), classes)

    def shares(weights: np.ndarray, strata: np.ndarray | None) -> Outcomes:
        values = np.divide(both, weights, out=np.zeros_like(both), where=weights > 0)
        return Outcomes(values.ravel(), strata, of_image, weights=weights.astype(float).ravel())

    return {"miou": shares(union, np.tile(np.arange(classes), images)), "pixel_accuracy": shares(labelled, None)}
