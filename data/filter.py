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
    kept is at least that. Equal scores keep the order of the images.
    """
    scores, which = _largest_cosine(images, prompts)
    order = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    for start in range(0, len(order), BLOCK):
        block = order[start : start + BLOCK]
        if near_duplicates is not None:
            block = block[_without_near(images[block], images[kept], near_duplicates)]
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


def _without_near(block: np.ndarray, kept: np.ndarray, threshold: float) -> np.ndarray:
    """Return which rows of a block [B, D], best first, are near to no row kept before, in or ahead of the block."""
    free = np.ones(len(block), bool)
    for start in range(0, len(kept), BLOCK):
        free &= (block @ kept[start : start + BLOCK].T < threshold).all(1)
    alike = block @ block.T >= threshold
    for row in range(len(block)):
        if free[row]:
            free[row + 1 :] &= ~alike[row, row + 1 :]
    return free


def table(paths: Sequence[str], chosen: Sequence[Chosen], prompts: Sequence[str]) -> str:
    """Return the choice as TSV with `filepath`, `score` and `prompt`; the `images` format reads it."""
    rows = [f"{paths[pick.index]}\t{pick.score:.6f}\t{prompts[pick.prompt]}" for pick in chosen]
    return "\n".join(["filepath\tscore\tprompt", *rows]) + "\n"
