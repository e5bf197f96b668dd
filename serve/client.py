"""A client of the served models: image files and texts are sent to Triton as they are, over HTTP or gRPC.

A few requests are in flight at any time and the next image is read only when one has been answered, so that a million
images need no more memory than a hundred. A request is sent again, with growing delays, if the server could not be reached
or had no room for it, but not if the server refused it. A failed image does not affect the others.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from threading import Thread
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from clipress.data.prompts import check_labels
from clipress.errors import DataError, ServerError, import_extra
from clipress.progress import progress_bar
from clipress.serve.graphs import IMAGE, TEXT

if TYPE_CHECKING:
    from clipress.serve.images import ImageFile

Protocol = Literal["auto", "http", "grpc"]
PORTS = {"http": 8000, "grpc": 8001}
SCHEMES = {"http": ("http", False), "https": ("http", True), "grpc": ("grpc", False), "grpcs": ("grpc", True)}
BUSY = {"429", "502", "503", "504", "StatusCode.UNAVAILABLE"}  # worth a retry
UNKNOWN = {"404", "StatusCode.NOT_FOUND"}
TYPES = {"O": "BYTES", "b": "BOOL", "i": "INT32", "f": "FP32"}  # of arrays that are sent, by NumPy's letters
LONGEST_DELAY = 10.0  # seconds
GROUP = 16  # images per request to `classify`: labels are embedded once for all of them


@dataclass(frozen=True)
class Answer:
    """The result for one item."""

    item: Any
    value: Any
    """float32 [D] or [C], or a text; None if there is an error."""
    error: str | None = None


class Rows(NamedTuple):
    """The results for all items, in order."""

    values: np.ndarray
    """float32 [N, D] or [N, C]; items with an error have rows of NaN."""
    errors: dict[int, str]
    """Messages by the items' numbers."""


class Hit(NamedTuple):
    """An entry of the server's index."""

    key: str
    score: float


class _Rejected(Exception):
    """The server refused this request, and would refuse it again."""


class _Unavailable(Exception):
    """The server could not be reached, or had no room, in any of the attempts."""


