"""Text -> token ids, the same as open_clip's. An artifact describes its tokenizer in a small mapping.

CLIP's own tokenizer is `bpe.py`, and needs no torch; others are open_clip's and Hugging Face's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np

from clipress.data import packed_tokenizer
from clipress.data.bpe import MAX_LETTERS, ClipBpe
from clipress.data.cleaning import CLEANERS
from clipress.data.vocabulary import CLIP_BPE, is_reducible, kept_tokens
from clipress.errors import ArtifactError, BackendMissing, nearest

Tokenize = Callable[[Sequence[str]], np.ndarray]
MAX_LENGTH = 1 << 13  # ids per text
LETTERS = 64  # per id, for open_clip's own tokenizer, which is quadratic; twice the longest token
KNOWN = {"clean", "strip_sep_token", "language", "tokenizer_mode", "additional_special_tokens", "reduction_mask"}
"""Tokenizer settings that an artifact may have; other settings of transformers could download and run code."""


def tokenizer_spec(architecture: dict[str, Any]) -> dict[str, Any]:
    """Return the tokenizer description for an artifact: name, context length and settings."""
    text = architecture["text_cfg"]
    name = text.get("hf_tokenizer_name") or CLIP_BPE
    return {
        "name": name,
        "context_length": int(text.get("context_length", 77)),
        "kwargs": text.get("tokenizer_kwargs") or {},
    }


def check_spec(spec: Mapping[str, Any]) -> None:
    """Raise ArtifactError for an incomplete tokenizer description, or one with settings that could run code."""
    name, length, kwargs = spec.get("name"), spec.get("context_length"), spec.get("kwargs") or {}
    if not (
        isinstance(name, str) and isinstance(length, int) and isinstance(kwargs, dict) and 2 <= length <= MAX_LENGTH
    ):
        raise ArtifactError(
            f"tokenizer: expected a name and a context_length of 2 to {MAX_LENGTH:,}, found {spec!r:.200}."
        )
    if strange := sorted(kwargs.keys() - KNOWN):
        raise ArtifactError(
            f"Tokenizer '{name}' has the settings {', '.join(strange)}, which could run code. Allowed: {', '.join(sorted(KNOWN))}."
        )


def tokenizer_from_spec(spec: Mapping[str, Any]) -> Tokenize:
    """Return a function from texts to int64 ids [N, context_length]; a long text is truncated, its end token kept.

    Raises ArtifactError for a tokenizer that cannot be built, BackendMissing if it needs transformers and that is missing.
    """
    check_spec(spec)
    length, kept = spec["context_length"], kept_tokens(spec)
    if is_reducible(spec):
        return _clip_bpe(length, kept)
    if packed_tokenizer.is_packed(spec):
        return packed_tokenizer.PackedTokenizer(spec, _cleaned(length, spec.get("kwargs") or {}))
    if spec["name"] == packed_tokenizer.NAME:
        raise ArtifactError(
            f"The tokenizer's mapping lacks its file, {spec['name']}: copy or create the artifact again."
        )
    tokenizer = open_clip_tokenizer(spec)
    return lambda texts: tokenizer([_cut(text, length * LETTERS) for text in texts], context_length=length).numpy()


def open_clip_tokenizer(spec: Mapping[str, Any]) -> Any:
    """Return open_clip's own tokenizer of a description: a SimpleTokenizer, or an HFTokenizer with one of transformers'.

    Raises ArtifactError and BackendMissing as `tokenizer_from_spec` does.
    """
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    check_spec(spec)
    name, kwargs = spec["name"], spec.get("kwargs") or {}
    try:
        made = SimpleTokenizer if name == CLIP_BPE else partial(HFTokenizer, name)
        return made(context_length=spec["context_length"], **kwargs)
    except ModuleNotFoundError as error:
        raise BackendMissing(f"Tokenizer '{name}' requires {error.name}. Run: pip install {error.name}") from None
    except (OSError, TypeError, ValueError, AssertionError) as error:
        raise ArtifactError(f"Tokenizer '{name}' cannot be built with {kwargs}: {error!s:.300}.") from None


def count_tokens(spec: Mapping[str, Any], texts: Iterable[str]) -> Counter[int]:
    """Count the tokens of texts by id, start and end included: all of a text by CLIP's tokenizer, what fits by another."""
    if is_reducible(spec):
        encoding = ClipBpe(kept_tokens(spec))
        rows = ((encoding.start, *encoding.ids(_cut(text, MAX_LETTERS)), encoding.end) for text in texts)
    else:
        tokenize = tokenizer_from_spec(spec)
        rows = (tokenize([text])[0].tolist() for text in texts)
    return Counter(chain.from_iterable(rows))


def _cleaned(length: int, kwargs: Mapping[str, Any]) -> Callable[[str], str]:
    """Return what is done to a text before a packed tokenizer reads it."""
    if strange := sorted(kwargs.keys() - {"clean"}):
        raise ArtifactError(f"A packed tokenizer takes the setting clean alone, found {', '.join(strange)}.")
    if "clean" not in kwargs:
        return lambda text: _cut(text, length * LETTERS)
    clean = CLEANERS.get(str(kwargs["clean"]))
    if clean is None:
        raise ArtifactError(f"tokenizer: clean is {kwargs['clean']!r:.100}.{nearest(str(kwargs['clean']), CLEANERS)}")
    return lambda text: clean(_cut(text, length * LETTERS))


def _cut(text: str, letters: int) -> str:
    """Return the first letters of a text, lone surrogates replaced."""
    return text[:letters].encode("utf-8", "replace").decode("utf-8")


def _clip_bpe(length: int, kept: Sequence[int] | None) -> Tokenize:
    encoding = ClipBpe(kept)

    def tokenize(texts: Sequence[str]) -> np.ndarray:
        rows = np.zeros((len(texts), length), np.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = islice(encoding.ids(_cut(text, MAX_LETTERS)), length)
            found = [encoding.start, *ids, encoding.end][:length]
            row[: len(found)] = found
            if len(found) == length:
                row[-1] = encoding.end
        return rows

    return tokenize
