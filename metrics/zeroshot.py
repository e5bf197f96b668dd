"""Zero-shot classification on embeddings, by CLIP's protocol: templates are averaged per class on the unit sphere."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from clipress.data.prompts import prompts_by_class
from clipress.metrics import classify
from clipress.metrics.classify import check_labels_in_range, score_ranks
from clipress.metrics.outcomes import Outcomes
from clipress.metrics.retrieval import finite, ranks


def unit(x: np.ndarray) -> np.ndarray:
    """L2-normalise the last axis."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def class_embeddings(prompts: np.ndarray) -> np.ndarray:
    """Average prompt embeddings [C, T, D] over templates on the unit sphere, and normalise: [C, D]."""
    return unit(unit(prompts).mean(axis=1))


def embed_labels(
    encode: Callable[[list[str]], np.ndarray], labels: Sequence[str], templates: Sequence[str]
) -> np.ndarray:
    """Return the embeddings of labels in prompt templates: unit rows float32 [C, D].

    `encode` turns texts into embeddings [N, D] of any length; it gets all prompts at once, those of a label in a row.
    Raises ArtifactError for embeddings that are not finite.
    """
    prompts = [text for _, texts in prompts_by_class(labels, templates) for text in texts]
    embeds = finite(np.asarray(encode(prompts)), "text")
    return class_embeddings(embeds.reshape(len(labels), len(templates), -1))


def label_probabilities(
    cosines: np.ndarray, logit_scale: float, logit_bias: float | None, softmax: bool = False
) -> np.ndarray:
    """Return the probabilities [N, C] of labels by the cosines [N, C] of images and labels.

    With a bias every label has its own, sigmoid(scale * cosine + bias), as a SigLIP is trained (Zhai et al. 2023). Without one, or with
    `softmax`, they are a softmax over the labels, and rows sum to 1; a bias would shift all of them alike.
    """
    logits = logit_scale * cosines
    if logit_bias is None or softmax:
        return classify.softmax(logits)
    return classify.sigmoid(logits + np.float32(logit_bias))


def classification(
    images: np.ndarray,
    classes: np.ndarray,
    labels: np.ndarray,
    seen: Collection[int] = (),
    ks: tuple[int, ...] = (1, 5),
) -> dict[str, Outcomes]:
    """Return the metrics of `classify.score_ranks` for images [N, D] and classes [C, D], L2-normalised, and labels [N].

    Equal class embeddings tie, wherever they stand. Raises ArtifactError for embeddings that are not finite, DataError for
    a label outside 0 to C - 1.
    """
    images, classes = finite(images, "image"), finite(classes, "class")
    check_labels_in_range(labels, len(classes))
    return score_ranks(ranks(images, classes, labels, np.arange(len(classes))), labels, len(classes), seen, ks)
