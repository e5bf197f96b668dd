"""Run the metrics on evaluation sets through two encoders. Validation while training and bench both call this."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from clipress.metrics.retrieval import recalls
from clipress.metrics.zeroshot import class_embeddings, topk_accuracy, unit

if TYPE_CHECKING:
    from clipress.data.evalsets import EvalSet
    from clipress.data.transforms import Preprocess

Encoder = Callable[[np.ndarray], np.ndarray]


def encode_all(encode: Encoder, batches: Iterable[np.ndarray]) -> np.ndarray:
    """Encode batches and stack the unit embeddings: float32 [N, D]."""
    return unit(np.concatenate([np.asarray(encode(batch), np.float32) for batch in batches]))


def encode_texts(encode: Encoder, tokenize: Callable, texts: Sequence[str], batch: int = 256) -> np.ndarray:
    """Tokenise and encode texts: float32 [N, D]."""
    ids = tokenize(texts)
    return encode_all(encode, (ids[start : start + batch] for start in range(0, len(ids), batch)))


def evaluate(
    encode_image: Encoder, encode_text: Encoder, sets: Sequence[EvalSet], preprocess: Preprocess, tokenize: Callable
) -> dict[str, float]:
    """Return `{"<set>/<metric>": percent}`: top-k for sets with classes, recall both ways for the others."""
    results: dict[str, float] = {}
    for evalset in sets:
        images = encode_all(encode_image, evalset.pixel_batches(preprocess))
        if evalset.classes is not None:
            names, templates = evalset.classes.names, evalset.classes.templates
            prompts = [template.format(name) for name in names for template in templates]
            texts = encode_texts(encode_text, tokenize, prompts).reshape(len(names), len(templates), -1)
            found = topk_accuracy(images, class_embeddings(texts), evalset.labels())
        else:
            captions, owner = evalset.texts()
            found = recalls(images, encode_texts(encode_text, tokenize, captions), owner)
        results |= {f"{evalset.name}/{metric}": value for metric, value in found.items()}
    return results
