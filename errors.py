"""Errors that a user can cause. Each message says what was expected, what was found and what to do.

The command line reports them as one message with exit code 2. Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NoReturn

EXTRAS = {
    "compress": (
        "lightning_fabric", "modelopt", "onnx", "onnxscript", "open_clip", "requests", "safetensors", "sklearn", "timm",
        "torch", "torch_pruning", "torchvision",
    ),
    "serve": (
        "aiohttp", "ftfy", "geventhttpclient", "google", "grpc", "onnxruntime", "regex", "tokenizers", "tritonclient",
    ),
    "index": ("faiss",),
    "download": ("img2dataset",),
    "tensorrt": ("tensorrt",),
    "pycuda": ("pycuda",),
}  # fmt: skip
"""The extras in pyproject.toml, each with the modules that come with it and not with a bare `pip install clipress`."""


class ClipressError(Exception):
    """Base class of all errors caused by the input, not by the program."""

    exit_code = 2


class RecipeError(ClipressError):
    """A recipe that is unreadable, or has unknown keys, invalid values or an impossible order of stages."""


class DataError(ClipressError):
    """Images, captions or labels that are missing, unreadable or empty."""


class ArtifactError(ClipressError):
    """A checkpoint or run folder that is missing, damaged, of another kind or in the way."""


class ExportError(ClipressError):
    """A file that could not be exported, or whose outputs differ from those of its model."""


class BackendMissing(ClipressError):
    """Software or hardware that a backend requires and this machine lacks."""


class ServerError(ClipressError):
    """A server that did not become ready, exited on its own or refused a request."""


class Stopped(ClipressError):
    """SIGTERM or Ctrl-C stopped the work at a point where it can be resumed."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def how_to_install(extra: str) -> str:
    """Return the command that installs an extra."""
    return f"pip install 'clipress[{extra}]'"


def import_extra(name: str) -> ModuleType:
    """Import a module that an extra brings. Raises BackendMissing, which names the extra, where it is not installed."""
    with missing_extras_named():
        return importlib.import_module(name)


@contextmanager
def missing_extras_named() -> Iterator[None]:
    """Inside, a missing module that an extra brings is a BackendMissing that names the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        _raise_named(error)


def _raise_named(error: ModuleNotFoundError) -> NoReturn:
    module = (error.name or "").partition(".")[0]
    for extra, modules in EXTRAS.items():
        if module in modules:
            raise BackendMissing(f"This needs {module}, which is not installed. Run: {how_to_install(extra)}") from None
    raise error


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the closest known word, else the list of known words."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean '{close[0]}'?" if close else f" Known: {', '.join(known)}."


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type's name if it has none, as many libraries' errors do."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
