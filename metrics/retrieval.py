"""Ranks of matching items, and retrieval recall: any number of captions per image, ties count against the model.

The protocol is CLIP_benchmark's and UPop's: all captions are used; an image query is a hit if one of its own
captions is among the first K. Names follow UPop: `text_r1` retrieves text for an image, `image_r1` an image for a text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from clipress.errors import ArtifactError, DataError
from clipress.metrics.outcomes import Outcomes

SCORES = 1 << 23  # computed at a time: 32 MB


@dataclass(frozen=True)
class Ranks:
    """Rank of each query's best matching item, int64 [Q]; 0 is the best."""

    pessimistic: np.ndarray
    """Wrong items of equal score come first. Metrics use this one."""
    optimistic: np.ndarray
    """Wrong items of equal score come last."""

    @property
    def tied(self) -> int:
        """Number of queries whose rank depends on how ties are broken."""
        return int((self.pessimistic != self.optimistic).sum())


def finite(values: np.ndarray, what: str, unit: str = "embeddings") -> np.ndarray:
    """Return model outputs [N, ...] as float32. Raises ArtifactError for NaN, which most evaluators count as a hit."""
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).reshape(len(values), -1).any(1).sum())
        raise ArtifactError(
            f"{bad} of {len(values)} {what} {unit} are not finite: the model is broken. Train or export it again."
        )
    return values.astype(np.float32, copy=False)


def ranks(queries: np.ndarray, gallery: np.ndarray, right: np.ndarray, own: np.ndarray) -> Ranks:
    """Rank each query's best matching item by inner product, a block of queries at a time.

    queries [Q, D], gallery [G, D], finite; query q and item g match if right[q] == own[g].
    Raises DataError for a query without a matching item.
    """
    products = products_with(gallery)
    return ranks_by(lambda rows: products(queries[rows]), right, own)


def products_with(gallery: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from queries [Q, D] to their inner products [Q, G] with a gallery [G, D]."""
    copies, originals = _copies(gallery)

    def products(queries: np.ndarray) -> np.ndarray:
        scores = queries @ gallery.T
        # a matrix product may round equal columns differently, which would break their tie
        scores[:, copies] = scores[:, originals]
        return scores

    return products


def ranks_by(score: Callable[[slice], np.ndarray], right: np.ndarray, own: np.ndarray) -> Ranks:
    """Rank each query's best matching item by scores, a block of queries at a time: `score` returns those of its rows, [q, G].

    Query q and item g match if right[q] == own[g]. Raises DataError for a query without a matching item.
    """
    order = np.argsort(own, kind="stable")
    first, stop = (np.searchsorted(own[order], right, side) for side in ("left", "right"))
    if (first == stop).any():
        lacking = right[first == stop]
        raise DataError(
            f"{len(lacking)} of {len(right)} queries have no matching item; the first is query {lacking[0]}."
        )
    pessimistic, optimistic = np.empty(len(right), np.int64), np.empty(len(right), np.int64)
    step = max(1, SCORES // len(own))
    for start in range(0, len(right), step):
        rows = slice(start, start + step)
        scores = score(rows)
        counts = stop[rows] - first[rows]
        ends = np.cumsum(counts)
        query = np.repeat(np.arange(len(scores)), counts)
        item = order[np.arange(ends[-1]) + np.repeat(first[rows] - (ends - counts), counts)]
        of_own = scores[query, item]
        best = np.maximum.reduceat(of_own, ends - counts)
        own_best = np.bincount(query, of_own == best[query]).astype(np.int64)
        pessimistic[rows] = np.count_nonzero(scores >= best[:, None], axis=1) - own_best
        optimistic[rows] = np.count_nonzero(scores > best[:, None], axis=1)
    return Ranks(pessimistic, optimistic)


def _copies(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of rows that repeat an earlier row, and the index of its first occurrence."""
    first: dict[bytes, int] = {}
    originals = np.asarray([first.setdefault(row.tobytes(), place) for place, row in enumerate(rows)], np.int64)
    copies = np.flatnonzero(originals != np.arange(len(rows)))
    return copies, originals[copies]


def retrieval(
    images: np.ndarray, texts: np.ndarray, owner: np.ndarray, ks: tuple[int, ...] = (1, 5, 10)
) -> dict[str, Outcomes]:
    """Return R@K in both directions, the mean of both R@1, and rsum, the sum of all R@K (as in VSE++).

    images [N, D] and texts [M, D], L2-normalised; owner [M]: the image each text belongs to. An image and all its
    captions are one unit of the standard error. Raises DataError for an image without a caption.
    """
    images, texts = checked_sides(images, texts, owner)
    index = np.arange(len(images))
    return recalls(ranks(images, texts, index, owner), ranks(texts, images, owner, index), owner, ks)


def checked_sides(images: np.ndarray, texts: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both sides' embeddings as float32. Raises ArtifactError if one is not finite, DataError for a text of no image."""
    if len(owner) and not 0 <= owner.min() <= owner.max() < len(images):
        raise DataError(f"captions: expected owners 0 to {len(images) - 1}, found {owner.min()} to {owner.max()}.")
    return finite(images, "image"), finite(texts, "text")


def recalls(
    to_text: Ranks, to_image: Ranks, owner: np.ndarray, ks: tuple[int, ...] = (1, 5, 10)
) -> dict[str, Outcomes]:
    """Return R@K of both directions, the mean of both R@1, and rsum, given the ranks of texts for images and of images for texts."""
    index = np.arange(len(to_text.pessimistic))
    found = {f"text_r{k}": Outcomes(to_text.pessimistic < k, units=index, tied=to_text.tied) for k in ks}
    found |= {f"image_r{k}": Outcomes(to_image.pessimistic < k, units=owner, tied=to_image.tied) for k in ks}
    both = [found[f"{way}_r{ks[0]}"] for way in ("text", "image")]
    return found | {f"mean_r{ks[0]}": together(both, "mean"), "rsum": together(list(found.values()), "sum")}


def together(parts: list[Outcomes], combine: str) -> Outcomes:
    """Combine several metrics into one; each part is a stratum."""
    strata = np.repeat(np.arange(len(parts)), [len(part.values) for part in parts])
    values, units = (np.concatenate([getattr(part, name) for part in parts]) for name in ("values", "units"))
    return Outcomes(values, strata, units, combine, max(part.tied for part in parts))
