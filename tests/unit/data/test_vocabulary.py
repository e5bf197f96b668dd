"""Reduced vocabularies: corpus texts keep their pieces, other texts fall into smaller ones and decode to the same text."""

import copy
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer, get_pairs

from clipress.data.bpe import ALWAYS, SPECIAL, ClipBpe, needed_tokens
from clipress.data.tokens import count_tokens, tokenizer_from_spec
from clipress.data.vocabulary import kept_tokens, reduced, translation
from clipress.errors import ArtifactError

LENGTH = 40
WHOLE = {"name": "clip-bpe", "context_length": LENGTH, "kwargs": {}}
CORPUS = (
    "A photo of a red circle.",
    "two blue squares, left of a star",
    "it's   &amp; caf\u00e9",
    "",
    "seven 7s \U0001f600",
)
OTHERS = (
    "a photograph of circular zebras",
    "\u65e5\u672c\u8a9e",
    "squarecircle photophoto",
    "<end_of_text> \x00",
    "starlings 2026",
)
words = st.one_of(st.text(max_size=40), st.text("abcdeorst '.7", max_size=60), st.sampled_from(CORPUS + OTHERS))


@pytest.fixture(scope="module")
def reference():
    return SimpleTokenizer(context_length=LENGTH)


@pytest.fixture(scope="module")
def whole():
    return ClipBpe()


def spec_for(texts, min_count=1):
    return reduced(WHOLE, needed_tokens(count_tokens(WHOLE, texts), min_count))


def in_whole_ids(spec, texts):
    """Return the ids that a reduced tokenizer gives texts, as ids of the whole vocabulary."""
    return np.asarray(kept_tokens(spec))[tokenizer_from_spec(spec)(list(texts))]


def pieces(reference, ids):
    """Return the tokens of ids of the whole vocabulary as one string, with `</w>` at the end of every word."""
    return "".join(reference.decoder[token] for token in ids)


def replayed(reference, text):
    """Return every token that occurs while open_clip's algorithm merges the words of a text."""
    seen = set()
    for word in reference.pat.findall(reference.clean_fn(text)):
        letters = [reference.byte_encoder[byte] for byte in word.encode()]
        parts = [*letters[:-1], letters[-1] + "</w>"]
        while True:
            seen |= {*parts}
            pair = min(get_pairs(parts), key=lambda pair: reference.bpe_ranks.get(pair, 1e9), default=None)
            if pair not in reference.bpe_ranks:
                break
            place = next(i for i in range(len(parts) - 1) if (parts[i], parts[i + 1]) == pair)
            parts[place : place + 2] = ["".join(pair)]
    return {reference.encoder[part] for part in seen}


def without_merges(reference, kept):
    """Return open_clip's own tokenizer without the merges of the tokens that are not kept."""
    other, kept = copy.copy(reference), {*kept}
    other.bpe_ranks = {
        pair: rank for pair, rank in reference.bpe_ranks.items() if reference.encoder["".join(pair)] in kept
    }
    other.cache = {token: token for token in SPECIAL}
    return other


def test_corpus_texts_keep_their_tokens(reference):
    np.testing.assert_array_equal(in_whole_ids(spec_for(CORPUS), CORPUS), reference(list(CORPUS)).numpy())


def test_every_token_of_a_replay_is_kept_and_no_other(reference):
    expected = set(ALWAYS).union(*(replayed(reference, text) for text in CORPUS))
    assert kept_tokens(spec_for(CORPUS)) == sorted(expected)


@settings(max_examples=40, deadline=None)
@given(st.lists(words, max_size=3), st.lists(words, min_size=1, max_size=3))
def test_any_corpus_keeps_its_tokens_and_any_text_decodes_to_itself(reference, whole, corpus, others):
    kept = needed_tokens(Counter(token for text in corpus for token in whole.ids(text)))
    small, expected = ClipBpe(kept), without_merges(reference, kept)
    for text in corpus:
        assert [kept[token] for token in small.ids(text)] == reference.encode(text)
    for text in others:
        found = [kept[token] for token in small.ids(text)]
        assert found == expected.encode(text)
        assert pieces(reference, found) == pieces(reference, reference.encode(text))


def test_no_text_decodes_to_something_else(reference):
    small, kept = ClipBpe(ALWAYS), ALWAYS
    for text in OTHERS:
        found = [kept[token] for token in small.ids(text)]
        assert reference.decode(found) == reference.decode(reference.encode(text))


def test_padding_start_and_end_stay_the_least_and_the_largest_ids():
    tokenize = tokenizer_from_spec(spec_for(CORPUS))
    rows = tokenize([*CORPUS, *OTHERS])
    size = len(kept_tokens(spec_for(CORPUS)))
    assert (rows[:, 0] == size - 2).all() and (rows.max(1) == size - 1).all()
    empty = rows[CORPUS.index("")].tolist()
    assert empty == [size - 2, size - 1] + [0] * (LENGTH - 2)


def test_a_reduced_tokenizer_can_be_reduced_again():
    first = spec_for(CORPUS)
    own = kept_tokens(first)
    counts = Counter({own[token]: count for token, count in count_tokens(first, CORPUS[:2]).items()})
    again = reduced(first, needed_tokens(counts))
    assert again == spec_for(CORPUS[:2])


def test_a_rare_token_goes_and_counts_for_its_parts(reference):
    texts = ["circle"] * 3 + ["circles"] * 2
    plain, frequent = kept_tokens(spec_for(texts)), kept_tokens(spec_for(texts, min_count=3))
    (circle,), (circles,) = reference.encode("circle"), reference.encode("circles")
    assert {circle, circles} < {*plain} and circle in frequent and circles not in frequent


def test_a_list_of_ids_survives_as_ranges():
    kept = sorted({*ALWAYS, *range(512, 520), 530, 540, 541})
    spec = reduced(WHOLE, kept)
    assert spec["kept"] == "0-519,530,540-541,49406-49407" and spec.keys() - {"kept"} == WHOLE.keys()
    assert kept_tokens(spec) == kept and kept_tokens(WHOLE) is None


@pytest.mark.parametrize(
    "kept",
    [
        *("", "0-511", "0-511,49406-49407,5", "49406-49407,0-511", "0-511,49405-49408", "0-99999999999", "0-511-600"),
        *("0-511,513-512,49406-49407", "0-511,511,49406-49407", "1-49407", "0-511,5\u0663,49406-49407"),
        *("0-511,49405-49407", [0, 1], 5, "0," * 200_000),  # 49405 without the tokens it is merged from
    ],
)
def test_a_list_that_is_no_vocabulary_is_refused(kept):
    with pytest.raises(ArtifactError, match="kept: expected ranges"):
        tokenizer_from_spec({**WHOLE, "kept": kept})


def test_only_clips_own_tokenizer_is_reduced():
    with pytest.raises(ArtifactError, match="kept: expected ranges"):
        tokenizer_from_spec({**WHOLE, "kwargs": {"clean": "canonicalize"}, "kept": "0-511,49406-49407"})


def test_ids_are_translated_to_any_tokenizer_that_has_the_tokens():
    large, small = spec_for(CORPUS), spec_for(CORPUS[:1])
    for other in (WHOLE, large, small):
        ids = translation(small, other)[tokenizer_from_spec(small)(list(CORPUS[:1]))]
        np.testing.assert_array_equal(ids, tokenizer_from_spec(other)(list(CORPUS[:1])))
    assert translation(large, small) is None and translation(WHOLE, small) is None
    assert translation(small, {**WHOLE, "context_length": 77}) is None
