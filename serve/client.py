"""A client of the served models: pictures and texts go to Triton as they are, over HTTP or gRPC.

A few requests are on their way at any time and the next picture is read only when one has come back, so that a million
pictures need no more memory than a hundred. A request that the server could not be reached with, or had no room for, is
sent again, later each time; one that it refused is not. What becomes of one picture is nothing to the others.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from threading import Thread
from types import ModuleType, TracebackType
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from clipress.data.prompts import check_labels
from clipress.errors import BackendMissing, DataError, ServerError
from clipress.progress import progress_bar

Protocol = Literal["auto", "http", "grpc"]
Picture = str | Path | bytes
PORTS = {"http": 8000, "grpc": 8001}
SCHEMES = {"http": ("http", False), "https": ("http", True), "grpc": ("grpc", False), "grpcs": ("grpc", True)}
BUSY = {"429", "502", "503", "504", "StatusCode.UNAVAILABLE"}  # worth another try
UNKNOWN = {"404", "StatusCode.NOT_FOUND"}
LONGEST_DELAY = 10.0  # seconds
GROUP = 16  # pictures per request of `classify`: labels are embedded once for all of them


@dataclass(frozen=True)
class Answer:
    """What became of one item."""

    item: Any
    value: np.ndarray | None
    """float32 [D] or [C]; None where there is an error."""
    error: str | None = None


class Rows(NamedTuple):
    """Answers to all items, in their order."""

    values: np.ndarray
    """float32 [N, D] or [N, C]; rows of NaN where there is an error."""
    errors: dict[int, str]
    """By the item's number."""


class Hit(NamedTuple):
    """An entry of the server's index."""

    key: str
    score: float


class _Rejected(Exception):
    """The server refused this request; it would do so again."""


class _Unavailable(Exception):
    """The server could not be reached, or had no room, as often as it was tried."""


