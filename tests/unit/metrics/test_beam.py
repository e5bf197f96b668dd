"""Beam search finds what trying every text finds, and follows greedy decoding with one beam."""

import itertools

import numpy as np
import pytest

from clipress.errors import ArtifactError, DataError
from clipress.metrics.beam import beam_search, log_softmax

WORDS, END = 4, 3


def table(seed, items=3):
    """Return a step whose logits depend on the item and on all ids so far."""

    def step(ids, item):
        rows = [np.random.default_rng([seed, owner, *row]).standard_normal(WORDS) * 2 for row, owner in zip(ids.tolist(), item, strict=True)]  # fmt: skip
        return np.asarray(rows)

    return step, np.arange(items)[:, None] % END


def log_p(step, ids, item, token):
    return log_softmax(step(np.asarray([ids]), np.asarray([item])))[0, token]


def best_of_all(step, prompt, item, shortest, longest):
    """Score every text; one of the longest length needs no end token."""
    found = []
    for length in range(longest - len(prompt) + 1):
        for more in itertools.product(range(END), repeat=length):
            ids = (*prompt, *more)
            total = sum(log_p(step, ids[:place], item, ids[place]) for place in range(len(prompt), len(ids)))
            if len(ids) < longest:
                if len(ids) < shortest:
                    continue
                total += log_p(step, ids, item, END)
            found.append((total / len(ids), ids))
    return max(found)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shortest, longest, start", [(1, 5, 1), (3, 5, 1), (4, 4, 2), (1, 6, 2)])
def test_with_enough_beams_it_finds_the_best_of_all_texts(seed, shortest, longest, start):
    step, prompts = table(seed)
    prompts = np.repeat(prompts, start, 1)
    found = beam_search(step, prompts, END, beams=400, shortest=shortest, longest=longest)
    for item, (text, prompt) in enumerate(zip(found, prompts.tolist(), strict=True)):
        score, ids = best_of_all(step, prompt, item, shortest, longest)
        assert text.ids == ids and text.score == pytest.approx(score)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shortest", [1, 4])
def test_one_beam_is_greedy(seed, shortest):
    step, prompts = table(seed)
    for item, text in enumerate(beam_search(step, prompts, END, beams=1, shortest=shortest, longest=8)):
        ids = prompts[item].tolist()
        while len(ids) < 8:
            logits = step(np.asarray([ids]), [item])[0]
            token = int(np.argmax(logits[:END] if len(ids) < shortest else logits))
            if token == END:
                break
            ids.append(token)
        assert text.ids == tuple(ids)


def test_more_beams_find_what_greedy_misses_and_the_prompt_counts_in_the_length():
    first, later = np.log([0.6, 0.4, 1e-9, 1e-9]), {0: [0.3, 0.3, 0.3, 0.1], 1: [0.005, 0.004, 0.001, 0.99]}

    def step(ids, item):
        return np.asarray([first if len(row) == 2 else np.log(later[row[2]]) for row in ids.tolist()])

    greedy, wide = (beam_search(step, np.array([[0, 0]]), END, beams, 1, 4)[0] for beams in (1, 2))
    assert greedy.ids == (0, 0, 0, 0) and greedy.score == pytest.approx(np.log(0.6 * 0.3) / 4)
    assert wide.ids == (0, 0, 1) and wide.score == pytest.approx(np.log(0.4 * 0.99) / 3, abs=1e-6)


def test_an_item_of_a_batch_is_found_as_it_is_alone():
    step, prompts = table(11, items=5)
    together = beam_search(step, prompts, END, 3, 2, 9)
    for item in range(5):
        alone = beam_search(
            lambda ids, _, item=item: step(ids, np.full(len(ids), item)), prompts[item][None], END, 3, 2, 9
        )
        assert alone == [together[item]]


def test_a_search_stops_when_nothing_better_can_come():
    lengths = []

    def step(ids, item):
        lengths.append(ids.shape[1])
        return np.tile(np.log([0.02, 0.02, 0.01, 0.95]), (len(ids), 1))

    (text,) = beam_search(step, np.array([[0]]), END, beams=2, shortest=1, longest=20)
    assert text.ids == (0,) and text.score == pytest.approx(np.log(0.95)) and lengths[-1] < 6


def test_logits_and_log_probabilities_are_alike_and_ties_go_to_the_smaller_id():
    def even(ids, item):
        return np.zeros((len(ids), WORDS), np.float32)

    assert beam_search(even, np.array([[2]]), END, 3, 4, 4)[0].ids == (2, 0, 0, 0)
    step, prompts = table(3)
    shifted = beam_search(lambda ids, item: step(ids, item) + 5, prompts, END, 3, 2, 7)
    for one, other in zip(shifted, beam_search(step, prompts, END, 3, 2, 7), strict=True):
        assert one.ids == other.ids and one.score == pytest.approx(other.score)


@pytest.mark.parametrize("limits", [(0, 1, 9), (3, 10, 9), (3, 1, 1)])
def test_limits_that_exclude_one_another_are_refused(limits):
    step, prompts = table(0)
    with pytest.raises(DataError, match="beam search: expected at least 1 beam"):
        beam_search(step, prompts, END, *limits)


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(ArtifactError, match="not finite"):
        beam_search(lambda ids, _: np.full((len(ids), WORDS), np.nan), np.array([[0]]), END)
