"""Shared code of the python models. Runs inside Triton only, whose python backend brings `triton_python_backend_utils`.

A fault of one request, expected or not, is an error of that request alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from clipress.data.padding import TextEnd, without_padding
from clipress.data.tokens import tokenizer_from_spec
from clipress.data.transforms import Preprocess, fitted, normalised, open_image
from clipress.errors import DataError
from clipress.serve.graphs import IMAGE, TEXT

MAX_PROMPTS = 100_000  # in one request; labels times templates grow fast
MAX_TEXT = 100_000  # characters; only the first words count, but the work grows with the length
Tensors = Mapping[str, np.ndarray]


class ModelError(Exception):
    """An error of another model, passed on. Its status is lost on the way and inferred from Triton's words."""

    @property
    def code(self) -> Any:
        """Triton's status: worth a retry, a bug, or the input's fault."""
        if re.search("maximum queue size|timeout expired|not healthy|not ready|unknown model", str(self)):
            return pb_utils.TritonError.UNAVAILABLE
        bug = re.search(r"(^|, )\w+(Error|Exception): ", str(self))  # The form that error_response writes.
        return pb_utils.TritonError.INTERNAL if bug else pb_utils.TritonError.INVALID_ARG


def parameters(args: Mapping[str, str]) -> dict[str, str]:
    """Return the parameters of a model's configuration."""
    found = json.loads(args["model_config"])["parameters"]
    return {key: value["string_value"] for key, value in found.items()}


def rows(request: Any, name: str) -> list[bytes]:
    """Return a TYPE_STRING input as a flat list. Raises DataError if it is empty."""
    found = list(pb_utils.get_input_tensor_by_name(request, name).as_numpy().reshape(-1))
    if not found:
        raise DataError(f"{name}: expected at least one entry, found none.")
    return found


def texts(request: Any, name: str, default: Sequence[str] | None = None) -> list[str]:
    """Return a TYPE_STRING input as texts; an absent optional one is the default.

    Raises DataError if it is empty, too long or not UTF-8.
    """
    if default is not None and pb_utils.get_input_tensor_by_name(request, name) is None:
        return list(default)
    try:
        found = [row.decode() for row in rows(request, name)]
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: expected UTF-8, found {error}.") from None
    longest = max(map(len, found))
    if longest > MAX_TEXT:
        raise DataError(f"{name}: expected at most {MAX_TEXT:,} characters, found {longest:,}.")
    return found


def numbers(request: Any, name: str, default: Sequence[int]) -> list[int]:
    """Return an optional integer input as a list. Raises DataError for numbers below 1."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    found = list(default) if tensor is None else tensor.as_numpy().reshape(-1).tolist()
    if min(found) < 1:
        raise DataError(f"{name}: expected 1 or more, found {min(found)}.")
    return found


def flag(request: Any, name: str) -> bool:
    """Return an optional boolean input of one element; absent: false."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return tensor is not None and bool(tensor.as_numpy().any())