class Client:
    """Sends requests to the models `embed_image`, `embed_text`, `classify` and `search` of a Triton server.

    A client belongs to one thread. Close it, or use it in a `with`.

    Args:
        url: `http://host:8000`, `grpc://host:8001`, either with an s for TLS, or `host:port`.
        protocol: auto takes it from the URL; a bare `host:port` means gRPC at port 8001 and HTTP elsewhere.
        timeout: seconds that one attempt may take.
        retries: further attempts if the server cannot be reached or has no room.
        delay: seconds before the second attempt; doubled for each later one, up to ten.
        in_flight: number of concurrent requests.
        progress: show a progress bar on stderr.

    Raises ServerError for an invalid URL, and BackendMissing if the protocol's packages are not installed.
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

        async def connect() -> Any:  # must run in the loop's thread
            limit = {"conn_limit": in_flight, "conn_timeout": None} if self.protocol == "http" else {}
            return aio.InferenceServerClient(address, ssl=tls, **limit)

        self._server = self._start(connect()).result()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. A server that stops waits half a minute for HTTP connections that are still open."""
        if self._loop.is_closed():
            return
        self._start(self._stop()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _stop(self) -> None:
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await self._server.close()

    def embed_images(self, images: Iterable[ImageFile]) -> Rows:
        """Return unit embeddings [N, D] of images: paths, or the bytes of files. Raises ServerError."""
        return _rows(self._answers(images, self._embedder(IMAGE), 1, IMAGE))

    def embed_texts(self, texts: Iterable[str]) -> Rows:
        """Return unit embeddings [N, D] of texts. Raises ServerError."""
        return _rows(self.embedded_texts(texts))

    def embedded_texts(self, texts: Iterable[str]) -> Iterator[Answer]:
        """Yield what `embed_texts` returns text by text, as results arrive and in order; `texts` may be endless."""
        return self._answers(texts, self._embedder(TEXT), 1, TEXT)

    def labels(self) -> list[str] | None:
        """Return the labels of a served classifier; None for a CLIP, which takes any labels. Raises ServerError."""
        config = self._result("classify", self._read_config("classify"))
        # gRPC leaves out what is empty, and a model that clipress did not write may have no parameters.
        found = config.get("parameters", {}).get("labels", {}).get("string_value")
        return None if found is None else json.loads(found)

    def classify(
        self,
        images: Iterable[ImageFile],
        labels: Sequence[str] | None = None,
        templates: Sequence[str] | None = None,
        softmax: bool = False,
    ) -> Rows:
        """Return the probability of every label for every image, [N, C]; rows sum to 1, but for a SigLIP.

        Args:
            images: paths, or the bytes of files.
            labels: names to choose from; None for a served classifier, which has its own, see `labels()`.
            templates: prompts with `{}` for the label; default: the server's.
            softmax: make the rows of a SigLIP sum to 1 too.

        Raises ServerError, and DataError for labels that are empty or repeated.
        """
        return _rows(self.classified(images, labels, templates, softmax), len(labels or ()))

    def classified(
        self,
        images: Iterable[ImageFile],
        labels: Sequence[str] | None = None,
        templates: Sequence[str] | None = None,
        softmax: bool = False,
    ) -> Iterator[Answer]:
        """Yield what `classify` returns image by image, as results arrive and in order; `images` may be endless."""
        fixed = {} if templates is None else {"templates": strings(templates)}
        if softmax:
            fixed["softmax"] = np.asarray([True])
        if labels is not None:
            check_labels(labels)
            fixed["labels"] = strings(labels)

        async def send(files: Sequence[bytes]) -> np.ndarray:
            found = await self._infer("classify", {IMAGE: strings(files), **fixed}, "probabilities")
            return _of_shape(found, (len(files), len(labels) if labels else found.shape[-1]), "classify")

        return self._answers(images, send, GROUP, IMAGE)

    def search(self, text: str, k: int = 10) -> list[Hit]:
        """Return the entries of the server's index that are nearest to a text, nearest first. Raises ServerError."""
        inputs = {TEXT: strings([text]), "k": np.asarray([k], np.int32)}
        scores, keys = self._result("search", self._infer("search", inputs, "scores", "keys"))
        found = zip(keys.ravel(), scores.ravel(), strict=True)  # [1, k]: the server takes several texts
        return [Hit(key.decode("utf-8", "surrogateescape"), float(score)) for key, score in found]

    def _embedder(self, side: str) -> Callable[[Sequence[bytes | str]], Awaitable[np.ndarray]]:
        model = f"embed_{side}"

        async def send(items: Sequence[bytes | str]) -> np.ndarray:
            found = await self._infer(model, {side: strings(items)[:, None]}, f"{side}_embeds")
            return _of_shape(found, (len(items), found.shape[-1]), model)

        return send

    def _result(self, model: str, request: Awaitable[Any]) -> Any:
        """Wait for a single request. Raises ServerError."""
        try:
            return self._start(request).result()
        except (_Rejected, _Unavailable) as error:
            raise ServerError(f"{self.url}, {model}: {error}") from None

    def _answers(
        self, items: Iterable[Any], send: Callable[[Sequence[Any]], Awaitable[np.ndarray]], group: int, unit: str
    ) -> Iterator[Answer]:
        """Send items in groups; at most `in_flight` groups are read and not yet answered."""
        iterator, waiting = iter(items), deque[Future]()
        total = len(items) if isinstance(items, Sized) else None
        answered, lost = False, 0
        try:
            with progress_bar(total, self.url, unit, disable=not self.progress) as bar:
                while True:
                    while len(waiting) < self.in_flight and (some := list(islice(iterator, group))):
                        waiting.append(self._start(self._group(some, send, _content(some, unit))))
                    if not waiting:
                        return
                    for answer, reached in waiting.popleft().result():
                        answered, lost = answered or reached is True, lost + (reached is False) if not reached else 0
                        if reached is False and (lost >= self.in_flight * group or not (waiting or answered)):
                            raise ServerError(f"{self.url} does not answer: {answer.error}. Is the server running?")
                        bar.update()
                        yield answer
        finally:
            for one in waiting:
                one.cancel()

    async def _group(
        self, items: list[Any], send: Callable[[Sequence[Any]], Awaitable[np.ndarray]], content: list[Any]
    ) -> list[tuple[Answer, bool | None]]:
        """Return the answers for some items, each with whether the server was reached; None if nothing was sent."""
        broken = {number: str(one) for number, one in enumerate(content) if isinstance(one, DataError)}
        whole = [number for number in range(len(items)) if number not in broken]
        answers: dict[int, tuple[Answer, bool | None]] = {
            number: (Answer(items[number], None, error), None) for number, error in broken.items()
        }
        try:
            found = await send([content[number] for number in whole]) if whole else ()
            answers |= {number: (Answer(items[number], row), True) for number, row in zip(whole, found, strict=True)}
        except _Unavailable as error:
            answers |= {number: (Answer(items[number], None, str(error)), False) for number in whole}
        except _Rejected as error:
            if len(whole) == 1:
                answers[whole[0]] = Answer(items[whole[0]], None, str(error)), True
            else:  # the server does not say which one it was
                for number in whole:
                    [answers[number]] = await self._group([items[number]], send, [content[number]])
        return [answers[number] for number in range(len(items))]

    async def _infer(self, model: str, inputs: dict[str, np.ndarray], *outputs: str) -> Any:
        """Send a request, with retries; return its output, or outputs."""
        tensors = []
        for name, values in inputs.items():
            tensors.append(self._triton.InferInput(name, list(values.shape), TYPES[values.dtype.kind]))
            tensors[-1].set_data_from_numpy(values)
        result = await self._retried(model, lambda: self._server.infer(model, tensors))
        found = [result.as_numpy(name) for name in outputs]
        if any(values is None for values in found):
            raise ServerError(f"{self.url}: model '{model}' gives no {' and '.join(outputs)}.")
        return found if len(found) > 1 else found[0]

    async def _read_config(self, model: str) -> dict[str, Any]:
        options = {"as_json": True} if self.protocol == "grpc" else {}
        found = await self._retried(model, lambda: self._server.get_model_config(model, **options))
        return found["config"] if self.protocol == "grpc" else found

    async def _is_ready(self, model: str) -> bool:
        return await self._retried(model, lambda: self._server.is_model_ready(model))

    async def _retried(self, model: str, attempt: Callable[[], Awaitable[Any]]) -> Any:
        """Try a request until it succeeds. Raises _Unavailable after the last attempt, and _Rejected or ServerError."""
        for number in range(self.retries + 1):
            try:
                return await asyncio.wait_for(attempt(), self.timeout)
            except Exception as error:
                reason = self._reason_to_retry(model, error)
                if number == self.retries:
                    raise _Unavailable(reason) from None
            await asyncio.sleep(min(self.delay * 2**number, LONGEST_DELAY))
        raise AssertionError("unreachable")

    def _reason_to_retry(self, model: str, error: Exception) -> str:
        """Return why an attempt failed if another is worthwhile; else raise what ends the request."""
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

    def _start(self, task: Any) -> Future:
        return asyncio.run_coroutine_threadsafe(task, self._loop)


def address_from(url: str, protocol: Protocol = "auto") -> tuple[Literal["http", "grpc"], str, bool]:
    """Return a URL's protocol, `host:port` (and path), and whether it uses TLS. Raises ServerError."""
    scheme, separator, rest = url.partition("://")
    try:
        parts = urlsplit(f"//{rest if separator else url}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or (separator and scheme not in SCHEMES):
        raise ServerError(
            f"'{url}' is not a server's address. Use one such as http://localhost:8000 or grpc://host:8001."
        )
    found, tls = SCHEMES[scheme] if separator else ("grpc" if port == PORTS["grpc"] else "http", False)
    if protocol != "auto":
        if separator and protocol != found:
            raise ServerError(f"'{url}' is a {found} address, but the protocol is {protocol}. Leave one of them out.")
        found = protocol
    name = f"[{host}]" if ":" in host else host
    return found, f"{name}:{port or PORTS[found]}{parts.path.rstrip('/') if found == 'http' else ''}", tls


def _packages(protocol: str) -> tuple[ModuleType, ModuleType]:
    return import_extra(f"tritonclient.{protocol}"), import_extra(f"tritonclient.{protocol}.aio")


def _content(items: Sequence[Any], unit: str) -> list[Any]:
    """Return what is sent for items: texts as they are, images' bytes, or the error of reading them."""
    return list(items) if unit == TEXT else [bytes_of(item) for item in items]


def bytes_of(image: ImageFile) -> bytes | DataError:
    """Return an image file's content, or the error of reading it."""
    if isinstance(image, bytes):
        return image
    try:
        return Path(image).read_bytes()
    except (OSError, ValueError) as error:
        return DataError(f"{image} cannot be read: {error}.")


def strings(items: Sequence[bytes | str]) -> np.ndarray:
    """Return an array of bytes objects [N]; numpy's own bytes type would drop trailing zeros."""
    array = np.empty(len(items), object)
    array[:] = [item if isinstance(item, bytes) else item.encode("utf-8", "surrogateescape") for item in items]
    return array


def _of_shape(found: np.ndarray, shape: tuple[int, ...], model: str) -> np.ndarray:
    if found.shape != shape or not np.isfinite(found).all():
        raise ServerError(f"Model '{model}': expected {list(shape)} finite numbers, found {list(found.shape)}.")
    return found.astype(np.float32, copy=False)


def _rows(answers: Iterable[Answer], width: int = 0) -> Rows:
    """Gather answers; `width` is the width of an array without rows."""
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
