"""Indices of large files: kept in the cache folder, and records read by their place."""

from __future__ import annotations

import hashlib
import os
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from clipress.errors import DataError
from clipress.storage import cache_folder


def bytes_at(path: Path, offset: int, size: int) -> bytes:
    """Read a range of bytes from an indexed file."""
    try:
        with path.open("rb", buffering=0) as file:
            found = os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from None
    if len(found) != size:
        raise DataError(f"{path} is shorter than when it was indexed: it was modified in the meantime. Start again.")
    return found


def kept_index(kind: str, identity: tuple[Any, ...]) -> dict[str, np.ndarray] | None:
    """Return an index from the cache folder; None if it is missing or damaged: a zip has checksums of its own."""
    try:
        with np.load(_file(kind, identity)) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def keep_index(kind: str, identity: tuple[Any, ...], arrays: dict[str, np.ndarray]) -> None:
    """Write an index to the cache folder; where that is impossible, it is built again next time."""
    kept = _file(kind, identity)
    aside = kept.with_name(f".{kept.stem}.{os.getpid()}.tmp.npz")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.savez(aside, **arrays)
        aside.replace(kept)
    except OSError:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def _file(kind: str, identity: tuple[Any, ...]) -> Path:
    """Return the file of an index; `identity` is all that decides its content."""
    return cache_folder() / kind / f"{hashlib.sha256(repr(identity).encode()).hexdigest()[:32]}.npz"
