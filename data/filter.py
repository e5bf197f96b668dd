"""Choose the pictures that a teacher finds nearest to a list of prompts, without near-duplicates.

This is how unlabelled pictures are gathered for a student of a few classes: see NVIDIA's clip-distillation, which
searches LAION by its prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from clipress.data.bad_records import Broken, BrokenRecords
from clipress.data.sources import Source
from clipress.data.transforms import Preprocess, fitted, normalised
from clipress.errors import DataError

BLOCK = 1024  # rows compared at once

Encoder = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Chosen:
    """A picture that was kept: its index, its cosine with the nearest prompt, and which prompt that is."""

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
    """Encode every picture that can be read: unit embeddings float32 [N, D] and their indices int64 [N].

    `done` is called with the number of pictures after every batch. Raises DataError when too many cannot be read.
    """
    records, parts, indices = BrokenRecords(), [], []

    def look(index: int) -> np.ndarray | Broken:
        try:
            return fitted(source.image(index), preprocess)
        except DataError as error:
            return Broken(source.name, index, str(error))

    with ThreadPoolExecutor(threads) as pool:  # decoding lets other threads run
        for start in range(0, len(source), batch):
            wanted = range(start, min(start + batch, len(source)))
            views = list(pool.map(look, wanted))
            broken = [view for view in views if isinstance(view, Broken)]
            records.see(len(wanted) - len(broken), broken)
            whole = [(index, view) for index, view in zip(wanted, views, strict=True) if not isinstance(view, Broken)]
            if whole:
                pixels = normalised(np.stack([view for _, view in whole]), preprocess)
                parts.append(np.asarray(encode_image(pixels), np.float32))
                indices += [index for index, _ in whole]
            done(len(wanted))
    if not parts:
        raise DataError(f"data: no picture of source '{source.name}' can be read.")
    return np.concatenate(parts), np.asarray(indices, np.int64)


def nearest_to_prompts(
    images: np.ndarray, prompts: np.ndarray, count: int, near_duplicates: float | None = None
) -> list[Chosen]:
    """Return the `count` best of images [N, D] by their largest cosine with prompts [P, D], best first.

    Both are of unit length. With `near_duplicates`, a picture is left out when its cosine with a better one that was
    kept is that large or larger. Equal scores keep the order of the images.
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
            raise DataError("data: the model gave embeddings that are not finite; nothing can be ranked by them.")
        scores[start : start + BLOCK], which[start : start + BLOCK] = cosines.max(1), cosines.argmax(1)
    return scores, which


def _without_near(block: np.ndarray, kept: np.ndarray, threshold: float) -> np.ndarray:
    """Return which rows of a block [B, D], best first, are near to none that is kept, be it before or in the block."""
    free = np.ones(len(block), bool)
    for start in range(0, len(kept), BLOCK):
        free &= (block @ kept[start : start + BLOCK].T < threshold).all(1)
    alike = block @ block.T >= threshold
    for row in range(len(block)):
        if free[row]:
            free[row + 1 :] &= ~alike[row, row + 1 :]
    return free


def table(paths: Sequence[str], chosen: Sequence[Chosen], prompts: Sequence[str]) -> str:
    """Return the list as TSV, `filepath`, `score` and `prompt`; the `images` format reads it."""
    rows = [f"{paths[pick.index]}\t{pick.score:.6f}\t{prompts[pick.prompt]}" for pick in chosen]
    return "\n".join(["filepath\tscore\tprompt", *rows]) + "\n"
