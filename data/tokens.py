"""Text -> token ids, by open_clip's own tokenizers. An artefact names its tokenizer in a small mapping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Tokenize = Callable[[Sequence[str]], np.ndarray]


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

    length, kwargs = spec["context_length"], spec.get("kwargs") or {}
    if spec["name"] == "clip-bpe":
        tokenizer = SimpleTokenizer(context_length=length, **kwargs)
    else:
        tokenizer = HFTokenizer(spec["name"], context_length=length, **kwargs)
    return lambda texts: tokenizer(list(texts), context_length=length).numpy()
