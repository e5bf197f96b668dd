"""Linear probe: logistic regression on frozen, normalised image embeddings, as in the CLIP paper.

C, the inverse penalty, is chosen on a part of the training embeddings; the test embeddings are used once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from clipress.errors import DataError
from clipress.metrics.outcomes import Outcomes
from clipress.metrics.retrieval import finite
from clipress.metrics.zeroshot import unit

CS = tuple(10.0**power for power in range(-2, 6))
HELD_OUT = 5  # every fifth image of a class is held out to choose C


def linear_probe(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray
) -> dict[str, Outcomes]:
    """Return top-1 and mean-per-class recall on the test embeddings, as `lp_top1` and `lp_mean_per_class_recall`.

    train [N, D], test [M, D]; labels [N], [M]. The result is deterministic. An image of a class missing in training is a miss.
    Raises DataError for fewer than two classes, or if no class has two images.
    """
    train, test = unit(finite(train, "training image")), unit(finite(test, "image"))
    model = _fitted(train, train_labels, chosen_c(train, train_labels))
    hits = model.predict(test) == test_labels
    return {"lp_top1": Outcomes(hits), "lp_mean_per_class_recall": Outcomes(hits, strata=test_labels)}


def chosen_c(features: np.ndarray, labels: np.ndarray) -> float:
    """Return the C with the most hits on held-out training features [N, D]; of equal ones the smallest."""
    held_out = _held_out(labels)
    if len(np.unique(labels)) < 2 or not held_out.any():
        raise DataError(
            "linear probe: expected two classes, and two images in one of them, in the training source. Use a larger one."
        )

    def hits(c: float) -> int:
        model = _fitted(features[~held_out], labels[~held_out], c)
        return int((model.predict(features[held_out]) == labels[held_out]).sum())

    return max(CS, key=hits)


def _held_out(labels: np.ndarray) -> np.ndarray:
    """Mark the second, seventh, ... image of every class: bool [N]. No class is held out entirely."""
    place = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        place[own] = np.arange(len(own))
    return place % HELD_OUT == 1


def _fitted(features: np.ndarray, labels: np.ndarray, c: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=c, max_iter=1000).fit(features, labels)
