"""What open_clip does to texts in front of a tokenizer from transformers, without its imports, by the names in its configs."""

from __future__ import annotations

import html
import string
from collections.abc import Callable

_PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))


def repaired(text: str) -> str:
    """Return a text with broken Unicode mended and HTML entities read, twice since they may be nested; one space between words."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def _canonical(text: str) -> str:
    """Return a text as SigLIP learned from: no punctuation, lower case (google-research/big_vision, prompt_engineering.py)."""
    return " ".join(repaired(text).translate(_PUNCTUATION).lower().split())


CLEANERS: dict[str, Callable[[str], str]] = {
    "whitespace": repaired,
    "lower": lambda text: repaired(text).lower(),
    "canonicalize": _canonical,
}