class Client:
    """Asks the models `embed_image`, `embed_text`, `classify` and `search` of a Triton server.

    A client belongs to one thread; close it, or use it in a `with`.

    Args:
        url: `http://host:8000`, `grpc://host:8001`, either with an s for TLS, or `host:port`.
        protocol: auto: as the URL says; of a bare `host:port`, gRPC at port 8001 and HTTP elsewhere.
        timeout: seconds one try may take.
        retries: further tries when the server cannot be reached or has no room.
        delay: seconds before the second try; doubled for each later one, up to ten.
        in_flight: requests that are on their way at the same time.
        progress: show a bar on stderr.

    Raises ServerError for a URL that is none, and BackendMissing when the protocol's packages are not installed.
    """

    def __init__(
        self,
        url: str,
        protocol: Protocol = "auto",
        timeout: float = 60.0,
        retries: int = 4,
        delay: float = 0.2,
        in_flight: int = 16,
        progress: bool = False,
    ) -> None:
        self.url, self.timeout, self.retries, self.delay = url, timeout, retries, delay
        self.in_flight, self.progress = in_flight, progress
        self.protocol, address, tls = address_from(url, protocol)
        self._triton, aio = _packages(self.protocol)
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="clipress client", daemon=True)
        self._thread.start()

        async def connect() -> Any:  # where the loop runs
            limit = {"conn_limit": in_flight, "conn_timeout": None} if self.protocol == "http" else {}
            return aio.InferenceServerClient(address, ssl=tls, **limit)

        self._server = self._started(connect()).result()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. A server waits half a minute for HTTP ones that are left open when it stops."""
        if self._loop.is_closed():
            return
        self._started(self._stop()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _stop(self) -> None:
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await self._server.close()

    def embed_images(self, images: Iterable[Picture]) -> Rows:
        """Return unit embeddings [N, D] of pictures: paths, or the bytes of files. Raises ServerError."""
        return _rows(self._answers(images, self._embedder("image"), 1, "picture"))

    def embed_texts(self, texts: Iterable[str]) -> Rows:
        """Return unit embeddings [N, D] of texts. Raises ServerError."""
        return _rows(self._answers(texts, self._embedder("text"), 1, "text"))

    def classify(
        self, images: Iterable[Picture], labels: Sequence[str], templates: Sequence[str] | None = None
    ) -> Rows:
        """Return the probability of every label for every picture, [N, C]; rows sum to 1.

        `templates` are prompts with `{}` for the label; default: the server's. Raises ServerError, and DataError for
        labels that are empty or repeated.
        """
        return _rows(self.classified(images, labels, templates), len(labels))

    def classified(
        self, images: Iterable[Picture], labels: Sequence[str], templates: Sequence[str] | None = None
    ) -> Iterator[Answer]:
        """Yield what `classify` returns picture by picture, as it comes and in order; `images` may be endless."""
        check_labels(labels)
        fixed = {"labels": _strings(labels)} | ({} if templates is None else {"templates": _strings(templates)})

        async def ask(pictures: Sequence[bytes]) -> np.ndarray:
            found = await self._infer("classify", {"image": _strings(pictures), **fixed}, "probabilities")
            return _of_shape(found, (len(pictures), len(labels)), "classify")

        return self._answers(images, ask, GROUP, "picture")

    def search(self, text: str, k: int = 10) -> list[Hit]:
        """Return the entries of the server's index that are nearest to a text, nearest first. Raises ServerError."""

        async def ask() -> tuple[np.ndarray, np.ndarray]:
            return await self._infer(
                "search", {"text": _strings([text]), "k": np.asarray([k], np.int32)}, "scores", "keys"
            )

        try:
            scores, keys = self._started(ask()).result()
        except (_Rejected, _Unavailable) as error:
            raise ServerError(f"{self.url}, search: {error}") from None
        found = zip(keys.ravel(), scores.ravel(), strict=True)  # [1, k]: the server takes several texts
        return [Hit(key.decode("utf-8", "surrogateescape"), float(score)) for key, score in found]

    def _embedder(self, tower: str) -> Callable[[Sequence[bytes | str]], Awaitable[np.ndarray]]:
        async def ask(items: Sequence[bytes | str]) -> np.ndarray:
            found = await self._infer(f"embed_{tower}", {tower: _strings(items)[:, None]}, f"{tower}_embeds")
            return _of_shape(found, (len(items), found.shape[-1]), f"embed_{tower}")

        return ask

    def _answers(
        self, items: Iterable[Any], ask: Callable[[Sequence[Any]], Awaitable[np.ndarray]], group: int, unit: str
    ) -> Iterator[Answer]:
        """Ask for items in groups; at most `in_flight` groups are read and not yet answered."""
        iterator, waiting = iter(items), deque[Future]()
        total = len(items) if isinstance(items, Sized) else None
        answered, lost = False, 0
        try:
            with progress_bar(total, self.url, unit, disable=not self.progress) as bar:
                while True:
                    while len(waiting) < self.in_flight and (some := list(islice(iterator, group))):
                        waiting.append(self._started(self._group(some, ask, _content(some, unit))))
                    if not waiting:
                        return
                    for answer, reached in waiting.popleft().result():
                        answered, lost = answered or reached is True, lost + (reached is False) if not reached else 0
                        if reached is False and (lost >= self.in_flight * group or not (waiting or answered)):
                            raise ServerError(
                                f"{self.url} was asked for, and there is no answer: {answer.error}. Is the server running?"
                            )
                        bar.update()
                        yield answer
        finally:
            for one in waiting:
                one.cancel()

    async def _group(
        self, items: list[Any], ask: Callable[[Sequence[Any]], Awaitable[np.ndarray]], content: list[Any]
    ) -> list[tuple[Answer, bool | None]]:
        """Answer some items, each with whether the server was reached; None: it did not have to be."""
        broken = {number: str(one) for number, one in enumerate(content) if isinstance(one, DataError)}
        whole = [number for number in range(len(items)) if number not in broken]
        answers: dict[int, tuple[Answer, bool | None]] = {
            number: (Answer(items[number], None, error), None) for number, error in broken.items()
        }
        try:
            found = await ask([content[number] for number in whole]) if whole else ()
            answers |= {number: (Answer(items[number], row), True) for number, row in zip(whole, found, strict=True)}
        except _Unavailable as error:
            answers |= {number: (Answer(items[number], None, str(error)), False) for number in whole}
        except _Rejected as error:
            if len(whole) == 1:
                answers[whole[0]] = Answer(items[whole[0]], None, str(error)), True
            else:  # which of them it was is not said
                for number in whole:
                    [answers[number]] = await self._group([items[number]], ask, [content[number]])
        return [answers[number] for number in range(len(items))]

    async def _infer(self, model: str, inputs: dict[str, np.ndarray], *outputs: str) -> Any:
        """Send one request, as often as is allowed; returns its output, or outputs."""
        tensors = []
        for name, values in inputs.items():
            kind = "BYTES" if values.dtype == object else "INT32"
            tensors.append(self._triton.InferInput(name, list(values.shape), kind))
            tensors[-1].set_data_from_numpy(values)
        for attempt in range(self.retries + 1):
            try:
                result = await asyncio.wait_for(self._server.infer(model, tensors), self.timeout)
            except Exception as error:
                told = self._told(model, error)
                if attempt == self.retries:
                    raise _Unavailable(told) from None
            else:
                found = [result.as_numpy(name) for name in outputs]
                if any(values is None for values in found):
                    raise ServerError(f"{self.url}: model '{model}' gives no {' and '.join(outputs)}.")
                return found if len(found) > 1 else found[0]
            await asyncio.sleep(min(self.delay * 2**attempt, LONGEST_DELAY))
        raise AssertionError("unreachable")

    def _told(self, model: str, error: Exception) -> str:
        """Say why a try failed if another is worth while; raise what ends the request if it is not."""
        from tritonclient.utils import InferenceServerException

        if isinstance(error, InferenceServerException):
            if error.status() in BUSY:
                return error.message()
            if error.status() in UNKNOWN:
                raise ServerError(
                    f"{self.url} has no model '{model}': {error.message()}. Does it serve a repository of clipress?"
                ) from None
            raise _Rejected(error.message()) from None
        if isinstance(error, (asyncio.TimeoutError, TimeoutError)):
            return f"no answer within {self.timeout:g} s"
        if isinstance(error, OSError) or type(error).__module__.startswith(("aiohttp", "grpc")):
            return str(error) or type(error).__name__
        raise error

    def _started(self, task: Any) -> Future:
        return asyncio.run_coroutine_threadsafe(task, self._loop)


