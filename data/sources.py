"""Sources of images and texts: the protocol every reader implements, and the registry that opens them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from PIL import Image

from clipress.data.spec import SourceSpec
from clipress.errors import DataError
from clipress.recipe import digest
from clipress.registry import Registry


class Source(Protocol):
    """Image-text pairs. Items with the same `group` match one another.

    A source may hold one side only: without texts `captions` returns an empty sequence, without images `image` raises
    DataError. All raise DataError for a record that cannot be read; `bad_records.py` replaces it with another.

    Some sources have more, which they say with an attribute that others may lack:

    has_masks: the label of every pixel, `mask(index)` uint8 [H, W], of which 255 does not count, and classes.
    has_pairs: another image, `other_image(index)`; the caption is a statement about both, and `label(index)` is 1 if it is true, else 0.
    states(items, check): int64 [N, 2], tells whether image files were replaced by others of the same names, see file_states.py.
    has_answers: the caption is a question about the image; `answers(index)` are what people said, mostly ten of them,
      `answer_weights(index)` those that differ with their weights in training, and `candidates` the answers to choose from, or None.
    """

    name: str
    fingerprint: str
    has_images: bool
    has_texts: bool

    def __len__(self) -> int: ...
    def image(self, index: int) -> Image.Image | np.ndarray: ...
    def captions(self, index: int) -> Sequence[str]: ...
    def group(self, index: int) -> int: ...


@dataclass(frozen=True)
class Classes:
    """Class names and prompt templates with one `{}`, for zero-shot classification."""

    names: tuple[str, ...]
    templates: tuple[str, ...]

    def prompts(self, label: int) -> tuple[str, ...]:
        """Return the prompts of one class."""
        return tuple(template.replace("{}", self.names[label]) for template in self.templates)


FORMATS: Registry[Callable[[SourceSpec], Source]] = Registry("data format", "clipress.data.formats")


@lru_cache(maxsize=16)
def open_source(spec: SourceSpec) -> Source:
    """Open a source. Raises RecipeError for an unknown format, DataError for a source without usable records."""
    source = FORMATS.find(spec.format, "data")(spec)
    if len(source) == 0:
        raise DataError(f"data: source '{source.name}' has no usable records.")
    return source


@lru_cache(maxsize=16)
def num_captions(spec: SourceSpec) -> int:
    """Count the captions of all items of a source; an item without texts counts once."""
    source = open_source(spec)
    if (known := getattr(source, "num_captions", None)) is not None:  # without reading them
        return known
    return sum(max(len(readable_captions(source, index)), 1) for index in range(len(source)))


def readable_captions(source: Source, index: int) -> Sequence[str]:
    """Return the captions of an item; none if they cannot be read, since training then replaces the item."""
    try:
        return source.captions(index)
    except DataError:
        return ()


def fingerprint(specs: Sequence[SourceSpec]) -> str:
    """Return one hash of the content of all sources."""
    return digest([open_source(spec).fingerprint for spec in specs])
