"""BERT's word pieces: transformers' ids, no special tokens out of a text, and texts decoded as BLIP decodes them."""

import json

import numpy as np
import pytest
from oracles import run_oracle

from clipress.data.tokens import tokenizer_from_spec
from clipress.data.word_pieces import WordPieces, vocabulary_of, word_pieces_spec
from clipress.errors import ArtifactError
from clipress.runtime.export_folder import Tokenizer as Described

TEXTS = ["A man's dog isn't at 5 p.m.!", "naïve CAFÉ dogs, cats", "", "unheard-of words " * 9, "一只 cat\ttab", "a"]
VOCABULARY = vocabulary_of(
    ["a man's dog isn't at home?", "naive cafe, cat. a picture of", "0123456789 bcfghjklpqrvwxyz"]
)


@pytest.fixture(scope="module")
def pieces():
    return WordPieces(word_pieces_spec(VOCABULARY, 40))


@pytest.mark.oracle
def test_ids_and_masks_are_transformers(pieces, tmp_path):
    (tmp_path / "vocab.txt").write_text(VOCABULARY, encoding="utf-8")
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    run_oracle("word_pieces_oracle.py", tmp_path)
    theirs = json.loads((tmp_path / "ids.json").read_text())
    found = pieces(TEXTS, length=12)
    np.testing.assert_array_equal(found, theirs["ids"])
    np.testing.assert_array_equal(found != pieces.pad, theirs["mask"])
    assert (pieces.decode, pieces.encode) == (theirs["decode"], theirs["encode"])
    assert pieces.encode == len(VOCABULARY.splitlines()) + 1


def test_a_special_token_in_a_text_is_letters(pieces):
    special = {pieces.pad, pieces.end, pieces.decode, pieces.encode}
    row = pieces(["a [SEP] dog [PAD] [DEC][ENC] [CLS]"])[0].tolist()
    assert row[0] == pieces.start and row[-1] == pieces.end and not special & set(row[1:-1])
    assert pieces.start not in row[1:]


def test_the_first_token_can_be_another_and_long_texts_keep_their_end(pieces):
    ids = pieces(["a dog", "a " * 50], first=pieces.decode, length=6)
    assert ids.shape == (2, 6) and (ids[:, 0] == pieces.decode).all()
    assert ids[1, -1] == pieces.end and ids[0].tolist()[3:] == [pieces.end, pieces.pad, pieces.pad]
    assert pieces(["a " * 50]).shape == (1, 40) and pieces([]).shape == (0, 0)


def test_its_description_survives_an_export_and_makes_the_same_ids(pieces):
    again = json.loads(Described.model_validate(word_pieces_spec(VOCABULARY, 40)).model_dump_json())
    whole = tokenizer_from_spec(again)(["a dog [SEP]"])
    ids = pieces(["a dog [SEP]"])
    assert whole.shape == (1, 40)
    np.testing.assert_array_equal(whole[:, : ids.shape[1]], ids)
    assert (whole[:, ids.shape[1] :] == pieces.pad).all()


def test_a_prompt_begins_every_text_and_is_left_out_of_what_is_written(pieces):
    spec = word_pieces_spec(VOCABULARY, 8, prompt="a picture of ")
    prompted = WordPieces(json.loads(Described.model_validate(spec).model_dump_json()))
    whole = pieces(["a picture of a dog"])
    np.testing.assert_array_equal(prompted(["a dog"]), whole)
    long = prompted(["a " * 50])
    assert long.shape == (1, 8) and long[0, -1] == pieces.end and long[0, :4].tolist() == whole[0, :4].tolist()
    assert prompted.begun().tolist() == [pieces.decode, *whole[0, 1:4]] and pieces.begun().tolist() == [pieces.decode]
    assert prompted.written(whole[0]) == "a dog" == pieces.written(pieces(["a dog"])[0])
    with pytest.raises(ArtifactError, match="expected a text of at most 1024 letters, found 7"):
        tokenizer_from_spec({**spec, "prompt": 7})


@pytest.mark.parametrize(
    "text", ["a man's dog isn't at home.", "a cat, a dog, a man?", "dogs of a picture!", "a t - shirt"]
)
def test_a_text_is_decoded_as_it_was_written_in_most_cases(text):
    pieces = WordPieces(word_pieces_spec(vocabulary_of([text]), 40))
    assert pieces.text([pieces.decode, *pieces([text])[0, 1:], pieces.pad]) == text


def test_pieces_are_joined_and_endings_glued(pieces):
    tokens = ["[CLS]", "do", "n't", "i", "'m", "we", "'ve", "you", "'re", "man", "'s", "man", "'", "s", "dog", "##s", ".", "[SEP]"]  # fmt: skip
    names = list(dict.fromkeys(["[PAD]", "[UNK]", "[MASK]", *tokens]))
    made = WordPieces(word_pieces_spec("\n".join(names), 40))
    assert made.text(names.index(token) for token in tokens) == "don't i'm we've you're man's man's dogs."


def test_a_vocabulary_without_its_special_tokens_is_refused():
    with pytest.raises(ArtifactError, match=r"lacks \[CLS\]"):
        word_pieces_spec(VOCABULARY.replace("[CLS]\n", ""), 40)
