"""Files: atomic writes, locks, clean-up, hashes, and bounded reads of JSON."""

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

from clipress.errors import ArtifactError, ClipressError, first_line

MAX_JSON, MAX_DEPTH = 64_000_000, 64  # bytes of a JSON file, and how deep it nests
LOCK = ".lock"
log = logging.getLogger("clipress.storage")


def is_first_process() -> bool:
    """Return whether this process is the only one, or torchrun's first, which does the writing."""
    return int(os.environ.get("RANK", 0)) == 0


def write_whole(target: Path, fill: Callable[[Path], Any]) -> None:
    """Write a folder atomically: `fill(folder)` writes a temporary one, which is flushed to disk and renamed to `target`.

    Raises ArtifactError if the disk is full or not writable; the previous content is then kept.
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
                shutil.rmtree(old, ignore_errors=True)  # left by a killed process with the same process id
                target.rename(old)
            aside.rename(target)
            flush(target.parent)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_text_whole(target: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    write_bytes_whole(target, text.encode("utf-8"))


def write_bytes_whole(target: Path, content: bytes) -> None:
    """Write a file atomically: to a temporary name, flushed to disk and renamed."""
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
    """Wait until a file, or a folder's list of names, is on disk: a rename alone may not survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn the errors of a full or read-only disk into one ArtifactError that names the file and what to do."""
    try:
        yield
    except ClipressError:
        raise
    except Exception as error:
        # torch and safetensors report a full disk with their own exceptions
        if not isinstance(error, OSError) and not re.search(
            r"os error \d|No space left|PytorchStreamWriter|inline_container", str(error)
        ):
            raise
        raise ArtifactError(
            f"{target} could not be written: {first_line(error)}. Its previous content is kept. Free some space "
            f"in {target.parent}, or make it writable, and run the same command again."
        ) from error


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.{kind}")


def leftovers(folder: Path) -> dict[Path, Path]:
    """Return the temporary files that killed writers left in a folder, each with its final name."""
    found = {path: re.fullmatch(r"\.(.+)\.\d+\.(tmp|old)", path.name) for path in folder.iterdir()}
    return {path: path.with_name(match.group(1)) for path, match in found.items() if match}


def sweep(folder: Path) -> None:
    """Remove what killed writers left anywhere in a folder, and restore what was half replaced.

    No other process may be writing into the folder.
    """
    for inner in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        for path, target in leftovers(inner).items() if inner.is_dir() else ():
            with suppress(OSError):  # on a read-only disk, leftovers do no harm
                if path.suffix == ".old" and not target.exists():
                    path.rename(target)
                elif path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Lock a folder for this process. The lock ends with the process, even if that is killed.

    Raises ArtifactError if another process holds the lock; with `wait`, calls that with a message and waits instead. A
    read-only folder is not locked: writing into it fails anyway.
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
    with file:  # lockf, not flock: forked children must not keep the lock
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if wait is None:
                raise ArtifactError(
                    f"{folder} is in use by another clipress process. Nothing was changed. Wait until it has finished, or "
                    "choose another folder with --out."
                ) from None
            wait(f"{folder} is in use by another clipress process; waiting for it")
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError as error:
            log.warning("%s cannot be locked (%s): do not run another command on it at the same time.", folder, error)
        yield


@contextmanager
def locked_and_swept(folder: Path) -> Iterator[None]:
    """Hold a folder for this process alone, after removing what killed processes left in it. Raises ArtifactError."""
    with locked(folder):
        sweep(folder)
        yield


def read_json(path: Path, limit: int = MAX_JSON) -> Any:
    """Read an untrusted JSON file. Raises OSError, or ValueError if it is too long, too deep or not JSON."""
    size = path.stat().st_size
    with path.open("rb") as file:
        content = file.read(min(size, limit) + 1)
    if len(content) > limit:
        raise ValueError(f"it is longer than {limit:,} bytes")
    deep = f"it nests deeper than {MAX_DEPTH}"
    content = content.decode(
        "utf-8-sig"
    )  # replaces the bytes, so that only one copy is in memory: annotations are large
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
    """Return the folder of reproducible files shared by runs: $CLIPRESS_CACHE, else the user's cache folder."""
    if own := os.environ.get("CLIPRESS_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clipress"


def sha256(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    return hash_of_file(path, hashlib.sha256)


def hash_of_file(path: Path, new: Callable[[], Any]) -> str:
    """Return the hash of a file's content in hexadecimal; `new` makes an empty one, such as `hashlib.sha256`."""
    state = new()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()
