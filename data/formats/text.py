"""Caption normalisation. The published numbers of BLIP and UPop are for captions normalised this way."""

from __future__ import annotations

import re

MAX_WORDS = 30  # BLIP's retrieval setting
_MARKS = re.compile(r'[.!"()*#:;~]')
_GAPS = re.compile(r"\s{2,}")


def blip(text: str) -> str:
    """Lower-case, remove most punctuation, keep at most 30 words (BLIP's `pre_caption`; Li et al. 2022)."""
    plain = _GAPS.sub(" ", _MARKS.sub(" ", text.lower())).rstrip("\n").strip(" ")
    return " ".join(plain.split(" ")[:MAX_WORDS])


NORMALISERS = {"none": lambda text: text, "blip": blip}
