"""Text -> token ids, by open_clip's own tokenizers. An artefact names its tokenizer in a small mapping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from clipress.errors import ArtifactError

Tokenize = Callable[[Sequence[str]], np.ndarray]
MAX_LENGTH = 1 << 13  # ids of a text
LETTERS = 128  # per id, more than any token has: what comes after is cut off anyway, and costs its length squared
KNOWN = {"clean", "strip_sep_token", "language", "tokenizer_mode", "additional_special_tokens", "reduction_mask"}
"""What an artefact may say of its tokenizer; other keys of transformers' could download and run code."""


def tokenizer_spec(architecture: dict[str, Any]) -> dict[str, Any]:
    """Return what an artefact must remember of its tokenizer: name and context length."""
    text = architecture["text_cfg"]
    name = text.get("hf_tokenizer_name") or "clip-bpe"
    return {
        "name": name,
        "context_length": int(text.get("context_length", 77)),
        "kwargs": text.get("tokenizer_kwargs") or {},
    }


def tokenizer_from_spec(spec: dict[str, Any]) -> Tokenize:
    """Return a function from texts to int64 ids [N, context_length]; a text that is too long is cut, its end kept."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    name, length, kwargs = spec.get("name"), spec.get("context_length"), spec.get("kwargs") or {}
    if not (
        isinstance(name, str) and isinstance(length, int) and isinstance(kwargs, dict) and 2 < length <= MAX_LENGTH
    ):
        raise ArtifactError(
            f"A tokenizer's name and a context_length of 3 to {MAX_LENGTH:,} are asked for, found {spec!r:.200}."
        )
    if strange := sorted(kwargs.keys() - KNOWN):
        raise ArtifactError(
            f"Tokenizer '{name}' is given {', '.join(strange)}, which could run code; known: {', '.join(sorted(KNOWN))}."
        )
    try:
        made = SimpleTokenizer if name == "clip-bpe" else partial(HFTokenizer, name)
        tokenizer = made(context_length=length, **kwargs)
    except (TypeError, ValueError, AssertionError) as error:
        raise ArtifactError(f"Tokenizer '{name}' cannot be made of {kwargs}: {error}.") from None
    return lambda texts: tokenizer([_cut(text, length) for text in texts], context_length=length).numpy()


def _cut(text: str, length: int) -> str:
    """Return as much of a text as its ids can come from, lone surrogates replaced."""
    return text[: length * LETTERS].encode("utf-8", "replace").decode("utf-8")
