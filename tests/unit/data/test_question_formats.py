"""Statements about two images and questions about one: read as published, and made into training batches."""

import json

import numpy as np
import pytest
from PIL import Image

from clipress.compress.grad_cache import split
from clipress.data.bad_records import Record
from clipress.data.dataset import TrainingSet, exchanged
from clipress.data.eval_sets import evalsets
from clipress.data.sampler import Draw
from clipress.data.sources import open_source
from clipress.data.spec import SourceSpec
from clipress.data.transforms import Augment, Preprocess, fitted, normalised
from clipress.errors import DataError, RecipeError

COLOURS = ("red", "green", "blue", "white")
PREPROCESS = Preprocess(size=8)


@pytest.fixture
def folder(tmp_path):
    for name in COLOURS:
        Image.new("RGB", (12, 9), name).save(tmp_path / f"{name}.png")
    return tmp_path


def opened(folder, form, rows, **more):
    path = folder / f"{len(list(folder.glob('*.rows')))}.rows"  # a new one, since open sources are kept
    path.write_text(json.dumps(rows))
    return open_source(SourceSpec(format=form, annotations=path, images=folder, **more))


def pair(first="red.png", other="blue.png", sentence="The left is red.", label="True"):
    return {"images": [first, other], "sentence": sentence, "label": label}


def asked(image="red.png", question="What color?", answer=("red",) * 10, **more):
    return {"image": image, "question": question, "answer": list(answer), "dataset": "vqa", **more}


def words(texts):
    """Tokenise texts: a row of the letters' numbers."""
    rows = np.zeros((len(texts), 24), np.int64)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = [ord(letter) for letter in text[:24]]
    return rows


def written(row):
    return "".join(chr(letter) for letter in row if letter)


# nlvr2


def test_a_statement_has_two_images_in_the_order_of_the_file_and_a_label(folder):
    source = opened(folder, "nlvr2", [pair(), pair("green.png", "white.png", "Both are (green)!", "False")])
    assert [source.label(i) for i in range(2)] == [1, 0] and source.captions(1) == ("Both are (green)!",)
    shown = [[image.getpixel((0, 0)) for image in (source.image(i), source.other_image(i))] for i in range(2)]
    assert shown == [[(255, 0, 0), (0, 0, 255)], [(0, 128, 0), (255, 255, 255)]]


def test_a_statement_is_normalised_to_40_words(folder):
    many = "Dogs (two) " + " ".join(f"w{i}" for i in range(50))
    (text,) = opened(folder, "nlvr2", [pair(sentence=many)], text_normaliser="blip").captions(0)
    assert text.split() == ["dogs", "two", *(f"w{i}" for i in range(38))]


@pytest.mark.parametrize(
    "row, message",
    [
        ({**pair(), "images": ["red.png"]}, "row 0: expected two 'images', a 'sentence', and a 'label'"),
        (pair(label="yes"), "row 0: expected two 'images'"),
        ({**pair(), "label": True}, "row 0: expected two 'images'"),
        ("text", "row 0: expected two 'images'"),
        (pair(other="gone.png"), "row 0: no such file: gone.png"),
        (pair(first="gone.png"), "row 0: no such file: gone.png"),
        (pair(other="../gone.png"), "is outside"),
        (pair(sentence=" "), "row 0: empty caption"),
    ],
)
def test_a_file_of_unusable_statements_is_one_message(folder, row, message):
    with pytest.raises(DataError, match="1 of 1 records cannot be used") as error:
        opened(folder, "nlvr2", [row])
    assert message in str(error.value)


def test_one_unusable_statement_is_skipped_with_both_of_its_images(folder):
    rows = [pair(), pair(other="gone.png"), *[pair("green.png", "white.png", label="False")] * 4]
    source = opened(folder, "nlvr2", rows)
    assert len(source) == 5 and source.skipped == 1 and source.label(1) == 0
    assert source.other_image(1).getpixel((0, 0)) == (255, 255, 255)


def test_a_changed_label_or_second_image_changes_the_fingerprint(folder):
    found = [opened(folder, "nlvr2", [row]).fingerprint for row in (pair(), pair(label="False"), pair(other="green.png"))]  # fmt: skip
    assert len(set(found)) == 3


# vqa


