"""Evaluation sets: retrieval for sources with captions, zero-shot classification for sources with classes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from clipress.data.sources import Classes, Source, open_source
from clipress.data.spec import CANDIDATES, BeamSearch, SourceSpec
from clipress.data.transforms import Preprocess, as_image, fitted, normalised
from clipress.errors import DataError, RecipeError, nearest

log = logging.getLogger("clipress.data")


@dataclass(frozen=True)
class EvalSet:
    """A source and, if its images are labelled, its classes."""

    source: Source
    classes: Classes | None
    seen: frozenset[int] = frozenset()
    """Labels of the classes seen in training, for generalised zero-shot."""
    beam_search: BeamSearch | None = None
    candidates: int = CANDIDATES
    """Of a list of answers, how many are compared as a whole."""

    @property
    def name(self) -> str:
        return self.source.name

    def pixel_batches(self, preprocess: Preprocess, batch: int = 64, others: bool = False) -> Iterator[np.ndarray]:
        """Yield the images, or the second ones of pairs, as float32 [<=batch, 3, S, S], in order."""
        image = self.source.other_image if others else self.source.image
        for start in range(0, len(self.source), batch):
            stop = min(start + batch, len(self.source))
            yield normalised(np.stack([fitted(image(i), preprocess) for i in range(start, stop)]), preprocess)

    def masks(self) -> Iterator[tuple[Image.Image, np.ndarray]]:
        """Yield every image at its own size with the labels of its pixels, uint8 [H, W]."""
        for index in range(len(self.source)):
            yield as_image(self.source.image(index)), self.source.mask(index)

    def require_texts(self) -> None:
        """Raise RecipeError for images alone."""
        if not self.source.has_texts:
            raise RecipeError(f"data: {self.name} has no captions to compare with. Use data with texts.")

    def first_texts(self, count: int) -> list[str]:
        """Return a caption of each of the first images. Raises RecipeError for images alone."""
        self.require_texts()
        return [self.source.captions(index)[0] for index in range(count)]

    def texts(self) -> tuple[list[str], np.ndarray]:
        """Return every caption and the index of its image, int64 [captions]. Raises RecipeError for images alone."""
        self.require_texts()
        texts, owner = [], []
        for index in range(len(self.source)):
            captions = self.source.captions(index)
            texts += captions
            owner += [index] * len(captions)
        return texts, np.asarray(owner, np.int64)

    def labels(self) -> np.ndarray:
        """Return the class of every image, or whether the statement about every pair is true, int64 [N].

        Raises RecipeError for masks, whose classes are those of pixels.
        """
        if getattr(self.source, "has_masks", False):
            raise RecipeError(
                f"data: {self.name} has the label of every pixel, expected one of every image. Use other data."
            )
        label = self.source.label if getattr(self.source, "has_pairs", False) else self.source.group
        return np.asarray([label(i) for i in range(len(self.source))], np.int64)

    def answers(self) -> list[Sequence[str]]:
        """Return what people answered to every question."""
        return [self.source.answers(i) for i in range(len(self.source))]


def evalsets(specs: Sequence[SourceSpec]) -> list[EvalSet]:
    """Open the evaluation sets of a recipe."""
    sources = [open_source(spec) for spec in specs]
    return [
        EvalSet(
            source,
            classes := getattr(source, "classes", None),
            _seen(spec, classes),
            spec.beam_search,
            spec.candidates,
        )
        for spec, source in zip(specs, sources, strict=True)
    ]


def _seen(spec: SourceSpec, classes: Classes | None) -> frozenset[int]:
    """Return the labels of the recipe's seen classes; a name shared by two classes means both."""
    names = classes.names if classes else ()
    for name in spec.seen:
        if name not in names:
            hint = nearest(name, names) if names else " The source has no classes."
            raise DataError(
                f"data: source '{spec.name or spec.format}' has no class '{name}', which 'seen' lists.{hint}"
            )
    return frozenset(label for label, name in enumerate(names) if name in spec.seen)


def probe_sets(tests: Sequence[SourceSpec], trains: Sequence[SourceSpec]) -> list[tuple[EvalSet, EvalSet]]:
    """Return (training set, test set) for every evaluation set that a linear probe can be fitted for.

    The training set has the same classes and the same format, and preferably the same name. Sets without one are
    skipped with a warning; DataError when none is left.
    """
    pairs = []
    for test_spec, test in zip(tests, evalsets(tests), strict=True):
        if test.classes is None:
            continue
        alike = [spec for spec in trains if spec.format == test_spec.format]
        alike.sort(key=lambda spec, name=test_spec.name: spec.name != name)
        found = (train for train in evalsets(alike) if train.classes and train.classes.names == test.classes.names)
        if train := next(found, None):
            pairs.append((train, test))
        else:
            log.warning("%s: no linear probe, since no training source has the same format and classes.", test.name)
    if not pairs:
        raise DataError(
            "linear probe: no evaluation set with classes has a training source of the same format and classes. "
            "Add one to data.train."
        )
    return pairs
