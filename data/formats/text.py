"""Normalisation of captions and questions. The published numbers of BLIP and UPop are for texts normalised this way."""

from __future__ import annotations

import re

MAX_WORDS = 30  # BLIP's setting for retrieval and captions
STATEMENT_WORDS = 40  # for NLVR2
QUESTION_WORDS = 50
_MARKS = re.compile(r'[.!"()*#:;~]')
_GAPS = re.compile(r"\s{2,}")


def pre_caption(text: str, words: int = MAX_WORDS) -> str:
    """Lower-case, replace most punctuation by blanks, keep the first words (BLIP's `pre_caption`; Li et al. 2022)."""
    plain = _GAPS.sub(" ", _MARKS.sub(" ", text.lower())).rstrip("\n").strip(" ")
    return " ".join(plain.split(" ")[:words])


def pre_question(text: str, words: int = QUESTION_WORDS) -> str:
    """Lower-case, delete most punctuation, keep the first words (BLIP's `pre_question`); a question mark stays."""
    plain = _MARKS.sub("", text.lower()).rstrip(" ")
    return " ".join(plain.split(" ")[:words])


NORMALISERS = {"none": lambda text: text, "blip": pre_caption}
