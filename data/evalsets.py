"""What is evaluated: retrieval for sources with captions, zero-shot classification for sources with classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from clipress.data.pairs import Classes, Source, SourceSpec, open_source
from clipress.data.transforms import Preprocess, fitted, normalised


@dataclass(frozen=True)
class EvalSet:
    """A source and, when its pictures are labelled, its classes."""

    source: Source
    classes: Classes | None

    @property
    def name(self) -> str:
        return self.source.name

    def pixel_batches(self, preprocess: Preprocess, batch: int = 64) -> Iterator[np.ndarray]:
        """Yield the pictures as float32 [<=batch, 3, S, S], in order."""
        for start in range(0, len(self.source), batch):
            stop = min(start + batch, len(self.source))
            yield normalised(
                np.stack([fitted(self.source.image(i), preprocess) for i in range(start, stop)]), preprocess
            )

    def texts(self) -> tuple[list[str], np.ndarray]:
        """Return every caption and the index of its image, int64 [captions]."""
        texts, owner = [], []
        for index in range(len(self.source)):
            captions = self.source.captions(index)
            texts += captions
            owner += [index] * len(captions)
        return texts, np.asarray(owner, np.int64)

    def labels(self) -> np.ndarray:
        """Return the class of every picture, int64 [N]."""
        return np.asarray([self.source.group(i) for i in range(len(self.source))], np.int64)


def evalsets(specs: Sequence[SourceSpec]) -> list[EvalSet]:
    """Open the evaluation sets of a recipe."""
    sources = [open_source(spec) for spec in specs]
    return [EvalSet(source, getattr(source, "classes", None)) for source in sources]
