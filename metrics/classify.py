"""Classification metrics from logits, whatever computed them: a classifier's head, or similarities to class embeddings."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from clipress.errors import DataError
from clipress.metrics.outcomes import Outcomes
from clipress.metrics.retrieval import Ranks, finite


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities over the last axis, in the type of the logits."""
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Return the probability of every logit by itself, in the type of the logits."""
    return 0.5 * (1 + np.tanh(0.5 * logits))


def score_logits(
    logits: np.ndarray, labels: np.ndarray, seen: Collection[int] = (), ks: tuple[int, ...] = (1, 5)
) -> dict[str, Outcomes]:
    """Return the metrics of `score_ranks` for logits [N, C] and labels [N].

    Raises ArtifactError for logits that are not finite, DataError for a label outside 0 to C - 1.
    """
    check_labels_in_range(labels, logits.shape[1])
    logits = finite(logits, "logit", "rows")
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    pessimistic, optimistic = (logits >= own).sum(1) - 1, (logits > own).sum(1)
    return score_ranks(Ranks(pessimistic, optimistic), labels, logits.shape[1], seen, ks)


def score_ranks(
    ranks: Ranks, labels: np.ndarray, classes: int, seen: Collection[int] = (), ks: tuple[int, ...] = (1, 5)
) -> dict[str, Outcomes]:
    """Return top-k and mean-per-class recall from the rank of each item's own class among all classes.

    A tie with a wrong class counts against the model. A k larger than the number of classes is left out; a class without
    items is not part of the mean. `seen` are the classes seen in training: with them, also top-1 on items of seen
    classes, on items of unseen ones, each among all classes, and their harmonic mean (generalised zero-shot, Xian et al.
    2018, there per class).
    """
    hits, tied = ranks.pessimistic < 1, ranks.tied
    result = {f"top{k}": Outcomes(ranks.pessimistic < k, tied=tied) for k in ks if k <= classes}
    result["mean_per_class_recall"] = Outcomes(hits, strata=labels, tied=tied)
    return result | (_generalised(hits, np.isin(labels, list(seen))) if seen else {})


def check_labels_in_range(labels: np.ndarray, classes: int) -> None:
    """Raise DataError for a label outside 0 to classes - 1."""
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise DataError(
            f"labels: expected 0 to {classes - 1}, found {labels.min()} to {labels.max()}. Check the classes."
        )


def _generalised(hits: np.ndarray, seen: np.ndarray) -> dict[str, Outcomes]:
    """Separate hits on items of seen and of unseen classes; a part without items is left out."""
    parts = {"seen_top1": seen, "unseen_top1": ~seen}
    result = {name: Outcomes(hits[part]) for name, part in parts.items() if part.any()}
    if len(result) == 2:
        result["harmonic_top1"] = Outcomes(hits, strata=seen.astype(np.int64), combine="harmonic")
    return result
