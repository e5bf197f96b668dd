"""Choose the images nearest to a list of prompts by a teacher's embeddings, without near-duplicates.

This collects unlabelled images to train a student for a few classes, as NVIDIA's clip-distillation does with LAION.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from clipress.data.bad_records import BadRecord, BadRecords
from clipress.data.prefetch import map_ahead
from clipress.data.sources import Source
from clipress.data.transforms import Preprocess, fitted, normalised
from clipress.errors import DataError

BLOCK = 1024  # rows compared at once
EXACT_UP_TO = 200_000  # images, a minute on one core; near-duplicates among more are found by faiss, if installed
LISTS_SEARCHED, TRAINED_ON = 32, 40  # inverted lists looked at, vectors per list for k-means
DIRECTIONS, SAMPLED = 64, 10_000  # principal directions that images are compared in first, of so many images
SLACK = 1e-3  # more than rounding takes from a bound

Encoder = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Chosen:
    """An image that was kept: its index, its cosine with the nearest prompt, and the index of that prompt."""

    index: int
    score: float
    prompt: int


def embeddings(
    source: Source,
    encode_image: Encoder,
    preprocess: Preprocess,
    batch: int = 64,
    threads: int = 1,
    done: Callable = int,
) -> tuple[np.ndarray, np.ndarray]:
    """Encode every image that can be read: unit embeddings float32 [N, D] and their indices int64 [N].

    `done` is called with the number of images after every batch. Raises DataError when too many cannot be read.
    """
    records, parts, indices = BadRecords(), [], []

    def decode(index: int) -> np.ndarray | BadRecord:
        try:
            return fitted(source.image(index), preprocess)
        except DataError as error:
            return BadRecord(source.name, index, str(error))

    decoded = map_ahead(decode, range(len(source)), threads, batch)
    for start in range(0, len(source), batch):
        items = range(start, min(start + batch, len(source)))
        views = dict(zip(items, islice(decoded, len(items)), strict=True))
        bad = [view for view in views.values() if isinstance(view, BadRecord)]
        records.count(len(items) - len(bad), bad)
        good = {index: view for index, view in views.items() if not isinstance(view, BadRecord)}
        if good:
            pixels = normalised(np.stack(list(good.values())), preprocess)
            parts.append(np.asarray(encode_image(pixels), np.float32))
            indices += good
        done(len(items))
    if not parts:
        raise DataError(f"data: no image of source '{source.name}' can be read. Check its paths.")
    return np.concatenate(parts), np.asarray(indices, np.int64)


def nearest_to_prompts(
    images: np.ndarray, prompts: np.ndarray, count: int, near_duplicates: float | None = None
) -> list[Chosen]:
    """Return the `count` best of images [N, D] by their largest cosine with prompts [P, D], best first.

    All rows are unit vectors. With `near_duplicates`, an image is left out when its cosine with a better image that was
    kept is at least that; among many images faiss looks at the nearest clusters, and may miss a few. Equal scores keep the
    order of the images.
    """
    scores, which = _largest_cosine(images, prompts)
    order = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    is_near = None if near_duplicates is None else _near_to_kept(images, kept, near_duplicates)
    for start in range(0, len(order), BLOCK):
        block = order[start : start + BLOCK]
        if is_near is not None:
            block = block[_without_near(images[block], is_near(block), near_duplicates)]
        kept += block.tolist()
        if len(kept) >= count:
            break
    return [Chosen(index, float(scores[index]), int(which[index])) for index in kept[:count]]


def _largest_cosine(images: np.ndarray, prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, which = np.empty(len(images), np.float32), np.empty(len(images), np.int64)
    for start in range(0, len(images), BLOCK):
        cosines = images[start : start + BLOCK] @ prompts.T
        if not np.isfinite(cosines).all():
            raise DataError("data: the model's embeddings are not finite, so images cannot be ranked. Check the model.")
        scores[start : start + BLOCK], which[start : start + BLOCK] = cosines.max(1), cosines.argmax(1)
    return scores, which


def _near_to_kept(images: np.ndarray, kept: Sequence[int], threshold: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function: indices [B] -> whether these images are near to any of `kept`, which grows between calls."""
    try:
        import faiss
    except ImportError:
        faiss = None
    if faiss is None or len(images) <= EXACT_UP_TO:
        bounds = _bounds(images)
        return lambda block: _is_near(images, bounds, block, kept, threshold)
    lists = round(4 * len(images) ** 0.5)  # a fixed number of vectors per list would make the training quadratic
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(images.shape[1]), images.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
    index.nprobe, index.cp.min_points_per_centroid = LISTS_SEARCHED, 1
    sample = np.random.default_rng(0).permutation(len(images))[: lists * TRAINED_ON]
    index.train(np.ascontiguousarray(images[np.sort(sample)]))

    def is_near(block: np.ndarray) -> np.ndarray:
        if index.ntotal < len(kept):
            index.add(np.ascontiguousarray(images[kept[index.ntotal :]]))
        return index.search(np.ascontiguousarray(images[block]), 1)[0][:, 0] >= threshold

    return is_near


def _bounds(images: np.ndarray) -> np.ndarray:
    """Return vectors float32 [N, K] whose inner products are upper bounds of those of images [N, D].

    They are an image's coordinates in the principal directions and the length of what remains: by Cauchy and Schwarz,
    the inner product of two remainders is at most the product of their lengths.
    """
    sample = images[:: max(len(images) // SAMPLED, 1)]
    inside = images @ np.linalg.eigh(sample.T @ sample)[1][:, -DIRECTIONS:]
    remainder = np.einsum("nd,nd->n", images, images) - np.einsum("nd,nd->n", inside, inside)
    return np.column_stack([inside, np.sqrt(np.maximum(remainder, 0))])


def _is_near(
    images: np.ndarray, bounds: np.ndarray, block: np.ndarray, kept: Sequence[int], threshold: float
) -> np.ndarray:
    near, rows = np.zeros(len(block), bool), bounds[block]
    for start in range(0, len(kept), BLOCK):
        others = kept[start : start + BLOCK]
        maybe = np.flatnonzero((rows @ bounds[others].T >= threshold - SLACK).any(1) & ~near)
        if len(maybe):  # of most blocks no image is
            near[maybe] = (images[block[maybe]] @ images[others].T >= threshold).any(1)
    return near


def _without_near(block: np.ndarray, is_near: np.ndarray, threshold: float) -> np.ndarray:
    """Return which rows of a block [B, D], best first, are near to no row kept before or ahead of them in the block.

    is_near: whether they are near to a row kept before.
    """
    free = ~is_near
    alike = block @ block.T >= threshold
    for row in range(len(block)):
        if free[row]:
            free[row + 1 :] &= ~alike[row, row + 1 :]
    return free


def table(paths: Sequence[str], chosen: Sequence[Chosen], prompts: Sequence[str]) -> str:
    """Return the choice as TSV with `filepath`, `score` and `prompt`; the `images` format reads it."""
    rows = [f"{paths[pick.index]}\t{pick.score:.6f}\t{prompts[pick.prompt]}" for pick in chosen]
    return "\n".join(["filepath\tscore\tprompt", *rows]) + "\n"
