"""The ranked answer is the likeliest of all candidates, or of those whose first token is likely."""

import numpy as np
import pytest

from clipress.errors import DataError
from clipress.metrics.beam import log_softmax
from clipress.metrics.rank_answers import likeliest_answers

PAD, START, END, WORDS = 0, 1, 2, 9
ANSWERS = np.array(
    [[START, *row, *[PAD] * (4 - len(row))] for row in ([5, END], [5, 6, END], [3, END], [4, 7, 8, END], [5, 3, END])]
)


def decoder(seed, questions=6):
    """Return all logits [Q, A, L, V], those of the first token [Q, V], and a score of answers by them."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((questions, len(ANSWERS), 5, WORDS)) * 2
    logits[:, :, 0] = logits[:, :1, 0]  # the first token depends on the question alone

    def score(question, places):
        chances = log_softmax(logits[question])
        return np.array([sum(chances[a, n, token] for n, token in enumerate(ANSWERS[a, 1:]) if token) for a in places])

    return logits, logits[:, 0, 0], score


def test_with_all_candidates_it_is_the_likeliest_answer():
    _, first, score = decoder(0, questions=20)
    wanted = [max(range(5), key=lambda place: score(q, np.arange(5))[place]) for q in range(20)]
    for k in (5, 128):
        assert likeliest_answers(first, ANSWERS, score, k).tolist() == wanted
    assert len(set(wanted)) > 2


def test_with_fewer_only_those_of_a_likely_first_token_are_scored():
    _, first, score = decoder(1, questions=20)
    asked = []

    def noted(question, places):
        asked.append(places.tolist())
        return score(question, places)

    found = likeliest_answers(first, ANSWERS, noted, 2)
    chances = log_softmax(first)[:, ANSWERS[:, 1]]
    for question, places in enumerate(asked):
        wanted = sorted(sorted(range(5), key=lambda place: (-chances[question, place], place))[:2])
        assert places == wanted and found[question] in places
    assert [0, 1] in asked  # three share a first token: the earlier ones go first


def test_one_candidate_is_the_answer_and_equal_ones_are_stable():
    _, first, score = decoder(2)
    assert likeliest_answers(first, ANSWERS[3:4], lambda q, _: score(q, np.array([3])), 7).tolist() == [0] * 6
    assert likeliest_answers(first, ANSWERS, lambda _, places: np.zeros(len(places)), 5).tolist() == [0] * 6


def test_no_candidates_are_refused():
    _, first, score = decoder(0)
    with pytest.raises(DataError, match="at least 1 candidate"):
        likeliest_answers(first, ANSWERS[:0], score)
