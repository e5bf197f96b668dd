"""What tells that an image file was replaced by another of the same name.

A state is two numbers: a file's size, and its modification time or, on request, a hash of its content. A file that was only
touched, or copied without its times, has another state than before unless the content is compared; then whatever was
computed from it is computed again. Zeros stand for a file that cannot be read, and for images that are not in files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from clipress.storage import sha256

if TYPE_CHECKING:
    from clipress.data.sources import Source

Check = Literal["stat", "content"]
"""stat: size and modification time, without opening the file. content: size and SHA-256, which reads it."""
State = tuple[int, int]
UNKNOWN: State = (0, 0)


def state_of(path: Path) -> State:
    """Return a file's size and modification time in nanoseconds; zeros if it is missing, which reading it will report."""
    try:
        known = path.stat()
    except (OSError, ValueError):
        return UNKNOWN
    return known.st_size, known.st_mtime_ns


def content_state(content: bytes) -> State:
    """Return the size and 64 bits of the SHA-256 of a file's content."""
    return len(content), _as_number(hashlib.sha256(content).hexdigest())


def file_states(paths: Sequence[Path], check: Check) -> np.ndarray:
    """Return the states of files: int64 [N, 2]."""
    of_file = state_of if check == "stat" else _content_state_of
    return np.asarray([of_file(path) for path in paths], np.int64).reshape(-1, 2)


def image_states(source: Source, items: Sequence[int], check: Check) -> np.ndarray:
    """Return the states of a source's images: int64 [N, 2], zeros if they are not in files."""
    if source.has_images and hasattr(source, "states"):
        return source.states(items, check)
    return np.zeros((len(items), 2), np.int64)


def _content_state_of(path: Path) -> State:
    try:
        return path.stat().st_size, _as_number(sha256(path))
    except (OSError, ValueError):
        return UNKNOWN


def _as_number(digest: str) -> int:
    return int.from_bytes(bytes.fromhex(digest[:16]), "big", signed=True)
