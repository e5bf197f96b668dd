"""Retrieval recall on embeddings: any number of captions per image, ties counted against the model.

The protocol is CLIP_benchmark's and UPop's: all captions are used; an image's query is right when one of its own
captions is among the first K. Names follow UPop: `text_r1` retrieves text for an image, `image_r1` an image for a text.
"""

from __future__ import annotations

import numpy as np

from clipress.errors import ArtifactError

CHUNK = 1024


def finite(embeddings: np.ndarray, what: str) -> np.ndarray:
    """Return the embeddings, or raise: NaN would count as a hit in most evaluators."""
    if not np.isfinite(embeddings).all():
        bad = int((~np.isfinite(embeddings)).any(1).sum())
        raise ArtifactError(
            f"{bad} of {len(embeddings)} {what} embeddings are not finite: the model is broken. Make it again."
        )
    return embeddings.astype(np.float32, copy=False)


def pessimistic_ranks(queries: np.ndarray, gallery: np.ndarray, right: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Return the rank of the best right answer of each query, int64 [Q], counting equal wrong ones before it.

    queries [Q, D], gallery [G, D]; query q and item g belong together when right[q] == own[g].
    """
    ranks = np.empty(len(queries), np.int64)
    for start in range(0, len(queries), CHUNK):
        rows = slice(start, start + CHUNK)
        scores = queries[rows] @ gallery.T  # [q, G]
        positive = right[rows, None] == own[None, :]
        best = np.where(positive, scores, -np.inf).max(1, keepdims=True)
        ranks[rows] = ((scores >= best) & ~positive).sum(1)
    return ranks


def recalls(
    images: np.ndarray, texts: np.ndarray, owner: np.ndarray, ks: tuple[int, ...] = (1, 5, 10)
) -> dict[str, float]:
    """Return R@K in percent both ways.

    images [N, D] and texts [M, D], L2-normalised; owner [M]: the image each text belongs to.
    """
    images, texts = finite(images, "image"), finite(texts, "text")
    index = np.arange(len(images))
    to_text = pessimistic_ranks(images, texts, index, owner)
    to_image = pessimistic_ranks(texts, images, owner, index)
    result = {f"text_r{k}": 100.0 * float((to_text < k).mean()) for k in ks}
    return result | {f"image_r{k}": 100.0 * float((to_image < k).mean()) for k in ks}
