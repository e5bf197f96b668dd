"""Captions against references: CIDEr-D (Vedantam et al. 2015, as pycocoevalcap computes it) and BLEU-4 (Papineni et al. 2002).

METEOR and SPICE come from Java programs, where they are installed (caption_java.py).

    CIDEr  = 10 / 4 · sum over n of mean over references r of  exp(-(l - l_r)² / 72) · min(g, g_r)·g_r / (|g| |g_r|)
    BLEU-4 = (p_1 p_2 p_3 p_4)^(1/4) · exp(min(0, 1 - 1 / ratio)),  ratio = words generated / words of the closest references

g are the counts of a caption's n-grams times log(images / images that have the n-gram in a reference), and l counts bigrams. Published
figures split words with Stanford's PTB tokenizer, which needs Java; `ptb_like_words` splits most captions alike, not all.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from clipress.errors import DataError
from clipress.metrics.caption_java import scores_by_java
from clipress.metrics.outcomes import Outcomes

ORDERS, SPREAD = 4, 6.0  # longest n-grams; CIDEr-D's tolerance for another length
_AS_ASCII = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'"})
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_JOINED = re.compile(r"\b(can(?=not\b)|gon(?=na\b)|got(?=ta\b)|wan(?=na\b)|lem(?=me\b)|gim(?=me\b))")
_ENDINGS = re.compile(r"(?<=\w)(n't|'(?:s|m|d|ll|re|ve))(?![^\W_])")
_WORD = re.compile(
    r"n't|'(?:s|m|d|ll|re|ve)(?![^\W_])"  # endings that were split off
    r"|(?:[^\W\d_]\.){2,}|(?:mr|mrs|ms|dr|st|jr|vs)\."  # abbreviations
    r"|\d+(?:[.,:]\d+)+"  # numbers and times
    r"|[^\W_]+(?:[-/'][^\W_]+)*"
    r"|-[lr][rsc]b-|[$%&#@+=*]"
)

Counts = list[Counter]  # of the n-grams of a caption, one counter for each n


def ptb_like_words(text: str) -> list[str]:
    """Split a caption into lower-case words as the PTB tokenizer does: contractions apart, punctuation dropped."""
    text = text.lower().translate(_AS_ASCII)
    text = "".join(f" {_BRACKETS[letter]} " if letter in _BRACKETS else letter for letter in text)
    return _WORD.findall(_ENDINGS.sub(r" \1", _JOINED.sub(r"\1 ", text)))


def score_captions(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Outcomes]:
    """Return `cider` and `bleu4` of a caption per image, and `meteor` and `spice` where their programs are installed.

    Images are the units of their errors, document frequencies are fixed.

    Raises DataError for an image without references.
    """
    if len(captions) != len(references) or not all(references):
        lacking = sum(not texts for texts in references)
        raise DataError(
            f"captions: expected references for each of {len(captions)} images, found {len(references) - lacking}."
        )
    words = [ptb_like_words(text) for text in captions]
    known_words = [[ptb_like_words(text) for text in texts] for texts in references]
    found, known = [_counts(one) for one in words], [[_counts(one) for one in texts] for texts in known_words]
    ours = {"cider": Outcomes(cider(found, known)), "bleu4": _bleu(found, known)}
    return ours | scores_by_java(
        [" ".join(one) for one in words], [[" ".join(one) for one in texts] for texts in known_words]
    )


def _counts(words: Sequence[str]) -> Counts:
    return [Counter(zip(*(words[start:] for start in range(n)), strict=False)) for n in range(1, ORDERS + 1)]


def cider(captions: Sequence[Counts], references: Sequence[Sequence[Counts]]) -> np.ndarray:
    """Return every image's CIDEr-D, float64 [N]; images are documents, so a single one scores 0."""
    documents = Counter(gram for texts in references for gram in {gram for one in texts for n in one for gram in n})
    log_images = math.log(len(references))

    def weighed(counts: Counts) -> tuple[list[dict], np.ndarray, int]:
        vectors = [
            {gram: n * (log_images - math.log(max(documents[gram], 1))) for gram, n in one.items()} for one in counts
        ]
        norms = np.sqrt([sum(value**2 for value in vector.values()) for vector in vectors])
        return vectors, norms, counts[1].total()

    scores = np.zeros(len(captions))
    for place, (caption, texts) in enumerate(zip(captions, references, strict=True)):
        own, own_norms, own_length = weighed(caption)
        for text in texts:
            other, norms, length = weighed(text)
            products = [
                sum(min(value, theirs.get(gram, 0.0)) * theirs.get(gram, 0.0) for gram, value in ours.items())
                for ours, theirs in zip(own, other, strict=True)
            ]
            scale = own_norms * norms
            cosines = np.divide(products, scale, out=np.zeros(ORDERS), where=scale > 0)
            scores[place] += cosines.mean() * math.exp(-((own_length - length) ** 2) / (2 * SPREAD**2))
        scores[place] *= 10 / len(texts)
    return scores


def _bleu(captions: Sequence[Counts], references: Sequence[Sequence[Counts]]) -> Outcomes:
    """Return BLEU-4: a stratum for each n, in which images weigh as many n-grams as they have, and one for the lengths."""
    hits, totals = np.zeros((2, len(captions), ORDERS + 1))
    for place, (caption, texts) in enumerate(zip(captions, references, strict=True)):
        most = [Counter() for _ in range(ORDERS)]
        for text in texts:
            most = [one | other for one, other in zip(most, text, strict=True)]  # the larger count of each
        hits[place, :ORDERS] = [(one & other).total() for one, other in zip(caption, most, strict=True)]
        totals[place, :ORDERS] = [one.total() for one in caption]
        length = caption[0].total()
        hits[place, ORDERS] = length
        lengths = (text[0].total() for text in texts)
        totals[place, ORDERS] = min((abs(one - length), one) for one in lengths)[1]
    totals[:, ~totals.any(0)] = 1  # nothing generated has so many words, so that none of its n-grams is right
    images = np.repeat(np.arange(len(captions)), ORDERS + 1)
    strata = np.tile(np.arange(ORDERS + 1), len(captions))
    values = np.divide(hits, totals, out=np.zeros_like(hits), where=totals > 0)
    return Outcomes(values.ravel(), strata, images, "bleu", weights=totals.ravel())
