"""BERT's word pieces as BLIP uses them: texts become ids, and ids of a decoder become a text again.

BLIP adds two special tokens behind BERT's vocabulary, [DEC] and [ENC], which take the first place of a text to decode or to encode.
Padding is an id of its own, which no text has, so a text's mask is `ids != pad`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from clipress.data.packed_tokenizer import NAME, built, packed_from_words, unpacked
from clipress.data.tokens import tokenizer_from_spec
from clipress.errors import ArtifactError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
DECODE, ENCODE = "[DEC]", "[ENC]"
_WORDS = re.compile(r"\w+|[^\w\s]")
_GLUED = (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'")
_GLUED += tuple((f" {ending}", ending) for ending in ("n't", "'m", "'s", "'ve", "'re"))
"""What transformers 4.15 replaces in a decoded text, in this order; later versions leave some of it."""


def word_pieces_spec(vocabulary: str, context_length: int, prompt: str = "") -> dict[str, Any]:
    """Return the tokenizer description of BERT's vocab.txt, one word piece per line, with BLIP's two tokens behind it.

    `prompt` is put in front of every text.
    """
    found = {"name": NAME, "context_length": context_length, **packed_from_words(vocabulary, (DECODE, ENCODE))}
    return {**found, "prompt": prompt} if prompt else found


def vocabulary_of(texts: Iterable[str]) -> str:
    """Return a vocab.txt with every word of some texts, and their letters for other words."""
    words = {word for text in texts for word in _WORDS.findall(text.lower())}
    letters = {letter for word in words for letter in word}
    return "\n".join([*SPECIAL, *sorted(words | letters), *(f"##{letter}" for letter in sorted(letters))]) + "\n"


class WordPieces:
    """The tokenizer of a description. Raises ArtifactError for one without BERT's and BLIP's special tokens."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self._tokenizer, self._tokenize, self.pad = built(unpacked(spec)), tokenizer_from_spec(spec), spec["pad"]
        self.prompt = spec.get("prompt", "")
        special = {name: self._tokenizer.token_to_id(name) for name in (*SPECIAL, DECODE, ENCODE)}
        if missing := [name for name, token in special.items() if token is None]:
            raise ArtifactError(f"The tokenizer lacks {', '.join(missing)}, which BLIP's texts begin or end with.")
        self.start, self.end = special["[CLS]"], special["[SEP]"]
        self.decode, self.encode = special[DECODE], special[ENCODE]
        self._specials, self.longest = set(special.values()), int(spec["context_length"])

    def __call__(self, texts: Sequence[str], first: int | None = None, length: int | None = None) -> np.ndarray:
        """Return ids int64 [N, L], padded to the longest text; a long one is cut, its end token kept.

        `first` replaces the start token, `length` is the longest text in ids; None: the context length.
        """
        ids = self._tokenize(texts)
        lengths = (ids != self.pad).sum(1)
        if length is not None:
            cut = lengths > length
            ids, lengths = ids[:, :length], np.minimum(lengths, length)
            ids[cut, -1] = self.end
        ids = ids[:, : lengths.max(initial=0)]
        if first is not None:
            ids[:, :1] = first  # There may be no text.
        return ids

    def begun(self) -> np.ndarray:
        """Return the ids that every text to be written begins with, int64 [P]: [DEC], and those of the prompt."""
        (ids,) = self([""], first=self.decode)
        return ids[:-1]

    def written(self, ids: Iterable[int]) -> str:
        """Return the text of ids without the prompt that it began with."""
        return self.text(ids).removeprefix(self.prompt.strip()).strip()

    def text(self, ids: Iterable[int]) -> str:
        """Return the text of ids, without special tokens."""
        tokens = [self._tokenizer.id_to_token(int(token)) for token in ids if int(token) not in self._specials]
        text = " ".join(token for token in tokens if token is not None).replace(" ##", "").strip()
        for apart, together in _GLUED:
            text = text.replace(apart, together)
        return text
