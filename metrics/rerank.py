"""Retrieval in two steps, as BLIP is evaluated: the nearest items by cosine are scored again by a slower model of pairs.

score(query, item) = match logit + cosine  for the k nearest items of a query; all others stay behind these, by cosine
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from clipress.errors import DataError
from clipress.metrics.outcomes import Outcomes
from clipress.metrics.retrieval import Ranks, checked_sides, finite, products_with, ranks_by, recalls, together

Match = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Scores pairs: places of images and places of texts, int64 [P] each -> match logits [P]. One call has the pairs of one query."""


def reranked(
    images: np.ndarray, texts: np.ndarray, owner: np.ndarray, match: Match, k: int, ks: tuple[int, ...] = (1, 5, 10)
) -> dict[str, Outcomes]:
    """Return the metrics of `retrieval` after re-ranking, and r_mean, the mean of all R@K, by which BLIP chooses models.

    images [N, D] and texts [M, D], L2-normalised; owner [M]: the image each text belongs to. A k above the gallery is cut.
    Raises DataError for a k below 1, and as `retrieval` does.
    """
    if k < 1:
        raise DataError(f"re-ranking: expected at least 1 item per query, found {k}.")
    images, texts = checked_sides(images, texts, owner)
    index = np.arange(len(images))
    to_text = _ranks(images, texts, index, owner, match, k)
    to_image = _ranks(texts, images, owner, index, lambda text, image: match(image, text), k)
    found = recalls(to_text, to_image, owner, ks)
    every = [outcomes for name, outcomes in found.items() if name not in (f"mean_r{ks[0]}", "rsum")]
    return found | {"r_mean": together(every, "mean")}


def _ranks(queries: np.ndarray, gallery: np.ndarray, right: np.ndarray, own: np.ndarray, match: Match, k: int) -> Ranks:
    """Rank each query's best matching item; `match` takes places of queries, then places of items."""
    products = products_with(gallery)

    def score(rows: slice) -> np.ndarray:
        cosines = products(queries[rows]).astype(np.float64)
        for row, query in zip(cosines, range(*rows.indices(len(queries))), strict=True):
            row[:] = rescored(row, lambda nearest, query=query: match(np.full(len(nearest), query), nearest), k)
        return cosines

    return ranks_by(score, right, own)


def rescored(cosines: np.ndarray, match: Callable[[np.ndarray], np.ndarray], k: int) -> np.ndarray:
    """Return the scores [M] of a query's items by their cosines, float64, and the match logits of the k nearest.

    `match` takes the places of these.
    """
    nearest = np.argsort(-cosines, kind="stable")[:k]
    again = cosines[nearest] + finite(np.asarray(match(nearest))[:, None], "match", "logits")[:, 0]
    scores = cosines - (cosines.max() + 1 - again.min())  # behind all that are scored again
    scores[nearest] = again
    return scores