class Images:
    """Pixel values from requests with `image`: `read` for each request, then `inputs` for all at once."""

    def __init__(self, config: Mapping[str, str]) -> None:
        self.preprocess = Preprocess(**json.loads(config["preprocess"]))

    def read(self, request: Any) -> np.ndarray:
        """Decode and fit: uint8 [B, S, S, 3]. Raises DataError."""
        return np.stack([fitted(open_image(file), self.preprocess) for file in rows(request, IMAGE)])

    def inputs(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Return a graph's input, float32 [B, 3, S, S]."""
        return {"pixel_values": normalised(pixels, self.preprocess)}


class Texts:
    """Token ids from requests with `text`: `read` for each request, then `inputs` for all at once."""

    def __init__(self, config: Mapping[str, str]) -> None:
        self.tokenize = tokenizer_from_spec(json.loads(config["tokenizer"]))
        self.end = TextEnd(**json.loads(config["text_end"])) if "text_end" in config else None

    def read(self, request: Any) -> np.ndarray:
        """Return objects [B]. Raises DataError."""
        return np.asarray(texts(request, TEXT), object)

    def inputs(self, given: np.ndarray) -> dict[str, np.ndarray]:
        """Return a graph's input, int64 [B, L], as long as the longest text needs."""
        return {"input_ids": without_padding(self.tokenize(given), [self.end])}


def respond_together(
    requests: Sequence[Any], read: Callable[[Any], np.ndarray], run: Callable[[np.ndarray], Tensors]
) -> list[Any]:
    """Answer all requests with one run: `read` makes rows of a request, `run` turns all rows into outputs."""
    found = [_read_or_error(read, request) for request in requests]
    good = [one for one in found if not isinstance(one, Exception)]
    outputs = run(np.concatenate(good)) if good else {}
    ends = accumulate(map(len, good))
    parts = (slice(end - len(one), end) for one, end in zip(good, ends, strict=True))
    return [error_response(one) if isinstance(one, Exception) else _part(outputs, next(parts)) for one in found]


def answered(request: Any, answer: Callable[[Any], Tensors]) -> Any:
    """Answer one request whose work waits for other models in turn."""
    try:
        return _response(answer(request))
    except Exception as error:
        return error_response(error)


async def respond(request: Any, answer: Callable[[Any], Awaitable[Tensors]]) -> Any:
    """Answer one request that needs other models."""
    try:
        return _response(await answer(request))
    except Exception as error:
        return error_response(error)


async def embed(side: str, items: Sequence[bytes], batch: int) -> np.ndarray:
    """Return the unit vectors [N, D] of images or texts from the server's own `embed_<side>`. Raises ModelError."""
    return await infer(f"embed_{side}", side, items, f"{side}_embeds", batch)


async def infer(model: str, takes: str, items: Sequence[bytes], gives: str, batch: int) -> np.ndarray:
    """Return an output of another model for all items, sent `batch` rows per request.

    Raises ModelError with that model's message.
    """
    # One at a time: Triton leaves full batches that wait together for up to half a second.
    starts = range(0, len(items), batch)
    return np.concatenate([await _infer_batch(model, takes, items[start : start + batch], gives) for start in starts])


async def _infer_batch(model: str, takes: str, items: Sequence[bytes], gives: str) -> np.ndarray:
    return await infer_all(model, {takes: np.asarray(items, object)[:, None]}, gives)  # [B, 1]


async def infer_all(model: str, inputs: Tensors, gives: str) -> np.ndarray:
    """Return an output of another model for one batch of all its inputs. Raises ModelError with that model's message."""
    return _output_of(await _request_for(model, inputs, gives).async_exec(), gives)


def infer_now(model: str, takes: str, batch: np.ndarray, gives: str) -> np.ndarray:
    """Return an output of another model for one batch of its own input. Raises ModelError with that model's message."""
    return _output_of(_request_for(model, {takes: batch}, gives).exec(), gives)


def _request_for(model: str, inputs: Tensors, gives: str) -> Any:
    on_host = pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0)
    tensors = [pb_utils.Tensor(name, rows) for name, rows in inputs.items()]
    return pb_utils.InferenceRequest(
        model_name=model, requested_output_names=[gives], inputs=tensors, preferred_memory=on_host
    )


def _output_of(response: Any, gives: str) -> np.ndarray:
    if response.has_error():
        raise ModelError(response.error().message())
    return pb_utils.get_output_tensor_by_name(response, gives).as_numpy()


def _read_or_error(read: Callable[[Any], np.ndarray], request: Any) -> np.ndarray | Exception:
    try:
        return read(request)
    except Exception as error:
        return error


def _part(outputs: Tensors, part: slice) -> Any:
    return _response({name: output[part] for name, output in outputs.items()})


def _response(tensors: Tensors) -> Any:
    return pb_utils.InferenceResponse(
        output_tensors=[pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in tensors.items()]
    )


def error_response(error: Exception) -> Any:
    """Return the response for an error, with the status that it has over HTTP and gRPC."""
    if isinstance(error, ModelError):
        message, code = str(error), error.code
    elif isinstance(error, DataError):
        message, code = str(error), pb_utils.TritonError.INVALID_ARG
    else:
        message, code = f"{type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
