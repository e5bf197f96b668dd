"""Files: written whole, locked, swept, hashed, and read within bounds."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from clipress.errors import ArtifactError, ClipressError

MAX_JSON, MAX_DEPTH = 64_000_000, 64  # bytes of a JSON file, and how deep it nests
LOCK = ".lock"
log = logging.getLogger("clipress.storage")


def is_first_process() -> bool:
    """Tell whether this process is the one that writes: the only one, or torchrun's first."""
    return int(os.environ.get("RANK", 0)) == 0


def write_whole(target: Path, fill: Callable[[Path], Any]) -> None:
    """Let `fill(folder)` write a folder aside, flush it to disk, then put it in place of `target`.

    Raises ArtifactError when the disk is full or cannot be written; what was there before is kept.
    """
    aside, old = _beside(target, "tmp"), _beside(target, "old")
    try:
        with writing(target):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            fill(aside)
            for path in [*aside.rglob("*"), aside]:
                flush(path)
            if target.exists():
                shutil.rmtree(old, ignore_errors=True)  # of a process that had this number and was killed
                target.rename(old)
            aside.rename(target)
            flush(target.parent)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_text_whole(target: Path, text: str) -> None:
    """Write one file aside, flush it and rename it into place."""
    write_bytes_whole(target, text.encode("utf-8"))


def write_bytes_whole(target: Path, content: bytes) -> None:
    """Write one file aside, flush it and rename it into place."""
    aside = _beside(target, "tmp")
    try:
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            aside.write_bytes(content)
            flush(aside)
            aside.replace(target)
            flush(target.parent)
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk: a rename alone may not outlive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn what a disk that is full or read-only causes into one message that names the place and what to do."""
    try:
        yield
    except ClipressError:
        raise
    except Exception as error:
        # torch and safetensors tell a full disk in ways of their own
        if not isinstance(error, OSError) and not re.search(
            r"os error \d|No space left|PytorchStreamWriter|inline_container", str(error)
        ):
            raise
        raise ArtifactError(
            f"{target} could not be written: {str(error).splitlines()[0]}. What was there before is kept. Free some space "
            f"in {target.parent}, or make it writable, and start the same command again."
        ) from error


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.{kind}")


def leftovers(folder: Path) -> dict[Path, Path]:
    """Return what killed writers left directly in a folder, each with the name it was to have, or had."""
    found = {path: re.fullmatch(r"\.(.+)\.\d+\.(tmp|old)", path.name) for path in folder.iterdir()}
    return {path: path.with_name(match.group(1)) for path, match in found.items() if match}


def sweep(folder: Path) -> None:
    """Remove what killed writers left anywhere in a folder that nobody else writes; put back what was half replaced."""
    for inner in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        for path, target in leftovers(inner).items() if inner.is_dir() else ():
            with suppress(OSError):  # on a read-only disk it does no harm
                if path.suffix == ".old" and not target.exists():
                    path.rename(target)
                elif path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold a folder for this process alone. The lock ends with the process, however that ends.

    Raises ArtifactError when another process holds it; with `wait`, that is told and waited for instead. A folder that
    cannot be written needs no lock: who has to write into it will be told.
    """
    import fcntl

    with writing(folder / LOCK):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / LOCK).open("a")
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            file = None
    if file is None:
        yield
        return
    with file:  # lockf, not flock: what this process forks must not hold the lock after it
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if wait is None:
                raise ArtifactError(
                    f"{folder} is in use by another clipress process. Nothing was changed. Wait until that has ended, or "
                    "choose another folder with --out."
                ) from None
            wait(f"{folder} is in use by another clipress process; waiting for it")
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError as error:
            log.warning("%s cannot be locked (%s): start nothing else on it.", folder, error)
        yield


def read_json(path: Path, limit: int = MAX_JSON) -> Any:
    """Read a JSON file that anyone may have written. Raises OSError, or ValueError when it is too long, deep or no JSON."""
    size = path.stat().st_size
    with path.open("rb") as file:
        content = file.read(min(size, limit) + 1)
    if len(content) > limit:
        raise ValueError(f"it is longer than {limit:,} bytes")
    deep = f"it nests deeper than {MAX_DEPTH}"
    content = content.decode("utf-8-sig")  # one of both is in memory, not both: annotations are large
    try:
        found = json.loads(content)
    except RecursionError:
        raise ValueError(deep) from None
    level, depth = [found], 0
    while level := [inner for value in level for inner in _inside(value) if isinstance(inner, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(deep)
    return found


def _inside(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def cache_folder() -> Path:
    """Return where what can be made again is kept between runs: $CLIPRESS_CACHE, else the user's cache folder."""
    if own := os.environ.get("CLIPRESS_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clipress"


def sha256(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:  # Python 3.10
    state = hashlib.sha256()
    while block := file.read(1 << 20):
        state.update(block)
    return state.hexdigest()
