"""Reduced vocabularies: a tokenizer with some of the tokens of CLIP's, described by `kept` in its mapping.

`kept` lists the ids of the whole vocabulary as ranges, such as `0-511,539,1125-1130,49406-49407`; an id of the reduced
tokenizer is a place in that list. Start and end keep the largest ids, which is where CLIP pools, and 0, the padding, stays 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from clipress.data import bpe
from clipress.errors import ArtifactError

Spec = Mapping[str, Any]
CLIP_BPE = "clip-bpe"
_RANGES = re.compile(r"\d{1,5}(-\d{1,5})?(,\d{1,5}(-\d{1,5})?)*")


def is_reducible(spec: Spec) -> bool:
    """Return whether tokens can be removed: only from CLIP's own tokenizer, without settings."""
    return spec["name"] == CLIP_BPE and not spec.get("kwargs")


def kept_tokens(spec: Spec) -> list[int] | None:
    """Return the tokens of a reduced tokenizer as ids of the whole vocabulary; None for any other tokenizer.

    Raises ArtifactError for a list that is not a vocabulary.
    """
    given = spec.get("kept")
    if given is None:
        return None
    if isinstance(given, str) and len(given) < 6 * bpe.SIZE and _RANGES.fullmatch(given) and is_reducible(spec):
        bounds = [[int(bound) for bound in part.split("-")] for part in given.split(",")]
        limits = [(ends[0], ends[-1]) for ends in bounds]
        if all(a <= b for a, b in limits) and all(a[1] < b[0] for a, b in pairwise(limits)):
            kept = [token for first, last in limits for token in range(first, last + 1)]
            if bpe.is_vocabulary(kept):
                return kept
    raise ArtifactError(
        f"tokenizer.kept: expected ranges of ids with every byte and every part of a token, found {given!r:.200}."
    )


def reduced(spec: Spec, kept: Sequence[int]) -> dict[str, Any]:
    """Return the description of a tokenizer with the tokens `kept`, ids of the whole vocabulary in ascending order."""
    breaks = [place for place, (a, b) in enumerate(pairwise(kept), 1) if b != a + 1]
    runs = [kept[first:last] for first, last in pairwise((0, *breaks, len(kept)))]
    ranges = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return {**spec, "kept": ranges}


def translation(own: Spec, other: Spec) -> np.ndarray | None:
    """Return the id that each token of a reduced tokenizer has in another, int64 [tokens]; None if a token has none.

    A text's ids then become valid ids of the other tokenizer, and the same pieces.
    """
    if own.get("kept") is None or {**own, "kept": None} != {**other, "kept": None}:
        return None
    kept, theirs = np.asarray(kept_tokens(own)), kept_tokens(other)
    if theirs is None:
        return kept
    places = np.searchsorted(theirs, kept)
    return places if np.isin(kept, theirs).all() else None
