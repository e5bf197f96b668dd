"""What the python models share. Runs inside Triton only: its python backend brings `triton_python_backend_utils`.

Any fault of one request, expected or not, is an error for that request alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from clipress.data.tokens import tokenizer_from_spec
from clipress.data.transforms import Preprocess, fitted, normalised, open_image
from clipress.errors import DataError

MAX_PROMPTS = 100_000  # in one request; labels times templates grow fast
MAX_TEXT = 100_000  # characters: a text is cut to its first words anyway, after work that grows with its length
Tensors = Mapping[str, np.ndarray]


class ModelError(Exception):
    """Another model's error, which is passed on. Its status is lost on the way, and is told by Triton's words."""

    @property
    def code(self) -> Any:
        """Whether asking again is worth while, it is a bug, or the input's fault."""
        if re.search("maximum queue size|timeout expired|not healthy|not ready|unknown model", str(self)):
            return pb_utils.TritonError.UNAVAILABLE
        bug = re.search(r"(^|, )\w+(Error|Exception): ", str(self))  # as `failed` writes it
        return pb_utils.TritonError.INTERNAL if bug else pb_utils.TritonError.INVALID_ARG


def parameters(args: Mapping[str, str]) -> dict[str, str]:
    """Return the parameters of a model's configuration."""
    told = json.loads(args["model_config"])["parameters"]
    return {key: value["string_value"] for key, value in told.items()}


def rows(request: Any, name: str) -> list[bytes]:
    """Return a TYPE_STRING input as a flat list. Raises DataError when it is empty."""
    found = list(pb_utils.get_input_tensor_by_name(request, name).as_numpy().reshape(-1))
    if not found:
        raise DataError(f"{name}: at least one entry is asked for, found none.")
    return found


def texts(request: Any, name: str, default: Sequence[str] | None = None) -> list[str]:
    """Return a TYPE_STRING input as texts; an optional one that is not there is the default.

    Raises DataError when it is empty, too long or no UTF-8.
    """
    if default is not None and pb_utils.get_input_tensor_by_name(request, name) is None:
        return list(default)
    try:
        found = [row.decode() for row in rows(request, name)]
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: UTF-8 is asked for, found {error}.") from None
    longest = max(map(len, found))
    if longest > MAX_TEXT:
        raise DataError(f"{name}: at most {MAX_TEXT:,} characters are taken, found {longest:,}.")
    return found


def numbers(request: Any, name: str, default: Sequence[int]) -> list[int]:
    """Return an optional whole-number input as a list. Raises DataError for numbers below 1."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    found = list(default) if tensor is None else tensor.as_numpy().reshape(-1).tolist()
    if min(found) < 1:
        raise DataError(f"{name}: 1 or more is asked for, found {min(found)}.")
    return found


class Pictures:
    """What an image tower takes, made of requests for `image`: `read` of each one, then `prepared` of all at once."""

    takes = "pixel_values"

    def __init__(self, told: Mapping[str, str]) -> None:
        self.preprocess = Preprocess(**json.loads(told["preprocess"]))

    def read(self, request: Any) -> np.ndarray:
        """Decode and fit: uint8 [B, S, S, 3]. Raises DataError."""
        return np.stack([fitted(open_image(file), self.preprocess) for file in rows(request, "image")])

    def prepared(self, pixels: np.ndarray) -> np.ndarray:
        """Return float32 [B, 3, S, S]."""
        return normalised(pixels, self.preprocess)


class Texts:
    """What a text tower takes, made of requests for `text`."""

    takes = "input_ids"

    def __init__(self, told: Mapping[str, str]) -> None:
        self.prepared = tokenizer_from_spec(json.loads(told["tokenizer"]))
        """Of objects [B]: int64 [B, L]."""

    def read(self, request: Any) -> np.ndarray:
        """Return objects [B]. Raises DataError."""
        return np.asarray(texts(request, "text"), object)


def answered_together(
    requests: Sequence[Any],
    gives: str,
    read: Callable[[Any], np.ndarray],
    run: Callable[[np.ndarray], np.ndarray],
) -> list[Any]:
    """Answer all requests with one run: `read` makes rows of a request, `run` turns all rows into the output's."""
    found = [_tried(read, request) for request in requests]
    good = [one for one in found if not isinstance(one, Exception)]
    made = run(np.concatenate(good)) if good else None
    ends = accumulate(map(len, good))
    parts = (made[end - len(one) : end] for one, end in zip(good, ends, strict=True))
    return [failed(one) if isinstance(one, Exception) else _response({gives: next(parts)}) for one in found]


async def answered(request: Any, answer: Callable[[Any], Awaitable[Tensors]]) -> Any:
    """Answer one request that needs other models."""
    try:
        return _response(await answer(request))
    except Exception as error:
        return failed(error)


async def embedded(tower: str, items: Sequence[bytes], batch: int) -> np.ndarray:
    """Ask the server's own `embed_<tower>` for the unit vectors [N, D] of files or texts, `batch` rows a request.

    Raises ModelError with what that model says.
    """
    # One at a time: Triton lets full batches that wait together lie for up to half a second.
    return np.concatenate([await _asked(tower, items[start : start + batch]) for start in range(0, len(items), batch)])


async def _asked(tower: str, items: Sequence[bytes]) -> np.ndarray:
    gives = f"{tower}_embeds"
    inputs = [pb_utils.Tensor(tower, np.asarray(items, object)[:, None])]  # [B, 1]
    on_host = pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0)
    asked = pb_utils.InferenceRequest(
        model_name=f"embed_{tower}", requested_output_names=[gives], inputs=inputs, preferred_memory=on_host
    )
    response = await asked.async_exec()
    if response.has_error():
        raise ModelError(response.error().message())
    return pb_utils.get_output_tensor_by_name(response, gives).as_numpy()


def _tried(read: Callable[[Any], np.ndarray], request: Any) -> np.ndarray | Exception:
    try:
        return read(request)
    except Exception as error:
        return error


def _response(tensors: Tensors) -> Any:
    return pb_utils.InferenceResponse(
        output_tensors=[pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in tensors.items()]
    )


def failed(error: Exception) -> Any:
    """Return the response that carries an error, with the status it has over HTTP and gRPC."""
    if isinstance(error, ModelError):
        told, code = str(error), error.code
    elif isinstance(error, DataError):
        told, code = str(error), pb_utils.TritonError.INVALID_ARG
    else:
        told, code = f"{type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(told, code))
