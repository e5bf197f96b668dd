"""What a BLIP does with images and texts, by its exported files and ONNX Runtime alone, as its evaluation does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from clipress.data.spec import BEAMS, CANDIDATES
from clipress.data.word_pieces import WordPieces
from clipress.errors import DataError, ExportError
from clipress.metrics.blip import LOGITS, STATES, Questions, in_batches, judge, write_captions
from clipress.metrics.classify import softmax
from clipress.metrics.rerank import rescored
from clipress.metrics.retrieval import finite
from clipress.runtime.export_folder import Exported
from clipress.runtime.graph import Run
from clipress.runtime.onnx_session import run_of
from clipress.runtime.served import ANSWER, CAPTION, JUDGE, MATCH
from clipress.serve.graphs import IMAGE, TEXT, USES, use_in_words, use_of
from clipress.serve.images import ImageLike, as_list, pixels_of

BATCH = 4  # images per call of ONNX Runtime: what a caption's beams read of an image may be 40 MB each


class Blip:
    """The methods of a LoadedModel that BLIPs have, each of them one. Those of another model raise ExportError."""

    exported: Exported
    sessions: Mapping[str, Any]
    _tokenize: Callable[[Sequence[str]], np.ndarray] | None

    @property
    def use(self) -> str | None:
        """What a BLIP is for, by the name of its method: caption, answer, judge or match; None for other models."""
        return use_of(self.exported)

    @property
    def use_in_words(self) -> str:
        """What the model does, in words."""
        return use_in_words(self.exported)

    def caption(self, images: ImageLike | Sequence[ImageLike], beams: int = BEAMS) -> list[str]:
        """Write a caption of every image by beam search; `beams` of 1 is greedy.

        Raises DataError for an image that cannot be read, and ExportError for another model.
        """
        self._require(CAPTION)
        return [
            text
            for (batch,) in _parts(as_list(images))
            for text in write_captions(self._runs, self._pixels(batch), self._pieces, beams)
        ]

    def answer(
        self,
        images: ImageLike | Sequence[ImageLike],
        questions: str | Sequence[str],
        answers: Sequence[str] | None = None,
        beams: int = BEAMS,
    ) -> list[str]:
        """Answer a question about every image: choose the likeliest of `answers`, or write one by beam search.

        One image with several questions, or one question about several images, is repeated. Raises DataError for an image that cannot be
        read, other counts or no answers to choose from, and ExportError for another model.
        """
        self._require(ANSWER)
        found = []
        for batch, texts in _parts(*_aligned(images=as_list(images), questions=_texts(questions))):
            asked = Questions(self._runs, self._pixels(batch), self._tokenize(texts), self._pieces)
            found += asked.written(beams) if answers is None else asked.chosen(_texts(answers))
        return found

    def judge(
        self,
        firsts: ImageLike | Sequence[ImageLike],
        seconds: ImageLike | Sequence[ImageLike],
        statements: str | Sequence[str],
    ) -> np.ndarray:
        """Return the probability that each statement about a first and a second image is true, float32 [N].

        One image or statement among several others is repeated. Raises as `answer` does.
        """
        self._require(JUDGE)
        columns = _aligned(firsts=as_list(firsts), seconds=as_list(seconds), statements=_texts(statements))
        logits = [
            judge(self._runs, self._pixels(left), self._pixels(right), self._tokenize(texts))
            for left, right, texts in _parts(*columns)
        ]
        return _second_class(logits, "statement")

    def match(self, images: ImageLike | Sequence[ImageLike], texts: str | Sequence[str]) -> np.ndarray:
        """Return the probability that each image and its text belong together, read together, float32 [N].

        One image or text among several others is repeated. Raises as `answer` does.
        """
        self._require(MATCH)
        logits = []
        for batch, read in _parts(*_aligned(images=as_list(images), texts=_texts(texts))):
            states = self._runs[IMAGE]({"pixel_values": self._pixels(batch)})[STATES]
            logits.append(self._matched(self._tokenize(read), states))
        return _second_class(logits, "match")

    def rank(self, images: Sequence[ImageLike], texts: str | Sequence[str], candidates: int = CANDIDATES) -> np.ndarray:
        """Return the score of every image for every text, the nearest the highest, float64 [T, N].

        As evaluated: the cosine and match logit of the `candidates` images that are nearest to a text by cosine, whose states are held in
        memory; all others stay behind these, by cosine. Raises as `answer` does.
        """
        self._require(MATCH)
        if not texts or candidates < 1:
            raise DataError(f"rank: expected a text and at least 1 candidate, found {len(texts)} and {candidates}.")
        ids = self._tokenize(_texts(texts))
        image, text = (self.exported.graphs[side].outputs[0].name for side in (IMAGE, TEXT))
        queries = finite(in_batches(self._runs[TEXT], {"input_ids": ids})[text], TEXT)
        found = (self._runs[IMAGE]({"pixel_values": self._pixels(batch)}) for (batch,) in _parts(as_list(images)))
        encoded = ((finite(outputs[image], IMAGE), outputs[STATES]) for outputs in found)

        def match(place: int, states: np.ndarray) -> np.ndarray:
            return self._matched(np.tile(ids[place], (len(states), 1)), states)[:, 1]

        return rank_images(queries, encoded, match, candidates)

    @cached_property
    def _runs(self) -> dict[str, Run]:
        return {name: run_of(session) for name, session in self.sessions.items()}

    @cached_property
    def _pieces(self) -> WordPieces:
        return WordPieces(self.exported.tokenizer.model_dump())

    def _require(self, use: str) -> None:
        """Raise ExportError for a model that is not for this."""
        if self.use != use:
            raise ExportError(
                f"{self.exported.folder}: expected a model that {USES[use]}, found one that {self.use_in_words}. Load such an export."
            )

    def _pixels(self, images: Sequence[ImageLike]) -> np.ndarray:
        return pixels_of(images, self.exported.preprocess)

    def _matched(self, ids: np.ndarray, states: np.ndarray) -> np.ndarray:
        return in_batches(self._runs[MATCH], {"input_ids": ids, STATES: states})[LOGITS]


def rank_images(
    queries: np.ndarray,
    images: Iterable[tuple[np.ndarray, np.ndarray]],
    match: Callable[[int, np.ndarray], np.ndarray],
    candidates: int,
) -> np.ndarray:
    """Return the score of every image for every text, float64 [T, N]; the states of the nearest are held, and of no others.

    Args:
        queries: embeddings of the texts [T, D].
        images: embeddings [B, D] and states [B, ...] of images, some at a time.
        match: place of a text, and states [K, ...] -> match logits [K].
        candidates: how many images are read together with each text.
    """
    states: dict[int, np.ndarray] = {}
    cosines = np.empty((len(queries), 0))
    for embeddings, rows in images:
        states |= {cosines.shape[1] + number: row.copy() for number, row in enumerate(rows)}
        cosines = np.concatenate([cosines, queries @ embeddings.T], 1)
        nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :candidates]
        states = {place: states[place] for place in np.unique(nearest).tolist()}

    for place, row in enumerate(cosines) if states else ():

        def matched(places: np.ndarray, place: int = place) -> np.ndarray:
            return match(place, np.stack([states[one] for one in places.tolist()]))

        row[:] = rescored(row, matched, candidates)
    return cosines


def _texts(texts: str | Sequence[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


def _aligned(**columns: list[Any]) -> list[list[Any]]:
    """Return columns of one length; those of a single item are repeated. Raises DataError for other lengths."""
    longest = max(map(len, columns.values()))
    if any(len(column) not in (1, longest) for column in columns.values()):
        found = ", ".join(f"{len(column)} {name}" for name, column in columns.items())
        raise DataError(f"Expected as many of each, or one for all, found {found}.")
    return [column * longest if len(column) == 1 else column for column in columns.values()]


def _parts(*columns: list[Any]) -> Iterator[list[list[Any]]]:
    """Yield the rows of columns, some at a time."""
    for start in range(0, len(columns[0]), BATCH):
        yield [column[start : start + BATCH] for column in columns]


def _second_class(logits: Sequence[np.ndarray], what: str) -> np.ndarray:
    """Return the probabilities of class 1 by logits [N, 2] of batches, float32 [N]."""
    return softmax(finite(np.concatenate([np.empty((0, 2), np.float32), *logits]), what, "logits"))[:, 1]