def address_from(url: str, protocol: Protocol = "auto") -> tuple[Literal["http", "grpc"], str, bool]:
    """Return a URL's protocol, `host:port` (and path), and whether it asks for TLS. Raises ServerError."""
    scheme, separator, rest = url.partition("://")
    try:
        parts = urlsplit(f"//{rest if separator else url}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or (separator and scheme not in SCHEMES):
        raise ServerError(
            f"'{url}' is no address of a server. Give one such as http://localhost:8000 or grpc://host:8001."
        )
    found, tls = SCHEMES[scheme] if separator else ("grpc" if port == PORTS["grpc"] else "http", False)
    if protocol != "auto":
        if separator and protocol != found:
            raise ServerError(f"'{url}' asks for {found}, and the protocol is to be {protocol}. Leave one of them out.")
        found = protocol
    name = f"[{host}]" if ":" in host else host
    return found, f"{name}:{port or PORTS[found]}{parts.path.rstrip('/') if found == 'http' else ''}", tls


def _packages(protocol: str) -> tuple[ModuleType, ModuleType]:
    from importlib import import_module

    try:
        return import_module(f"tritonclient.{protocol}"), import_module(f"tritonclient.{protocol}.aio")
    except ImportError as error:
        raise BackendMissing(
            f"Asking a server by {protocol} needs a package that is not installed ({error}). "
            "Do: pip install 'clipress[serve]'"
        ) from None


def _content(items: Sequence[Any], unit: str) -> list[Any]:
    """Return what is sent of items: texts as they are, pictures' bytes, or the error that stands in their way."""
    return list(items) if unit == "text" else [item if isinstance(item, bytes) else _read(item) for item in items]


def _read(path: str | Path) -> bytes | DataError:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        return DataError(f"{path} cannot be read: {error}.")


def _strings(items: Sequence[bytes | str]) -> np.ndarray:
    """Return an array of bytes objects [N]; numpy's own kind of bytes would lose zeros at the end."""
    array = np.empty(len(items), object)
    array[:] = [item if isinstance(item, bytes) else item.encode("utf-8", "surrogateescape") for item in items]
    return array


def _of_shape(found: np.ndarray, shape: tuple[int, ...], model: str) -> np.ndarray:
    if found.shape != shape or not np.isfinite(found).all():
        raise ServerError(
            f"Model '{model}' was to answer with {list(shape)} finite numbers; found {list(found.shape)}."
        )
    return found.astype(np.float32, copy=False)


def _rows(answers: Iterable[Answer], width: int = 0) -> Rows:
    """Gather answers; `width` is that of an empty array."""
    found = list(answers)
    width = next((len(answer.value) for answer in found if answer.value is not None), width)
    values = np.full((len(found), width), np.nan, np.float32)
    errors = {}
    for number, answer in enumerate(found):
        if answer.value is None:
            errors[number] = str(answer.error)
        else:
            values[number] = answer.value
    return Rows(values, errors)
