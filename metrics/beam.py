"""Beam search over next tokens, whatever computes them: torch, an ONNX file or an engine.

It keeps what transformers 4.15 keeps, with which BLIP's captions were published:

    score of a finished text = sum of log p of its tokens and of the end / ids without the end, those of the prompt included

An item is done when its worst kept text is at least as good as its best candidate could be at the present length. Ties go to the
better beam, then to the smaller id.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from clipress.errors import ArtifactError, DataError

Step = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Scores next tokens: ids int64 [R, t] and the item of each row, int64 [R] -> logits or log-probabilities [R, V]."""


@dataclass(frozen=True)
class Text:
    """A text that was generated."""

    ids: tuple[int, ...]
    """Those of the prompt included, without the end token."""
    score: float


@dataclass
class _Item:
    """The search of one item: unfinished texts, best first, and the best that are finished."""

    ids: list[tuple[int, ...]]
    sums: list[float] = field(default_factory=lambda: [0.0])
    kept: list[Text] = field(default_factory=list)
    done: bool = False

    def keep(self, ids: tuple[int, ...], total: float, beams: int) -> None:
        self.kept.append(Text(ids, total / len(ids)))
        self.kept.sort(key=lambda text: -text.score)
        del self.kept[beams:]

    def advance(self, rows: np.ndarray, end: int, beams: int) -> None:
        """Go on with the best next tokens, given the log-probabilities of the unfinished texts [rows, V]."""
        totals, length = (rows + np.asarray(self.sums)[:, None]).ravel(), len(self.ids[0])
        texts, self.ids, self.sums = self.ids, [], []
        candidates = _best(totals, 2 * beams)
        for rank, place in enumerate(candidates):
            beam, token = divmod(int(place), rows.shape[1])
            if token != end:
                self.ids.append((*texts[beam], token))
                self.sums.append(float(totals[place]))
            elif rank < beams:
                self.keep(texts[beam], float(totals[place]), beams)
            if len(self.ids) == beams:
                break
        reachable = float(totals[candidates[0]]) / length if len(candidates) else -np.inf
        self.done = not self.ids or (len(self.kept) == beams and self.kept[-1].score >= reachable)


def beam_search(
    step: Step, prompts: np.ndarray, end: int, beams: int = 3, shortest: int = 5, longest: int = 20
) -> list[Text]:
    """Return the best text of every item.

    Args:
        step: is called with the unfinished texts of all unfinished items, item after item, at most `beams` rows each.
        prompts: int64 [N, P], the ids that every text starts with, at least one.
        end: the id of the end token.
        beams: texts that go on per item; 1 is greedy.
        shortest: ids below which no text may end, those of the prompt included and the end token not.
        longest: ids of the longest text, those of the prompt included.

    Raises DataError for limits that exclude one another, ArtifactError for scores that are not numbers.
    """
    prompts = np.asarray(prompts, np.int64)
    if prompts.ndim != 2 or not 1 <= prompts.shape[1] < longest or beams < 1 or shortest > longest:
        raise DataError(
            f"beam search: expected at least 1 beam, a prompt of 1 to {longest - 1} ids and a shortest text of at most {longest}, found "
            f"{beams}, a prompt of shape {prompts.shape} and {shortest}."
        )
    items = [_Item([tuple(prompt)]) for prompt in prompts.tolist()]
    for length in range(prompts.shape[1], longest):
        active = [place for place, item in enumerate(items) if not item.done]
        if not active:
            break
        counts = [len(items[place].ids) for place in active]
        ids = np.asarray([text for place in active for text in items[place].ids], np.int64)
        rows = log_softmax(step(ids, np.repeat(active, counts)))
        if length < shortest:
            rows[:, end] = -np.inf
        for place, of_item in zip(active, np.split(rows, np.cumsum(counts)[:-1]), strict=True):
            items[place].advance(of_item, end, beams)
    for item in items:
        if not item.done:
            for ids, total in zip(item.ids, item.sums, strict=True):
                item.keep(ids, total, beams)
    return [item.kept[0] for item in items]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities over the last axis, float64. Raises ArtifactError for logits that are not numbers."""
    logits = np.asarray(logits, np.float64)
    if np.isnan(logits).any() or np.isposinf(logits).any():
        raise ArtifactError("The scores of next tokens are not finite: the model is broken. Train or export it again.")
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    """Return the places of the highest scores above -inf, highest first and equal ones in order."""
    count = min(count, len(scores))
    least = np.partition(scores, len(scores) - count)[len(scores) - count]
    places = np.flatnonzero((scores >= least) & (scores > -np.inf))
    return places[np.argsort(-scores[places], kind="stable")][:count]
