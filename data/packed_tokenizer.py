"""Tokenizers that travel with their model: Hugging Face's tokenizer.json, packed into the tokenizer's mapping.

`file` holds it compressed (zlib, base64), `pad` is the id behind a text, and `prompt` is put in front of every text. With `plain` special
tokens that a text spells out, such as [SEP], are letters like others. Neither transformers nor the hub is needed to read it.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipress.errors import ArtifactError
from clipress.storage import MAX_JSON, read_json

NAME = "tokenizer.json"
"""The name of a tokenizer that is packed, in its mapping and in an architecture's `hf_tokenizer_name`."""
WORDS = "vocab.txt"  # BERT's vocabulary, one word piece per line
MAX_PROMPT = 1 << 10
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")


def is_packed(spec: Mapping[str, Any]) -> bool:
    """Return whether a tokenizer's mapping holds its file."""
    return spec.get("file") is not None


def packed_from_folder(
    folder: Path, vocabulary: int, pad: int | None = None, marks: Sequence[str] = ()
) -> dict[str, Any]:
    """Return `file` and `pad` of the tokenizer in a folder of transformers; empty if it has none that is read.

    Args:
        folder: a tokenizer.json in it is read, or BERT's vocab.txt, if it pads on the right with a known token.
        vocabulary: tokens that the text tower knows.
        pad: the id of padding, where the model says it; None: the folder's settings do.
        marks: special tokens that are appended to the file's, and have to be the last of the vocabulary.

    Raises ArtifactError for a file that is no tokenizer or has other tokens than the model.
    """
    if not (folder / NAME).is_file() and not (folder / WORDS).is_file():
        return {}
    settings = _settings(folder)
    text = _text(folder / NAME) if (folder / NAME).is_file() else _word_pieces(_text(folder / WORDS), settings)
    tokenizer = built(text)
    token = settings.get("pad_token")
    token = token.get("content") if isinstance(token, Mapping) else token
    pad = tokenizer.token_to_id(token) if pad is None and isinstance(token, str) else pad
    if pad is None or settings.get("padding_side", "right") != "right":
        return {}
    if marks:
        tokenizer.add_special_tokens(list(marks))
        text = tokenizer.to_str()
        if [tokenizer.token_to_id(mark) for mark in marks] != [*range(vocabulary - len(marks), vocabulary)]:
            raise ArtifactError(
                f"its tokenizer: expected {vocabulary - len(marks):,} tokens and {', '.join(marks)} behind them, found "
                f"{tokenizer.get_vocab_size():,} in all. Use the one that the model was trained with."
            )
    if (largest := max(tokenizer.get_vocab().values(), default=0)) >= vocabulary:
        raise ArtifactError(f"its tokenizer has ids up to {largest:,}, its text tower knows {vocabulary:,} tokens.")
    return {"file": _packed(text), "pad": pad}


def packed_from_words(vocabulary: str, more: Sequence[str] = ()) -> dict[str, Any]:
    """Return `file`, `pad` and `plain` of BERT's tokenizer in lower case, from its vocab.txt, with `more` special tokens behind it.

    Raises ArtifactError for a vocabulary without BERT's special tokens.
    """
    tokenizer = built(_word_pieces(vocabulary, {}))
    tokenizer.add_special_tokens(list(more))
    return {"file": _packed(tokenizer.to_str()), "pad": tokenizer.token_to_id("[PAD]"), "plain": True}


def _packed(text: str) -> str:
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def unpacked(spec: Mapping[str, Any]) -> str:
    """Return the tokenizer.json of a mapping. Raises ArtifactError for one that is damaged."""
    try:
        reader = zlib.decompressobj()
        content = reader.decompress(base64.b64decode(spec["file"], validate=True), MAX_JSON)
        if not reader.eof:
            raise ValueError(f"it is cut, or longer than {MAX_JSON:,} bytes")
        return content.decode()
    except (TypeError, ValueError, binascii.Error, zlib.error) as error:
        raise ArtifactError(
            f"tokenizer.file cannot be unpacked ({error}): copy or create the artifact again."
        ) from None


def write_files(spec: Mapping[str, Any], folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, as Hugging Face's libraries read them."""
    text = unpacked(spec)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": spec["context_length"],
        "pad_token": built(text).id_to_token(spec["pad"]),
        "padding_side": "right",
    }
    (folder / NAME).write_text(text, encoding="utf-8")
    (folder / SETTINGS[0]).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class PackedTokenizer:
    """The packed tokenizer of a mapping, texts -> int64 ids [N, context_length]; `clean` is applied to a text first."""

    def __init__(self, spec: Mapping[str, Any], clean: Callable[[str], str]) -> None:
        self.spec, self._clean = spec, clean
        tokenizer, length, pad = built(unpacked(spec)), spec["context_length"], spec.get("pad")
        tokenizer.encode_special_tokens = bool(spec.get("plain"))
        if not isinstance(pad, int) or not 0 <= pad < 1 << 31:
            raise ArtifactError(f"tokenizer.pad: expected the id of padding, found {pad!r:.100}.")
        if not isinstance(prompt := spec.get("prompt", ""), str) or len(prompt) > MAX_PROMPT:
            raise ArtifactError(
                f"tokenizer.prompt: expected a text of at most {MAX_PROMPT} letters, found {prompt!r:.100}."
            )
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(pad_id=pad, length=length)
        self._tokenizer, self._prompt = tokenizer, prompt

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Return ids int64 [N, L]."""
        rows = self._tokenizer.encode_batch([self._prompt + self._clean(text) for text in texts])
        return np.asarray([row.ids for row in rows], np.int64).reshape(len(texts), self.spec["context_length"])


def built(text: str) -> Any:
    """Return the tokenizer of a tokenizer.json, without padding and truncation. Raises ArtifactError for a text that is none."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more specific
        raise ArtifactError(f"its {NAME} is no tokenizer: {error!s:.200}.") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _word_pieces(vocabulary: str, settings: Mapping[str, Any]) -> str:
    """Return the tokenizer.json of BERT's vocabulary."""
    from tokenizers import BertWordPieceTokenizer

    words = {word: number for number, word in enumerate(vocabulary.splitlines())}
    if missing := {"[UNK]", "[SEP]", "[CLS]", "[PAD]", "[MASK]"} - words.keys():
        raise ArtifactError(f"its {WORDS} lacks {', '.join(sorted(missing))}.")
    made = BertWordPieceTokenizer(
        words,
        lowercase=bool(settings.get("do_lower_case", True)),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=bool(settings.get("tokenize_chinese_chars", True)),
    )
    return made.to_str()


def _settings(folder: Path) -> dict[str, Any]:
    """Return what a folder says of its tokenizer; tokenizer_config.json goes first."""
    found: dict[str, Any] = {}
    for name in SETTINGS:
        if (folder / name).is_file():
            try:
                given = read_json(folder / name)
            except (OSError, ValueError) as error:
                raise ArtifactError(f"its {name} is not readable JSON: {error}.") from None
            if isinstance(given, Mapping):
                found = {**given, **found}
    return found


def _text(path: Path) -> str:
    """Return a file's text; JSON without the spaces that make it longer."""
    try:
        if path.name == NAME:
            return json.dumps(read_json(path), ensure_ascii=False, separators=(",", ":"))
        if path.stat().st_size > MAX_JSON:
            raise ValueError(f"it is longer than {MAX_JSON:,} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ArtifactError(f"its {path.name} is not readable: {error}.") from None
