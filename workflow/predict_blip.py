"""Ask a BLIP about images on this machine: captions, answers, judgements, rankings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipress.errors import DataError
from clipress.runtime.served import ANSWER, CAPTION, JUDGE, MATCH
from clipress.serve.classify import LoadedModel
from clipress.serve.graphs import USES

OPTIONS = {ANSWER: "--question", JUDGE: "--statement", MATCH: "--text"}


@dataclass(frozen=True)
class Asked:
    """What to ask about the images."""

    question: str | None = None
    statement: str | None = None
    texts: tuple[str, ...] = ()

    def of(self, use: str | None) -> str | tuple[str, ...] | None:
        """Return what a model of some use is asked."""
        return {ANSWER: self.question, JUDGE: self.statement, MATCH: self.texts}.get(use)


def is_asked(model: LoadedModel, asked: Asked, labels: Sequence[str] | None) -> bool:
    """Return whether the model is a BLIP that is asked, and not to classify among labels. Raises DataError for what does not fit it."""
    for use, option in OPTIONS.items():
        if asked.of(use) and use != model.use:
            raise DataError(
                f"{option}: expected a model that {USES[use]}, but this one {model.use_in_words}. Leave it out."
            )
    if labels is not None and (model.use in (CAPTION, JUDGE) or asked.texts):
        about = "--text" if asked.texts else f"a model that {model.use_in_words}"
        raise DataError(f"--labels and --labels-file cannot be used with {about}. Leave them out.")
    if model.use in OPTIONS and not asked.of(model.use) and (model.use != MATCH or labels is None):
        or_labels = ", or --labels to classify images" if model.use == MATCH else ""
        raise DataError(f"This model {model.use_in_words}: set {OPTIONS[model.use]}{or_labels}.")
    return model.use is not None and (model.use != MATCH or labels is None)


def said_of(
    model: LoadedModel, images: Sequence[Path], asked: Asked, answers: Sequence[str] | None
) -> Iterator[dict[str, Any]]:
    """Yield what a BLIP says: a record per image, per pair of images or per text. Raises DataError for other than two images to judge."""
    if model.use == CAPTION:
        for image in images:
            yield {"image": str(image), "caption": model.caption(image)[0]}
    elif model.use == ANSWER:
        for image in images:
            (answer,) = model.answer(image, asked.question, answers)
            yield {"image": str(image), "question": asked.question, "answer": answer}
    elif model.use == JUDGE:
        if len(images) != 2:
            raise DataError(f"--statement: expected two images, which the statement is about, found {len(images)}.")
        (probability,) = model.judge(*images, asked.statement)
        yield {"images": [*map(str, images)], "statement": asked.statement, "probability": round(float(probability), 6)}
    else:
        for text, scores in zip(asked.texts, model.rank(images, asked.texts), strict=True):
            best = np.argsort(-scores, kind="stable")
            ranked = [{"image": str(images[place]), "score": round(float(scores[place]), 6)} for place in best]
            yield {"text": text, "images": ranked}
