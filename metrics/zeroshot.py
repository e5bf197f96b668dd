"""Zero-shot classification on embeddings, by CLIP's protocol: templates are averaged per class on the unit sphere."""

from __future__ import annotations

import numpy as np

from clipress.metrics.retrieval import finite


def unit(x: np.ndarray) -> np.ndarray:
    """L2-normalise the last axis."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def class_embeddings(prompts: np.ndarray) -> np.ndarray:
    """Average unit prompt embeddings [C, T, D] over templates and normalise: [C, D]."""
    return unit(unit(prompts).mean(axis=1))


def topk_accuracy(
    images: np.ndarray, classes: np.ndarray, labels: np.ndarray, ks: tuple[int, ...] = (1, 5)
) -> dict[str, float]:
    """Return top-k accuracy in percent; a tie with a wrong class counts against the model.

    images [N, D], classes [C, D], L2-normalised; labels [N]. A k that exceeds C is left out.
    """
    scores = finite(images, "image") @ finite(classes, "class").T  # [N, C]
    of_label = scores[np.arange(len(labels)), labels][:, None]
    rank = (scores >= of_label).sum(1) - 1
    return {f"top{k}": 100.0 * float((rank < k).mean()) for k in ks if k <= len(classes)}
