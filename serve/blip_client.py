"""A client of a server's BLIP: it asks for what a loaded export says, see serve/blip.py."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from clipress.data.spec import CANDIDATES
from clipress.errors import DataError
from clipress.metrics.blip import LOGITS, STATES
from clipress.metrics.retrieval import finite
from clipress.runtime.served import (
    ANSWER,
    ANSWERS,
    CAPTION,
    IMAGE,
    JUDGE,
    MATCH,
    OTHER_IMAGE,
    PROBABILITY,
    QUESTION,
    STATEMENT,
    TEXT,
    USES,
)
from clipress.serve.blip import rank_images
from clipress.serve.client import Answer, Client, bytes_of, strings

if TYPE_CHECKING:
    from clipress.serve.images import ImageFile


class BlipClient(Client):
    """Sends requests to the models `caption`, `answer`, `judge`, or those of a BLIP for retrieval; see Client."""

    def use(self) -> str | None:
        """Return what the server's BLIP is for: caption, answer, judge or match; None without one. Raises ServerError."""

        async def ready() -> list[bool]:
            return await asyncio.gather(*(self._is_ready(use) for use in USES))

        return next((use for use, found in zip(USES, self._result("models", ready()), strict=True) if found), None)

    def captioned(self, images: Iterable[ImageFile]) -> Iterator[Answer]:
        """Yield a caption image by image, as they arrive and in order; `images` may be endless. Raises ServerError."""
        return self._written(CAPTION, images, {})

    def answered(
        self, images: Iterable[ImageFile], question: str, answers: Sequence[str] | None = None
    ) -> Iterator[Answer]:
        """Yield the answer to a question about every image, chosen from `answers` if there are some; see `captioned`."""
        return self._written(
            ANSWER, images, {QUESTION: strings([question]), **({ANSWERS: strings(answers)} if answers else {})}
        )

    def judge(self, first: ImageFile, second: ImageFile, statement: str) -> float:
        """Return the probability that a statement about two images is true.

        Raises ServerError, and DataError for a file that cannot be read.
        """
        images = {IMAGE: strings([_read(first)]), OTHER_IMAGE: strings([_read(second)])}
        found = self._result(JUDGE, self._infer(JUDGE, {**images, STATEMENT: strings([statement])}, PROBABILITY))
        return float(found[0])

    def rank(self, images: Iterable[ImageFile], texts: Sequence[str], candidates: int = CANDIDATES) -> np.ndarray:
        """Return the score of every image for every text, float64 [T, N], as LoadedModel.rank does.

        Images are encoded once; the states of the nearest are held here, and sent again with each of their texts. Raises ServerError,
        and DataError for an image that cannot be read.
        """
        queries = self.embed_texts(texts)
        for error in queries.errors.values():
            raise DataError(f"A text cannot be ranked by: {error}.")

        def match(place: int, states: np.ndarray) -> np.ndarray:
            return self._result(f"score_{MATCH}", self._match_logits(texts[place], states))

        return rank_images(finite(queries.values, TEXT), self._encoded(images), match, candidates)

    def _written(self, model: str, images: Iterable[ImageFile], fixed: dict[str, np.ndarray]) -> Iterator[Answer]:
        async def send(files: Sequence[bytes]) -> list[str]:
            found = await self._infer(model, {IMAGE: strings(files), **fixed}, USES[model].gives)
            return [text.decode() for text in found]

        return self._answers(images, send, 1, IMAGE)

    def _encoded(self, images: Iterable[ImageFile]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the embedding [1, D] and the states [1, ...] of every image. Raises DataError for one that fails."""

        async def send(files: Sequence[bytes]) -> Iterable[tuple[np.ndarray, np.ndarray]]:
            return zip(*await self._infer(f"embed_{IMAGE}", {IMAGE: strings(files)[:, None]}, f"{IMAGE}_embeds", STATES), strict=True)  # fmt: skip

        for answer in self._answers(images, send, 1, IMAGE):
            if answer.value is None:
                raise DataError(f"{answer.item}: {answer.error}")
            embedding, states = answer.value
            yield finite(embedding[None], IMAGE), states[None]

    async def _match_logits(self, text: str, states: np.ndarray) -> np.ndarray:
        """Return the logits [N] that a text belongs to images [N, ...], a request for each, which the server puts together."""
        limit = asyncio.Semaphore(self.in_flight)

        async def one(row: np.ndarray) -> np.ndarray:
            async with limit:
                return await self._infer(f"score_{MATCH}", {TEXT: strings([text])[:, None], STATES: row[None]}, LOGITS)

        return np.concatenate(await asyncio.gather(*map(one, states)))[:, 1]


def _read(image: ImageFile) -> bytes:
    found = bytes_of(image)
    if isinstance(found, DataError):
        raise found
    return found
