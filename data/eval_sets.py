"""Evaluation sets: retrieval for sources with captions, zero-shot classification for sources with classes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from clipress.data.bad_records import FEW, MAX_SKIPPED_OF, refuse_too_many
from clipress.data.sources import Classes, Source, open_source
from clipress.data.spec import CANDIDATES, MAX_SKIPPED, BeamSearch, SourceSpec
from clipress.data.transforms import Preprocess, as_image, fitted, normalised
from clipress.errors import DataError, RecipeError, nearest

log = logging.getLogger("clipress.data")
Found = TypeVar("Found")


class UnreadableRecord(DataError):
    """A record of an evaluation set that cannot be read."""


class Readable:
    """A source without the records that cannot be read: `kept` are the indices of the others."""

    BY_INDEX = frozenset({"image", "other_image", "mask", "captions", "group", "label", "answers", "answer_weights"})

    def __init__(self, source: Source, kept: Sequence[int]) -> None:
        self.source, self.kept = source, kept

    def __len__(self) -> int:
        return len(self.kept)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.source, name)
        return (lambda index: found(self.kept[index])) if name in self.BY_INDEX else found


@dataclass
class EvalSet:
    """A source and, if its images are labelled, its classes. Reading a bad record raises UnreadableRecord, see `on_readable`."""

    source: Source
    classes: Classes | None
    seen: frozenset[int] = frozenset()
    """Labels of the classes seen in training, for generalised zero-shot."""
    beam_search: BeamSearch | None = None
    candidates: int = CANDIDATES
    """Of a list of answers, how many are compared as a whole."""
    max_skipped: float = MAX_SKIPPED
    unread: tuple[str, ...] | None = None
    """Why records cannot be read; they are left out. None: nothing is known to be unreadable."""

    def read(self, what: str, index: int) -> Any:
        """Read one side of a record, such as `image`."""
        try:
            return getattr(self.source, what)(index)
        except DataError as error:
            raise UnreadableRecord(str(error)) from None

    def leave_out_unreadable(self) -> None:
        """Look for the records that cannot be read, and leave them out from now on. Raises DataError for too many."""
        kept, unread, total = [], [], len(self.source)
        sides = ["image"] * self.source.has_images + ["captions"] * self.source.has_texts
        sides += [
            what
            for what, has in (("other_image", "has_pairs"), ("mask", "has_masks"), ("answers", "has_answers"))
            if getattr(self.source, has, False)
        ]
        for index in range(total):
            try:
                for side in sides:
                    self.read(side, index)
            except UnreadableRecord as error:
                unread.append(str(error))
                log.warning("data: %s: left out %s", self.name, error)
            else:
                kept.append(index)
        least, example = FEW if kept else 0, unread[0] if unread else ""
        refuse_too_many(f"data: {self.name}", len(unread), total, example, self.max_skipped, least, MAX_SKIPPED_OF)
        self.source, self.unread = Readable(self.source, kept), tuple(unread)

    @property
    def name(self) -> str:
        return self.source.name

    def pixel_batches(self, preprocess: Preprocess, batch: int = 64, others: bool = False) -> Iterator[np.ndarray]:
        """Yield the images, or the second ones of pairs, as float32 [<=batch, 3, S, S], in order."""
        image = partial(self.read, "other_image" if others else "image")
        for start in range(0, len(self.source), batch):
            stop = min(start + batch, len(self.source))
            yield normalised(np.stack([fitted(image(i), preprocess) for i in range(start, stop)]), preprocess)

    def masks(self) -> Iterator[tuple[Image.Image, np.ndarray]]:
        """Yield every image at its own size with the labels of its pixels, uint8 [H, W]."""
        for index in range(len(self.source)):
            yield as_image(self.read("image", index)), self.read("mask", index)

    def require_texts(self) -> None:
        """Raise RecipeError for images alone."""
        if not self.source.has_texts:
            raise RecipeError(f"data: {self.name} has no captions to compare with. Use data with texts.")

    def require_pairs(self) -> None:
        """Raise RecipeError for data without pairs of images."""
        if not getattr(self.source, "has_pairs", False):
            raise RecipeError(
                f"data: {self.name} has no pairs of images, which statements are about. Use data of the format nlvr2."
            )

    def first_texts(self, count: int) -> list[str]:
        """Return a caption of each of the first images. Raises RecipeError for images alone."""
        self.require_texts()
        return [self.read("captions", index)[0] for index in range(count)]

    def captions(self) -> list[Sequence[str]]:
        """Return the captions of every image. Raises RecipeError for images alone."""
        self.require_texts()
        return [self.read("captions", index) for index in range(len(self.source))]

    def texts(self) -> tuple[list[str], np.ndarray]:
        """Return every caption and the index of its image, int64 [captions]. Raises RecipeError for images alone."""
        captions = self.captions()
        owner = np.repeat(np.arange(len(captions)), [len(texts) for texts in captions])
        return [text for texts in captions for text in texts], owner

    def labels(self) -> np.ndarray:
        """Return the class of every image, or whether the statement about every pair is true, int64 [N].

        Raises RecipeError for masks, whose classes are those of pixels.
        """
        if getattr(self.source, "has_masks", False):
            raise RecipeError(
                f"data: {self.name} has the label of every pixel, expected one of every image. Use other data."
            )
        if not getattr(self.source, "has_pairs", False):
            return self.groups()
        return np.asarray([self.source.label(index) for index in range(len(self.source))], np.int64)

    def answers(self, count: int | None = None) -> list[Sequence[str]]:
        """Return what people answered to every question, or to the first ones."""
        return [self.read("answers", index) for index in range(len(self.source) if count is None else count)]

    def groups(self) -> np.ndarray:
        """Return the group of every record, such as the image that a question is about, int64 [N]."""
        return np.asarray([self.source.group(index) for index in range(len(self.source))], np.int64)


def unread_in(sets: Sequence[EvalSet]) -> dict[str, int]:
    """Return how many records were left out of each set, by name; sets without any are not named."""
    return {one.name: len(one.unread) for one in sets if one.unread}


def on_readable(work: Callable[[Sequence[EvalSet]], Found], sets: Sequence[EvalSet]) -> Found:
    """Return what `work` makes of evaluation sets; if a record cannot be read, again without those that cannot be."""
    try:
        return work(sets)
    except UnreadableRecord:
        for one in sets:
            if one.unread is None:
                one.leave_out_unreadable()
        return work(sets)


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
            spec.max_skipped,
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
