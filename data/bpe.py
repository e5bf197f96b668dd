"""CLIP's byte-pair encoding (Radford et al. 2021), with all of its tokens or some of them.

It is built from CLIP's merges, in clip_merges.txt.gz, and Hugging Face's `tokenizers`: open_clip's implementation imports torch,
caches every word it has seen, and takes time quadratic in the length of a word.

A word is split into bytes, and pairs of neighbours are merged in the order of the vocabulary. Every token but the bytes is
the product of exactly one merge, so a token can be removed together with its merge, and a word whose tokens are all kept,
with those they are merged from, keeps its tokens: the merge that would have come next is still there. A removed token falls
into smaller pieces, down to the bytes, which are never removed.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from clipress.data.cleaning import repaired

MAX_LETTERS = 1 << 17  # per text; the rest is ignored
MERGES = 49_152 - 256 - 2
BYTES = 2 * 256  # inside a word and at its end
SIZE = BYTES + MERGES + 2
SPECIAL = ("<start_of_text>", "<end_of_text>")
ALWAYS = (*range(BYTES), SIZE - 2, SIZE - 1)
"""Tokens that are always kept: the bytes, so that every text has tokens, and the two special ones."""
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class ClipBpe:
    """The encoding with the tokens `kept` of the whole vocabulary, renumbered in their order; None keeps all."""

    def __init__(self, kept: Sequence[int] | None = None) -> None:
        import regex
        from tokenizers.models import BPE

        kept = range(SIZE) if kept is None else kept
        self.symbols, (tokens, merges) = symbols_of_bytes(), _vocabulary()
        self.token_ids = {tokens[old]: new for new, old in enumerate(kept)}
        self.start, self.end = (self.token_ids[token] for token in SPECIAL)
        inside = [merges[old - BYTES] for old in kept if BYTES <= old < SIZE - 2]
        self.merges = inside
        self._bpe = BPE(self.token_ids, inside, end_of_word_suffix="</w>")
        self._words = regex.compile("|".join((*SPECIAL, WORDS)), regex.IGNORECASE)

    def ids(self, text: str) -> Iterator[int]:
        """Yield the ids of a text, without those of its start and end."""
        for word in self._words.findall(repaired(text).lower()):
            if word in SPECIAL:
                yield self.token_ids[word]
            else:
                symbols = "".join(self.symbols[byte] for byte in word.encode())
                yield from (token.id for token in self._bpe.tokenize(symbols))


def needed_tokens(counts: Mapping[int, int], min_count: int = 1) -> list[int]:
    """Return the tokens to keep, ascending: those that occur `min_count` times, all that they are merged from, and `ALWAYS`.

    `counts` are occurrences by id of the whole vocabulary. A token that is not kept counts for the two it is merged from.
    """
    tokens, merges = _vocabulary()
    places, counts, kept = {token: place for place, token in enumerate(tokens)}, dict(counts), set(ALWAYS)
    for token in range(SIZE - 3, BYTES - 1, -1):  # The parts of a token come before it.
        parts = [places[part] for part in merges[token - BYTES]]
        if token in kept or counts.get(token, 0) >= min_count:
            kept.update((token, *parts))
        else:
            for part in parts:
                counts[part] = counts.get(part, 0) + counts.get(token, 0)
    return sorted(kept)


def is_vocabulary(kept: Sequence[int]) -> bool:
    """Return whether ids are a vocabulary: ascending, with all of `ALWAYS` and with the parts of every token."""
    if not {*ALWAYS} <= {*kept} <= {*range(SIZE)} or any(a >= b for a, b in pairwise(kept)):
        return False
    tokens, merges = _vocabulary()
    names = {tokens[token] for token in kept}
    return all(names.issuperset(merges[token - BYTES]) for token in kept if BYTES <= token < SIZE - 2)


def symbols_of_bytes() -> dict[int, str]:
    """Return GPT-2's printable stand-in for every byte, in the vocabulary's order (Radford et al. 2019)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


@lru_cache(maxsize=1)
def _vocabulary() -> tuple[list[str], list[tuple[str, str]]]:
    """Return all tokens by their ids, and the merges that make them, those of the first token after the bytes first."""
    text = gzip.decompress(Path(__file__).with_name("clip_merges.txt.gz").read_bytes()).decode()
    merges = [tuple(line.split(" ")) for line in text.splitlines()]
    symbols = symbols_of_bytes().values()
    return [*symbols, *(f"{symbol}</w>" for symbol in symbols), *map("".join, merges), *SPECIAL], merges
