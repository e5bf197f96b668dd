"""Text -> token ids, by open_clip's own tokenizers. An artefact names its tokenizer in a small mapping."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from clipress.errors import ArtifactError, BackendMissing

Tokenize = Callable[[Sequence[str]], np.ndarray]
MAX_LENGTH = 1 << 13  # ids of a text
LETTERS = 64  # per id, twice what any token has: what comes after is cut off anyway, and costs its length squared
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


def check_spec(spec: Mapping[str, Any]) -> None:
    """Raise ArtifactError for a tokenizer that is not described, or by keys that could run code."""
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


def tokenizer_from_spec(spec: Mapping[str, Any]) -> Tokenize:
    """Return a function from texts to int64 ids [N, context_length]; a text that is too long is cut, its end kept.

    Raises ArtifactError for a tokenizer that cannot be made, BackendMissing where transformers is asked for and missing.
    """
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    check_spec(spec)
    name, length, kwargs = spec["name"], spec["context_length"], spec.get("kwargs") or {}
    try:
        made = SimpleTokenizer if name == "clip-bpe" else partial(HFTokenizer, name)
        tokenizer = made(context_length=length, **kwargs)
    except ModuleNotFoundError as error:
        raise BackendMissing(f"Tokenizer '{name}' needs {error.name}; do: pip install {error.name}") from None
    except (OSError, TypeError, ValueError, AssertionError) as error:
        raise ArtifactError(f"Tokenizer '{name}' cannot be made of {kwargs}: {error!s:.300}.") from None
    return lambda texts: tokenizer([_cut(text, length) for text in texts], context_length=length).numpy()


def _cut(text: str, length: int) -> str:
    """Return as much of a text as its ids can come from, lone surrogates replaced."""
    return text[: length * LETTERS].encode("utf-8", "replace").decode("utf-8")
