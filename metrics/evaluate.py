"""Run the metrics on evaluation sets through two encoders. Validation while training and bench both call this."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from clipress.metrics.outcomes import Outcomes, percents
from clipress.metrics.retrieval import retrieval
from clipress.metrics.zeroshot import class_embeddings, classification, unit

if TYPE_CHECKING:
    from clipress.data.eval_sets import EvalSet
    from clipress.data.sources import Classes
    from clipress.data.transforms import Preprocess

log = logging.getLogger("clipress.metrics")

Encoder = Callable[[np.ndarray], np.ndarray]


def encode_all(encode: Encoder, batches: Iterable[np.ndarray]) -> np.ndarray:
    """Encode batches and stack the unit embeddings: float32 [N, D]."""
    return unit(np.concatenate([np.asarray(encode(batch), np.float32) for batch in batches]))


def classifier(encode_text: Encoder, tokenize: Callable, classes: Classes) -> np.ndarray:
    """Return the text tower's classifier: unit float32 [C, D], one row per class, its prompts averaged."""
    prompts = [text for label in range(len(classes.names)) for text in classes.prompts(label)]
    texts = encode_texts(encode_text, tokenize, prompts)
    return class_embeddings(texts.reshape(len(classes.names), len(classes.templates), -1))


def encode_texts(encode: Encoder, tokenize: Callable, texts: Sequence[str], batch: int = 256) -> np.ndarray:
    """Tokenise and encode texts: float32 [N, D]. Equal texts are encoded once, so that they have equal embeddings."""
    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    ids = tokenize(list(places))
    encoded = encode_all(encode, (ids[start : start + batch] for start in range(0, len(ids), batch)))
    return encoded[[places[text] for text in texts]]


def evaluate(
    encode_image: Encoder, encode_text: Encoder, sets: Sequence[EvalSet], preprocess: Preprocess, tokenize: Callable
) -> dict[str, float]:
    """Return `{"<set>/<metric>": percent}`; see `evaluate_items`."""
    return percents(evaluate_items(encode_image, encode_text, sets, preprocess, tokenize))


def evaluate_items(
    encode_image: Encoder, encode_text: Encoder, sets: Sequence[EvalSet], preprocess: Preprocess, tokenize: Callable
) -> dict[str, Outcomes]:
    """Return `{"<set>/<metric>": outcomes}`: zero-shot for sets with classes, retrieval both ways for the others.

    Ties with wrong answers count against the model, and are told in a warning. Raises ArtifactError for embeddings that
    are not finite.
    """
    results: dict[str, Outcomes] = {}
    for evalset in sets:
        images = encode_all(encode_image, evalset.pixel_batches(preprocess))
        if evalset.classes is not None:
            columns = classifier(encode_text, tokenize, evalset.classes)
            found = classification(images, columns, evalset.labels(), evalset.seen)
            _tell_ties(evalset.name, "top1", found)
        else:
            captions, owner = evalset.texts()
            found = retrieval(images, encode_texts(encode_text, tokenize, captions), owner)
            _tell_ties(evalset.name, "text_r1", found)
            _tell_ties(evalset.name, "image_r1", found)
        results |= {f"{evalset.name}/{metric}": outcomes for metric, outcomes in found.items()}
    return results


def _tell_ties(name: str, metric: str, found: dict[str, Outcomes]) -> None:
    if tied := found[metric].tied:
        queries = len(found[metric].values)
        log.warning("%s/%s: %d of %d queries tie with wrong answers, which are put first.", name, metric, tied, queries)
