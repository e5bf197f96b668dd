"""Evaluate two encoders on evaluation sets, for validation during training and for bench."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from clipress.metrics.outcomes import Outcomes, percents
from clipress.metrics.retrieval import retrieval
from clipress.metrics.zeroshot import classification, embed_labels, unit

if TYPE_CHECKING:
    from clipress.data.eval_sets import EvalSet
    from clipress.data.sources import Classes
    from clipress.data.transforms import Preprocess

log = logging.getLogger("clipress.metrics")

Encoder = Callable[[np.ndarray], np.ndarray]
TEXTS_AT_ONCE = 256


def encode_all(encode: Encoder, batches: Iterable[np.ndarray]) -> np.ndarray:
    """Encode batches and concatenate their unit embeddings: float32 [N, D]."""
    return unit(np.concatenate([np.asarray(encode(batch), np.float32) for batch in batches]))


def embed_classes(encode_text: Encoder, tokenize: Callable, classes: Classes) -> np.ndarray:
    """Return the text tower's zero-shot classifier: unit rows float32 [C, D], one per class."""
    return embed_labels(partial(encode_texts, encode_text, tokenize), classes.names, classes.templates)


def encode_texts(encode: Encoder, tokenize: Callable, texts: Sequence[str], batch: int = TEXTS_AT_ONCE) -> np.ndarray:
    """Tokenise and encode texts: float32 [N, D]. Repeated texts are encoded once, so that their embeddings are equal."""
    ids, rows = ids_of(tokenize, texts)
    return encode_ids(encode, ids, batch)[rows]


def ids_of(tokenize: Callable, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of every distinct text, and which of their rows each text has, int64 [N]."""
    rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    return tokenize(list(rows)), np.asarray([rows[text] for text in texts], np.int64)


def encode_ids(encode: Encoder, ids: np.ndarray, batch: int = TEXTS_AT_ONCE) -> np.ndarray:
    """Encode tokenised texts, some at a time: unit embeddings, float32 [N, D]."""
    return encode_all(encode, (ids[start : start + batch] for start in range(0, len(ids), batch)))


def evaluate(
    encode_image: Encoder, encode_text: Encoder, sets: Sequence[EvalSet], preprocess: Preprocess, tokenize: Callable
) -> dict[str, float]:
    """Return `{"<set>/<metric>": percent}`; see `evaluate_items`."""
    return percents(evaluate_items(encode_image, encode_text, sets, preprocess, tokenize))


def evaluate_items(
    encode_image: Encoder, encode_text: Encoder, sets: Sequence[EvalSet], preprocess: Preprocess, tokenize: Callable
) -> dict[str, Outcomes]:
    """Return `{"<set>/<metric>": outcomes}`: zero-shot for sets with classes, retrieval in both directions for others.

    Ties with wrong answers count against the model, with a warning. Raises ArtifactError for embeddings that are not
    finite, RecipeError for images without captions or classes.
    """
    results: dict[str, Outcomes] = {}
    for evalset in sets:
        captions, owner = evalset.texts() if evalset.classes is None else ([], None)
        images = encode_all(encode_image, evalset.pixel_batches(preprocess))
        if evalset.classes is not None:
            classes = embed_classes(encode_text, tokenize, evalset.classes)
            found = classification(images, classes, evalset.labels(), evalset.seen)
            _warn_of_ties(evalset.name, "top1", found)
        else:
            found = retrieval(images, encode_texts(encode_text, tokenize, captions), owner)
            _warn_of_ties(evalset.name, "text_r1", found)
            _warn_of_ties(evalset.name, "image_r1", found)
        results |= {f"{evalset.name}/{metric}": outcomes for metric, outcomes in found.items()}
    return results


def _warn_of_ties(name: str, metric: str, found: dict[str, Outcomes]) -> None:
    if tied := found[metric].tied:
        queries = len(found[metric].values)
        log.warning("%s/%s: %d of %d queries tie with wrong answers and count as misses.", name, metric, tied, queries)