def test_questions_have_answers_with_weights_ids_and_groups_by_image(folder):
    rows = [
        asked(answer=["red"] * 7 + ["dark red"] * 3, question_id=458),
        asked(answer="red", dataset="vg"),
        asked("blue.png"),
    ]
    rows[1]["answer"] = "red"
    source = opened(folder, "vqa", rows)
    assert source.answer_weights(0) == {"red": 0.7, "dark red": pytest.approx(0.3)} and len(source.answers(0)) == 10
    assert source.answer_weights(1) == {"red": 0.2} and source.answers(1) == ("red",)
    assert [source.group(i) for i in range(3)] == [0, 0, 1] and source.question_id(0) == 458
    assert source.captions(0) == ("What color?",) and source.candidates is None


def test_questions_are_normalised_and_answers_are_not(folder):
    source = opened(folder, "vqa", [asked(question="What's (this): a Dog?", answer=["A Dog!"])], text_normaliser="blip")
    assert source.captions(0) == ("what's this a dog?",) and source.answers(0) == ("A Dog!",)


def test_a_file_for_testing_has_no_answers(folder):
    rows = [{"image": "red.png", "question": "What?", "question_id": 3, "dataset": "vqa"}]
    source = opened(folder, "vqa", rows)
    assert not source.has_answers and source.answers(0) == () and source.question_id(0) == 3


@pytest.mark.parametrize(
    "row, message",
    [
        ({**asked(), "answer": [1, 2]}, "'answer' as a text or a list of texts"),
        ({**asked(), "question": None}, "expected an 'image', a 'question'"),
        (asked("gone.png"), "row 0: no such file: gone.png"),
        (7, "expected an 'image'"),
    ],
)
def test_a_file_of_unusable_questions_is_one_message(folder, row, message):
    with pytest.raises(DataError, match="1 of 1 records cannot be used") as error:
        opened(folder, "vqa", [row])
    assert message in str(error.value)


def listed(folder, answers):
    (folder / "answers.json").write_text(json.dumps(answers))
    return folder / "answers.json"


def test_the_answers_to_choose_from_are_read_in_order(folder):
    path = listed(folder, ["yes", "red", "yes", "no"])
    assert opened(folder, "vqa", [asked()], answers=path).candidates == ("yes", "red", "no")
    rows = [asked(), asked(answer=["pink"])]  # answers outside of it are as usual
    assert len(opened(folder, "vqa", rows, answers=path)) == 2


@pytest.mark.parametrize("answers", [[], {"yes": 1}, ["yes", ""], "yes"])
def test_a_list_that_is_none_is_refused(folder, answers):
    with pytest.raises(DataError, match="expected a JSON list of answers"):
        opened(folder, "vqa", [asked()], answers=listed(folder, answers))


def test_a_list_without_the_answers_of_any_question_is_refused(folder):
    with pytest.raises(DataError, match=r"no question of .* has an answer in this list, the first one's is \('red',\)"):
        opened(folder, "vqa", [asked(), asked(answer=["pink"])], answers=listed(folder, ["yes", "no"]))


# the embedded sets


def test_embedded_statements_and_questions_are_limited_like_others():
    whole, part = (open_source(SourceSpec(format="statements", split="test", limit=limit)) for limit in (None, 7))
    assert (len(whole), len(part)) == (500, 7) and whole.fingerprint != part.fingerprint
    assert [part.label(i) for i in range(7)] == [whole.label(i) for i in range(7)]
    np.testing.assert_array_equal(part.other_image(6), whole.other_image(6))
    questions = open_source(SourceSpec(format="questions", split="val", limit=5))
    assert len(questions) == 5 and len(questions.answers(4)) == 10 and questions.answers(4)[0] in questions.candidates
    assert questions.answer_weights(4) == {questions.answers(4)[0]: 1.0}


def test_evaluation_reads_second_images_labels_and_answers():
    statements, questions = evalsets([SourceSpec(format=form, split="test", limit=5) for form in ("statements", "questions")])  # fmt: skip
    found = np.concatenate(list(statements.pixel_batches(PREPROCESS, 2, others=True)))
    wanted = normalised(np.stack([fitted(statements.source.other_image(i), PREPROCESS) for i in range(5)]), PREPROCESS)
    np.testing.assert_array_equal(found, wanted)
    assert statements.labels().tolist() == [statements.source.label(i) for i in range(5)]
    assert questions.answers() == [questions.source.answers(i) for i in range(5)]


# batches


def test_a_batch_of_statements_has_both_images_and_what_is_true(folder):
    source = opened(folder, "nlvr2", [pair(), pair("green.png", "white.png", "Both?", "False")])
    made = TrainingSet([source], PREPROCESS, words, Augment(), 0)
    arrays = made.__getitems__([Draw(0, 1, 0), Draw(0, 0, 0)])
    assert arrays["pixels"][:, 0, 0].tolist() == [[0, 128, 0], [255, 0, 0]]
    assert arrays["other_pixels"][:, 0, 0].tolist() == [[255, 255, 255], [0, 0, 255]]
    assert arrays["label"].tolist() == [0, 1] and written(arrays["ids"][0]) == "Both?"
    assert made.forms == {"pixels": PREPROCESS, "other_pixels": PREPROCESS}


