"""Text -> token ids, the same as open_clip's. An artifact describes its tokenizer in a small mapping.

CLIP's byte-pair encoding (Radford et al. 2021) is built here from open_clip's vocabulary and Hugging Face's
`tokenizers`: open_clip's own implementation imports torch, caches every word it has seen, and takes time quadratic in
the length of a word.
"""

from __future__ import annotations

import gzip
import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from clipress.errors import ArtifactError, BackendMissing

Tokenize = Callable[[Sequence[str]], np.ndarray]
MAX_LENGTH = 1 << 13  # ids per text
MAX_LETTERS = 1 << 17  # per text; the rest is ignored
LETTERS = 64  # per id, for open_clip's own tokenizer, which is quadratic; twice the longest token
KNOWN = {"clean", "strip_sep_token", "language", "tokenizer_mode", "additional_special_tokens", "reduction_mask"}
"""Tokenizer settings that an artifact may have; other settings of transformers could download and run code."""
CLIP_BPE = "clip-bpe"
MERGES = 49_152 - 256 - 2  # used from the vocabulary file, which has more
SPECIAL = ("<start_of_text>", "<end_of_text>")
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


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
    name, length, kwargs = spec["name"], spec["context_length"], spec.get("kwargs") or {}
    if name == CLIP_BPE and not kwargs:
        return _clip_bpe(length)
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    try:
        made = SimpleTokenizer if name == CLIP_BPE else partial(HFTokenizer, name)
        tokenizer = made(context_length=length, **kwargs)
    except ModuleNotFoundError as error:
        raise BackendMissing(f"Tokenizer '{name}' requires {error.name}. Run: pip install {error.name}") from None
    except (OSError, TypeError, ValueError, AssertionError) as error:
        raise ArtifactError(f"Tokenizer '{name}' cannot be built with {kwargs}: {error!s:.300}.") from None
    return lambda texts: tokenizer([_cut(text, length * LETTERS) for text in texts], context_length=length).numpy()


def _cut(text: str, letters: int) -> str:
    """Return the first letters of a text, lone surrogates replaced."""
    return text[:letters].encode("utf-8", "replace").decode("utf-8")


def _clip_bpe(length: int) -> Tokenize:
    import ftfy
    import regex
    from tokenizers.models import BPE

    symbols = _symbols_of_bytes()
    merges = [tuple(line.split()) for line in _vocabulary_file().split("\n")[1 : 1 + MERGES]]
    ends = [f"{symbol}</w>" for symbol in symbols.values()]
    vocabulary = [*symbols.values(), *ends, *map("".join, merges), *SPECIAL]
    ids = {entry: number for number, entry in enumerate(vocabulary)}
    start, end = (ids[entry] for entry in SPECIAL)
    bpe = BPE(ids, merges, end_of_word_suffix="</w>")
    words = regex.compile("|".join((*SPECIAL, WORDS)), regex.IGNORECASE)

    def ids_of(text: str) -> Iterator[int]:
        cleaned = " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()
        for word in words.findall(cleaned):
            if word in SPECIAL:
                yield ids[word]
            else:
                yield from (token.id for token in bpe.tokenize("".join(symbols[byte] for byte in word.encode())))

    def tokenize(texts: Sequence[str]) -> np.ndarray:
        rows = np.zeros((len(texts), length), np.int64)
        for row, text in zip(rows, texts, strict=True):
            found = [start, *islice(ids_of(_cut(text, MAX_LETTERS)), length), end][:length]
            row[: len(found)] = found
            if len(found) == length:
                row[-1] = end
        return rows

    return tokenize


def _symbols_of_bytes() -> dict[int, str]:
    """Return GPT-2's printable stand-in for every byte, in the vocabulary's order (Radford et al. 2019)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


def _vocabulary_file() -> str:
    package = find_spec("open_clip")  # found without importing it, which would import torch
    return gzip.decompress(Path(package.origin).with_name("bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
