"""Ask a BLIP about images, on this machine or on a server: captions, answers, judgements, rankings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from clipress.errors import DataError
from clipress.runtime.served import ANSWER, CAPTION, JUDGE, MATCH
from clipress.serve.blip_client import BlipClient
from clipress.serve.classify import LoadedModel
from clipress.serve.client import Answer
from clipress.serve.graphs import USES
from clipress.workflow.predict import Read, Server

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


class Use(Protocol):
    """What a model is for."""

    use: str | None
    """caption, answer, judge or match, for a BLIP."""
    use_in_words: str


@dataclass(frozen=True)
class ServerUse:
    """What a server's model is for."""

    use: str | None

    @property
    def use_in_words(self) -> str:
        """The same in words."""
        return USES.get(self.use, "is no BLIP")


def use_of_server(server: Server) -> ServerUse:
    """Return what a server's BLIP is for. Raises ServerError for one that does not answer."""
    with BlipClient(server.url, timeout=server.timeout) as client:
        return ServerUse(client.use())


def is_asked(model: Use, asked: Asked, labels: Sequence[str] | None) -> bool:
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
    model: LoadedModel, images: Iterable[Read], asked: Asked, answers: Sequence[str] | None
) -> Iterator[dict[str, Any]]:
    """Yield what a BLIP says: a record per image, per pair of images or per text. Raises DataError for other than two images to judge."""
    if model.use == CAPTION:
        for path, image in images:
            yield {"image": str(path), "caption": model.caption(image)[0]}
    elif model.use == ANSWER:
        for path, image in images:
            (answer,) = model.answer(image, asked.question, answers)
            yield {"image": str(path), "question": asked.question, "answer": answer}
    elif together := list(images):
        yield from _said_of_all(model, *zip(*together, strict=True), asked)


def _said_of_all(
    model: LoadedModel, paths: Sequence[Path], images: Sequence[Any], asked: Asked
) -> Iterator[dict[str, Any]]:
    if model.use == JUDGE:
        _require_two(paths)
        (probability,) = model.judge(*images, asked.statement)
        yield _judged(paths, asked.statement, probability)
    else:
        yield from _ranked(paths, asked.texts, model.rank(images, asked.texts))


def said_by_server(
    server: Server, use: str, images: Iterable[Path], asked: Asked, answers: Sequence[str] | None, progress: bool
) -> Iterator[dict[str, Any]]:
    """Yield what a server's BLIP says, as `said_of` does, captions and answers as they arrive.

    A failed image has a record with its `error`, and does not affect the others' captions or answers.
    """
    with BlipClient(server.url, timeout=server.timeout, in_flight=server.in_flight, progress=progress) as client:
        if use == CAPTION:
            for answer in client.captioned(images):
                yield _record(answer, {}, "caption")
        elif use == ANSWER:
            for answer in client.answered(images, asked.question, answers):
                yield _record(answer, {"question": asked.question}, "answer")
        elif use == JUDGE:
            _require_two(images := list(images))
            yield _judged(images, asked.statement, client.judge(*images, asked.statement))
        else:
            images = list(images)
            yield from _ranked(images, asked.texts, client.rank(images, asked.texts))


def _require_two(images: Sequence[Path]) -> None:
    if len(images) != 2:
        raise DataError(f"--statement: expected two images, which the statement is about, found {len(images)}.")


def _record(answer: Answer, about: dict[str, Any], key: str) -> dict[str, Any]:
    found = {"error": answer.error} if answer.value is None else {key: answer.value}
    return {"image": str(answer.item), **about, **found}


def _judged(images: Sequence[Path], statement: str, probability: float) -> dict[str, Any]:
    return {"images": [*map(str, images)], "statement": statement, "probability": round(float(probability), 6)}


def _ranked(images: Sequence[Path], texts: Sequence[str], scores: np.ndarray) -> Iterator[dict[str, Any]]:
    for text, row in zip(texts, scores, strict=True):
        best = np.argsort(-row, kind="stable")
        yield {
            "text": text,
            "images": [{"image": str(images[place]), "score": round(float(row[place]), 6)} for place in best],
        }
