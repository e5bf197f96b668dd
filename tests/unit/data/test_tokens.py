"""A tokenizer is made of what an artefact says, as far as that is harmless."""

import numpy as np
import pytest
from open_clip.tokenizer import SimpleTokenizer

from clipress.data.tokens import tokenizer_from_spec
from clipress.errors import ArtifactError, BackendMissing

PLAIN = {"name": "clip-bpe", "context_length": 77}


def test_ids_are_open_clips_for_texts_of_any_length():
    texts = ["a red circle", "", "word " * 5000, "naïve café 日本 🙂", "x" * 300]
    np.testing.assert_array_equal(tokenizer_from_spec(PLAIN)(texts), SimpleTokenizer(context_length=77)(texts).numpy())


def test_a_word_of_a_million_letters_and_a_lone_surrogate_have_ids_too():
    rng = np.random.default_rng(0)
    word = "".join(map(chr, rng.integers(97, 123, 1_000_000)))
    ids = tokenizer_from_spec(PLAIN)([word, "a \ud800 b"])
    assert ids.shape == (2, 77) and ids[0, -1] == ids.max() and ids[1, 0] == ids[0, 0]


@pytest.mark.parametrize("change", [{"name": 5}, {"context_length": 0}, {"context_length": 10**9}, {"kwargs": [1]}])
def test_what_describes_no_tokenizer_is_told(change):
    with pytest.raises(ArtifactError, match="name and a context_length"):
        tokenizer_from_spec({**PLAIN, **change})


@pytest.mark.parametrize("key", ["trust_remote_code", "bpe_path", "cache_dir"])
def test_only_harmless_keys_reach_a_tokenizer(key):
    with pytest.raises(ArtifactError, match=f"{key}, which could run code"):
        tokenizer_from_spec({"name": "a/b", "context_length": 77, "kwargs": {key: True}})


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (
            ModuleNotFoundError("No module named 'transformers'", name="transformers"),
            BackendMissing,
            "pip install transf",
        ),
        (OSError("cannot be found"), ArtifactError, "cannot be made"),
    ],
)
def test_a_tokenizer_that_cannot_be_had_is_told(monkeypatch, error, kind, told):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr("open_clip.tokenizer.HFTokenizer", fails)
    with pytest.raises(kind, match=told):
        tokenizer_from_spec({"name": "a/b", "context_length": 77})
