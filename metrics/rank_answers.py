"""Which of many answers a decoder finds likeliest, as BLIP ranks them: the first token chooses some, the whole answer decides."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from clipress.data.spec import CANDIDATES
from clipress.errors import DataError
from clipress.metrics.beam import log_softmax

Score = Callable[[int, np.ndarray], np.ndarray]
"""The place of a question and places of answers [k] -> log-likelihoods of the answers [k]."""


def likeliest_answers(first: np.ndarray, answers: np.ndarray, score: Score, k: int = CANDIDATES) -> np.ndarray:
    """Return the place of the best answer to every question, int64 [Q].

    Args:
        first: logits of the token after the start, [Q, V].
        answers: ids of the candidates, int64 [A, L], whose first column is the start token.
        score: is called once per question, with the k answers whose first token is likeliest; of equal ones the earlier.
        k: a k above the number of answers is cut.

    Raises DataError for no candidates or a k below 1.
    """
    if not len(answers) or k < 1:
        raise DataError(f"answers: expected at least 1 candidate and a k of at least 1, found {len(answers)} and {k}.")
    best = np.empty(len(first), np.int64)
    for question, row in enumerate(log_softmax(first)[:, answers[:, 1]]):
        nearest = np.sort(np.argsort(-row, kind="stable")[:k])
        best[question] = nearest[np.argmax(score(question, nearest))]
    return best
