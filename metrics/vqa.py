"""Accuracy of answers to questions about images, as VQA's own evaluation counts it (Antol et al. 2015; Goyal et al. 2017).

    accuracy of an answer = mean over its annotators of min(1, others of them who gave it / 3)

The answer is cleaned first: punctuation, number words, articles, contractions. What people said is cleaned of punctuation alone, and
only where they disagree.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from clipress.errors import DataError
from clipress.metrics.outcomes import Outcomes

AGREEING = 3  # people besides the one left out who make an answer right
PEOPLE = 10
_DIGITS = "zero one two three four five six seven eight nine ten".split()
NUMBERS = {word: str(number) for number, word in enumerate(_DIGITS)} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_->@<`,?!'
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll
how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've
we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
"""Words to which one apostrophe is given back, if it is all that they lack."""
_LACKING = {
    word[:place] + word[place + 1 :]: word
    for word in CONTRACTIONS
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the official list has this one the wrong way round
_NUMBER_WITH_COMMA, _STOP = re.compile(r"\d,\d"), re.compile(r"\.(?!\d)")
_STOPS = 32  # removed at most: the official code gives a flag in the place of the count


def without_punctuation(text: str) -> str:
    """Remove marks beside a blank, and all of them from a text with a number such as 1,000; others become blanks."""
    removes_all, cleaned = bool(_NUMBER_WITH_COMMA.search(text)), text
    for mark in PUNCTUATION:
        stands_apart = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if removes_all or stands_apart else " ")
    return _STOP.sub("", cleaned, count=_STOPS)


def cleaned(answer: str) -> str:
    """Return an answer as the official evaluation compares it."""
    words = without_punctuation(answer.replace("\n", " ").replace("\t", " ").strip()).lower().split()
    words = (NUMBERS.get(word, word) for word in words)
    return " ".join(_LACKING.get(word, word) for word in words if word not in ARTICLES)


def accuracy(answer: str, truths: Sequence[str]) -> float:
    """Return an answer's accuracy, 0 to 1, given what people said, mostly ten of them; what one said is what all would have."""
    truths = list(truths) * PEOPLE if len(truths) == 1 else list(truths)
    if len(set(truths)) > 1:
        truths = [without_punctuation(truth) for truth in truths]
    own = cleaned(answer)
    agreeing = truths.count(own)
    return float(np.mean([min(1.0, (agreeing - (truth == own)) / AGREEING) for truth in truths]))


def score_answers(
    answers: Sequence[str], truths: Sequence[Sequence[str]], images: np.ndarray | None = None
) -> dict[str, Outcomes]:
    """Return the accuracy of an answer per question; `images` [N], the image of each, are the units of its error.

    Raises DataError for a question that nobody answered.
    """
    if len(answers) != len(truths) or not all(truths):
        known = sum(map(bool, truths))
        raise DataError(f"answers: expected what people said to each of {len(answers)} questions, found {known}.")
    values = [accuracy(answer, said) for answer, said in zip(answers, truths, strict=True)]
    return {"accuracy": Outcomes(np.asarray(values), units=images)}
