"""Zero-shot classification on embeddings, by CLIP's protocol: templates are averaged per class on the unit sphere."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from clipress.errors import DataError
from clipress.metrics.outcomes import Outcomes
from clipress.metrics.retrieval import finite, ranks


def unit(x: np.ndarray) -> np.ndarray:
    """L2-normalise the last axis."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def class_embeddings(prompts: np.ndarray) -> np.ndarray:
    """Average unit prompt embeddings [C, T, D] over templates and normalise: [C, D]."""
    return unit(unit(prompts).mean(axis=1))


def classification(
    images: np.ndarray,
    classes: np.ndarray,
    labels: np.ndarray,
    seen: Collection[int] = (),
    ks: tuple[int, ...] = (1, 5),
) -> dict[str, Outcomes]:
    """Return top-k and mean-per-class recall; a tie with a wrong class counts against the model.

    images [N, D], classes [C, D], L2-normalised; labels [N], which need not name every class. A k above C is left out;
    a class without images has no part in the mean. With `seen`, the classes training saw: top-1 on images of those, of
    the others, both among all classes, and their harmonic mean (generalised zero-shot, Xian et al. 2018, there per class).
    Raises DataError for a label that is no class.
    """
    images, classes = finite(images, "image"), finite(classes, "class")
    if not 0 <= labels.min() <= labels.max() < len(classes):
        raise DataError(f"Labels {labels.min()} to {labels.max()} were given; there are {len(classes)} classes.")
    found = ranks(images, classes, labels, np.arange(len(classes)))
    rank, tied = found.pessimistic, found.tied
    result = {f"top{k}": Outcomes(rank < k, tied=tied) for k in ks if k <= len(classes)}
    result["mean_per_class_recall"] = Outcomes(rank < 1, strata=labels, tied=tied)
    if seen:
        result |= _generalised(rank < 1, np.isin(labels, list(seen)))
    return result


def _generalised(hits: np.ndarray, seen: np.ndarray) -> dict[str, Outcomes]:
    """Tell hits on images of seen and of unseen classes apart; what has no images is left out."""
    parts = {"seen_top1": seen, "unseen_top1": ~seen}
    result = {name: Outcomes(hits[part]) for name, part in parts.items() if part.any()}
    if len(result) == 2:
        result["harmonic_top1"] = Outcomes(hits, strata=seen.astype(np.int64), combine="harmonic")
    return result
