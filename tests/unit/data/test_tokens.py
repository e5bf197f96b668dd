"""Token ids equal those of open_clip's tokenizer."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipress.data.tokens import tokenizer_from_spec
from clipress.errors import ArtifactError, BackendMissing

PLAIN = {"name": "clip-bpe", "context_length": 77}

TRICKY = [
    "",
    "  a\tphoto\n of\u00a0a   cat ",
    "It's we're I've I'm they'll he'd 'S \u017fo '\u017f",
    "&amp;amp;lt; &#39; &nbsp; caf&eacute;",
    "schÃ¶n âœ” “quoted” ﬁne ＦＵＬＬ",  # Mojibake, ligatures and full-width letters, fixed by ftfy.
    "<start_of_text> <END_OF_TEXT> <\u017ftart_of_text> <start_of_text",
    "İstanbul STRASSE ǅ Σίσυφος",  # Lower case that is longer or depends on the position.
    "日本語 한국어 العربية ไทย 👩‍🚀🇩🇪 ½ ² Ⅷ ١٢٣",
    "abcabcabc aaaaaaaaa ababababab hahahahahaha",
    "\x00\x01\x7f\u200b\ufeff\u2028 \U000e0041",
    "word " * 5000,
    "supercalifragilistic" * 20,
]
texts = st.one_of(
    st.text(),
    st.text("abcdefghijklmnopqrstuvwxyz' &;#<>_/1\u0307ßé\u017f", max_size=200),
    st.lists(st.sampled_from([*TRICKY, "a", "the", "of", "&lt;", "'ll", "end_of_text>"])).map(" ".join),
)


def ours(length=77):
    return tokenizer_from_spec({"name": "clip-bpe", "context_length": length, "kwargs": {}})


@pytest.fixture(scope="module")
def both():
    from open_clip.tokenizer import SimpleTokenizer

    return ours(), SimpleTokenizer(context_length=77)


@pytest.mark.parametrize("text", TRICKY)
def test_ids_of_tricky_texts_equal_open_clips(both, text):
    tokenize, reference = both
    np.testing.assert_array_equal(tokenize([text]), reference([text]).numpy())


@settings(max_examples=300, deadline=None)
@given(st.lists(texts, max_size=3))
def test_ids_of_any_text_equal_open_clips(both, found):
    tokenize, reference = both
    ids = tokenize(found)
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(ids, reference(found).numpy())


@pytest.mark.parametrize("length", [2, 3, 16])
def test_a_truncated_text_keeps_its_end_token(both, length):
    cut = ours(length)(["one", "one two", "one two three four"])
    np.testing.assert_array_equal(cut, both[1](["one", "one two", "one two three four"], length).numpy())
    assert (cut.max(axis=1) == cut[0].max()).all()  # The end token has the highest id.


def test_tokenizer_arguments_of_open_clip_are_kept():
    spec = {"name": "clip-bpe", "context_length": 8, "kwargs": {"clean": "canonicalize"}}
    np.testing.assert_array_equal(tokenizer_from_spec(spec)(["A cat, sat."]), ours(8)(["a cat sat"]))


def test_tokenizing_does_not_import_torch():
    code = (
        "import sys; from clipress.data.tokens import tokenizer_from_spec as t; "
        "t({'name': 'clip-bpe', 'context_length': 8})(['a']); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_very_long_word_and_a_lone_surrogate_are_tokenized():
    rng = np.random.default_rng(0)
    word = "".join(map(chr, rng.integers(97, 123, 1_000_000)))
    ids = tokenizer_from_spec(PLAIN)([word, "a \ud800 b"])
    assert ids.shape == (2, 77) and ids[0, -1] == ids.max() and ids[1, 0] == ids[0, 0]


@pytest.mark.parametrize("change", [{"name": 5}, {"context_length": 0}, {"context_length": 10**9}, {"kwargs": [1]}])
def test_an_invalid_tokenizer_description_is_reported(change):
    with pytest.raises(ArtifactError, match="name and a context_length"):
        tokenizer_from_spec({**PLAIN, **change})


@pytest.mark.parametrize("key", ["trust_remote_code", "bpe_path", "cache_dir"])
def test_only_safe_keys_reach_a_tokenizer(key):
    with pytest.raises(ArtifactError, match=f"{key}, which could run code"):
        tokenizer_from_spec({"name": "a/b", "context_length": 77, "kwargs": {key: True}})


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            ModuleNotFoundError("No module named 'transformers'", name="transformers"),
            BackendMissing,
            "pip install transf",
        ),
        (OSError("cannot be found"), ArtifactError, "cannot be built"),
    ],
)
def test_a_tokenizer_that_is_unavailable_is_reported(monkeypatch, error, kind, message):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr("open_clip.tokenizer.HFTokenizer", fails)
    with pytest.raises(kind, match=message):
        tokenizer_from_spec({"name": "a/b", "context_length": 77})
