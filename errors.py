"""The few errors a user can cause. Each says what was asked, what was found and what to do.

`cli.py` shows them click's way: one message, exit code 2, no traceback. Anything else that is raised is a bug and
keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ClipressError(Exception):
    """Base of every error that is the input's fault, not the program's."""

    exit_code = 2


class RecipeError(ClipressError):
    """A recipe that cannot be read, has unknown keys, wrong values or an order of stages that cannot work."""


class DataError(ClipressError):
    """Images, captions or labels that are missing, broken or empty."""


class ArtifactError(ClipressError):
    """A checkpoint or run folder that is missing, truncated, foreign or in the way."""


class ExportError(ClipressError):
    """A file that could not be exported, or that does not agree with the model it came from."""


class BackendMissing(ClipressError):
    """Software or hardware that a backend needs and this machine has not."""


class ServerError(ClipressError):
    """A server that did not get ready, ended by itself or refused to do what it was told."""


class Stopped(ClipressError):
    """Nobody's mistake: SIGTERM or Ctrl-C ended the work where it can go on."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the closest known word, else the list of what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean '{close[0]}'?" if close else f" Known: {', '.join(known)}."
