"""VQA accuracy is the official one: answers are cleaned as it cleans them, and counted as it counts them."""

import itertools

import numpy as np
import pytest

from clipress.errors import DataError
from clipress.metrics.outcomes import percent, standard_error
from clipress.metrics.vqa import accuracy, cleaned, score_answers, without_punctuation


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("The Red", "red"),
        ("two", "2"),
        ("None", "0"),
        (" a dog\tand an\ncat ", "dog and cat"),
        ("left/right", "left right"),
        ("left / right", "left right"),
        ("t-shirt", "t shirt"),
        ("- t-shirt", "tshirt"),  # a mark that stands apart once is removed everywhere
        ("1,000", "1000"),
        ("1,000 t-shirt?", "1000 tshirt"),  # beside such a number all marks are removed
        ("yes.", "yes"),
        ("3.5", "3.5"),
        ("u.s.", "us"),
        ("dont", "don't"),
        ("wouldn'tve", "wouldn't've"),
        ("somebody'd", "somebodyd"),
        ("its", "its"),
        ("ten-ten", "10 10"),
    ],
)
def test_an_answer_is_cleaned(answer, expected):
    assert cleaned(answer) == expected


def test_at_most_32_full_stops_are_removed():
    assert without_punctuation("." * 40) == "." * 8


@pytest.mark.parametrize("matches", range(11))
def test_three_others_make_an_answer_right(matches):
    truths = ["red"] * matches + ["blue"] * (10 - matches)
    nine = list(itertools.combinations(truths, 9))  # every way to leave one out
    assert len(nine) == 10
    wanted = np.mean([min(1, others.count("red") / 3) for others in nine])
    assert accuracy("Red", truths) == pytest.approx(wanted)
    assert accuracy("Red", truths) == pytest.approx([0, 0.3, 0.6, 0.9, *[1] * 7][matches])


def test_truths_are_cleaned_of_punctuation_alone_and_only_where_they_differ():
    assert accuracy("t-shirt", ["t-shirt"] * 10) == 0  # as they agree, the hyphen stays, which the answer loses
    assert accuracy("t-shirt", ["t-shirt"] * 9 + ["shirt"]) == 1
    assert accuracy("two", ["two"] * 9 + ["2"]) == pytest.approx(0.3)  # number words of truths stay
    assert accuracy("dog", ["The dog"] * 9 + ["Dog"]) == 0


def test_a_single_truth_is_what_everybody_said():
    assert accuracy("red", ["red"]) == 1 and accuracy("blue", ["red"]) == 0


def test_a_set_has_the_mean_of_its_questions_and_the_error_of_its_images():
    truths = [["red"] * 10, ["red"] * 2 + ["blue"] * 8, ["green"] * 10, ["yes"] * 10]
    images = np.array([0, 0, 1, 2])
    found = score_answers(["red", "red", "no", "yes"], truths, images)["accuracy"]
    np.testing.assert_allclose(found.values, [1, 0.6, 0, 1])
    assert percent(found) == pytest.approx(65)
    by_image = np.array([1 + 0.6 - 2 * 0.65, 0 - 0.65, 1 - 0.65]) / 4
    assert standard_error(found) == pytest.approx(100 * np.sqrt((by_image**2).sum()))


def test_questions_without_truths_are_refused():
    with pytest.raises(DataError, match="what people said to each of 2 questions, found 1"):
        score_answers(["a", "b"], [["a"], []])
