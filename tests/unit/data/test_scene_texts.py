"""Statements and questions about scenes are right, judged by a reader of their words alone; half of the statements are true."""

import hashlib
import re
from collections import Counter

import pytest

from clipress.data import scenes
from clipress.data.scene_texts import ANSWERS, questions, statements

SPLITS = ("train", "val", "test")


def kinds(scene, words):
    """Return the objects of a scene that words such as `small circle` or `red object` describe."""
    return [kind for kind in scene.objects if all(word in kind or word == "object" for word in words.split())]


def is_shown(scene, thing):
    words = re.fullmatch(r"an? (.+)", thing)[1]
    if words.endswith(" background"):
        return scene.background == words.split()[0]
    return len(kinds(scene, words)) > 0


def is_true(text, left, right):
    which, thing = re.fullmatch(r"(.+?) images? shows? (.+)", text).groups()
    shown = [is_shown(left, thing), is_shown(right, thing)]
    return {
        "both": shown == [True, True],
        "neither": shown == [False, False],
        "only the left": shown == [True, False],
        "only the right": shown == [False, True],
        "at least one": True in shown,
    }[which]


def answer(text, scene):
    """Answer a question, or fail if it has no single answer."""
    if text == "what color is the background ?":
        return scene.background
    if found := re.fullmatch(r"is there (.+) \?", text):
        return "yes" if is_shown(scene, found[1]) else "no"
    if found := re.fullmatch(r"how many (\w+)s are there \?", text):
        return str(len(kinds(scene, {"crosse": "cross"}.get(found[1], found[1]))))
    asked, words = re.fullmatch(r"what (color|shape|size) is the (.+) \?", text).groups()
    ((shape, colour, size),) = kinds(scene, words)
    return {"color": colour, "shape": shape, "size": size}[asked]


@pytest.mark.parametrize("split", SPLITS)
def test_every_statement_is_labelled_by_what_the_images_show(split):
    drawn, made = scenes.scenes()[split], statements(split)
    assert len(made) == len(drawn)
    for one in made:
        assert one.is_true == is_true(one.text, drawn[one.left], drawn[one.right]), one


@pytest.mark.parametrize("split", SPLITS)
def test_every_question_is_answered_by_what_the_image_shows(split):
    drawn, asked = scenes.scenes()[split], questions(split)
    assert [one.image for one in asked] == list(range(len(drawn)))
    for one in asked:
        assert one.answer == answer(one.text, drawn[one.image]) and one.answer in ANSWERS, one


@pytest.mark.parametrize("split", SPLITS)
def test_half_of_the_statements_are_true_and_their_words_do_not_say_which(split):
    made = statements(split)
    assert 2 * sum(one.is_true for one in made) == len(made)
    for word in ("both", "neither", "only", "least", "left", "right", "black", "grey", "white"):
        said = [one.is_true for one in made if word in one.text.split()]
        assert len(said) > 10 and abs(sum(said) / len(said) - 0.5) < 4 * 0.5 / len(said) ** 0.5, word


def test_questions_are_of_every_kind_and_have_every_answer():
    asked = questions("train")
    assert Counter(one.answer for one in asked).keys() == set(ANSWERS) and len(ANSWERS) == 21
    polar = Counter(one.answer for one in asked if one.text.startswith("is there"))
    assert 0.9 < polar["yes"] / polar["no"] < 1.1


def test_texts_are_the_same_on_every_machine_and_differ_between_seeds():
    text = "\n".join(f"{one.left} {one.right} {one.text} {one.is_true}" for one in statements("test"))
    text += "\n".join(f"{one.image} {one.text} {one.answer}" for one in questions("test"))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "49bca7b73151ef2b"
    assert statements("val", 1) != statements("val") and questions("val", 1) != questions("val")
