"""Text -> token ids, the same as open_clip's. An artefact names its tokenizer in a small mapping.

The usual one, CLIP's byte-pair encoding (Radford et al. 2021), is put together here from open_clip's vocabulary and
Hugging Face's `tokenizers`: open_clip's own brings torch, which a server has no other use for, keeps every word it has
seen, and takes time that grows with the square of a word's length.
"""

from __future__ import annotations

import gzip
import html
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

Tokenize = Callable[[Sequence[str]], np.ndarray]
CLIP_BPE = "clip-bpe"
MERGES = 49_152 - 256 - 2  # of the vocabulary file, which has more
SPECIAL = ("<start_of_text>", "<end_of_text>")
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def tokenizer_spec(architecture: dict[str, Any]) -> dict[str, Any]:
    """Return what an artefact must remember of its tokenizer: name and context length."""
    text = architecture["text_cfg"]
    name = text.get("hf_tokenizer_name") or CLIP_BPE
    return {
        "name": name,
        "context_length": int(text.get("context_length", 77)),
        "kwargs": text.get("tokenizer_kwargs") or {},
    }


def tokenizer_from_spec(spec: dict[str, Any]) -> Tokenize:
    """Return a function from texts to int64 ids [N, context_length]; a text that is too long is cut, its end kept."""
    name, length, kwargs = spec["name"], spec["context_length"], spec.get("kwargs") or {}
    if name == CLIP_BPE and not kwargs:
        return _clip_bpe(length)
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    tokenizer = (
        SimpleTokenizer(context_length=length, **kwargs)
        if name == CLIP_BPE
        else HFTokenizer(name, context_length=length, **kwargs)
    )
    return lambda texts: tokenizer(list(texts), context_length=length).numpy()


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
            found = [start, *ids_of(text), end][:length]
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
    package = find_spec("open_clip")  # found, and not imported: that would bring torch
    return gzip.decompress(Path(package.origin).with_name("bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