def test_both_images_have_views_of_their_own(folder):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(folder / f"{name}.png")
    source = opened(folder, "nlvr2", [pair("a.png", "a.png")])
    made = TrainingSet([source], PREPROCESS, words, Augment(crop_scale=(0.2, 0.5)), 0)
    first, again, other = (made.__getitems__([Draw(0, 0, epoch)]) for epoch in (0, 0, 1))
    assert not np.array_equal(first["pixels"], first["other_pixels"])
    np.testing.assert_array_equal(first["other_pixels"], again["other_pixels"])
    assert not np.array_equal(first["other_pixels"], other["other_pixels"])


def test_half_of_the_pairs_are_exchanged_with_the_words_left_and_right(folder):
    source = opened(folder, "nlvr2", [pair(sentence="the left is red right")])
    made = TrainingSet([source], PREPROCESS, words, Augment(exchange=True), 0)
    arrays = made.__getitems__([Draw(0, 0, epoch) for epoch in range(60)])
    is_red = arrays["pixels"][:, 0, 0, 0] == 255
    assert 15 < is_red.sum() < 45 and (arrays["label"] == 1).all()
    assert {(bool(red), written(row)) for red, row in zip(is_red, arrays["ids"], strict=True)} == {
        (True, "the left is red right"),
        (False, "the right is red left"),
    }
    twice = exchanged(exchanged(Record(0, "a", ("left leftover",), (), "b")))
    assert (twice.image, twice.other_image, twice.captions) == ("a", "b", ("left leftover",))


def test_a_pair_that_cannot_be_read_is_replaced_as_a_whole(folder):
    (folder / "bad.png").write_bytes(b"no image")
    source = opened(folder, "nlvr2", [pair(other="bad.png", label="False"), *[pair()] * 4])
    arrays = TrainingSet([source], PREPROCESS, words, Augment(), 0).__getitems__([Draw(0, 0, 0)])
    assert arrays["label"].tolist() == [1] and len(arrays["bad"]) >= 1 and "bad.png" in arrays["bad"][0].reason


def test_a_batch_of_questions_has_a_row_for_every_answer_that_differs(folder):
    rows = [asked(answer=["red"] * 7 + ["dark red"] * 3), asked("blue.png", "Which?", answer=["blue"])]
    source = opened(folder, "vqa", [*rows, {"image": "red.png", "question": "Why?"}])
    made = TrainingSet([source], PREPROCESS, words, Augment(), 0)
    arrays = made.__getitems__([Draw(0, index, 0) for index in (1, 2, 0)])
    assert [written(row) for row in arrays["ids"]] == ["Which?", "Why?", "What color?"]
    assert [written(row) for row in arrays["answers"]] == ["blue", "red", "dark red"]
    assert arrays["owner"].tolist() == [0, 2, 2]
    np.testing.assert_allclose(arrays["answer_weight"], [1, 0.7, 0.3], rtol=1e-6)
    with pytest.raises(DataError, match="expected answers to the questions of a batch, found none"):
        made.__getitems__([Draw(0, 2, 0)])


def test_answers_are_cut_to_what_is_read_of_them(folder):
    source = opened(folder, "vqa", [asked(question="What is it called?")])
    made = TrainingSet([source], PREPROCESS, words, Augment(), 0, needed_ids=lambda ids: ids[:, : (ids != 0).sum(1).max()])  # fmt: skip
    arrays = made.__getitems__([Draw(0, 0, 0)])
    assert arrays["ids"].shape == (1, 18) and arrays["answers"].shape == (1, 3)


def test_a_batch_with_several_answers_to_a_question_is_not_cut():
    import torch

    with pytest.raises(RecipeError, match="grad_cache_chunks"):
        split({"ids": torch.zeros(4, 3), "answers": torch.zeros(7, 3)}, 2)
    assert [len(part["ids"]) for part in split({"ids": torch.zeros(4, 3)}, 2)] == [2, 2]


def test_pairs_are_not_read_for_a_teacher_with_another_preprocessing(folder):
    source = opened(folder, "nlvr2", [pair()])
    with pytest.raises(DataError, match="pairs of images require a teacher that runs"):
        TrainingSet([source], PREPROCESS, words, Augment(), 0, of_teachers=[Preprocess(size=16)])
