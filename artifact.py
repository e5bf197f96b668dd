"""The artefact: a folder with architecture, shapes, weights, lineage and metrics. It needs nothing but itself.

    <folder>/clipress.json        everything but the weights, readable by people
    <folder>/model.safetensors    the weights; no pickle is ever written or read

It is written to a temporary name, flushed to disk and renamed, so that a folder with this name is always whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, NonNegativeInt, ValidationError

from clipress.errors import ArtifactError, ClipressError
from clipress.recipe import first_problem

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA_VERSION = 1
HEADER, WEIGHTS = "clipress.json", "model.safetensors"
MAX_JSON, MAX_DEPTH = 64_000_000, 64  # bytes of a description, and how deep it nests
LOCK = ".lock"
log = logging.getLogger("clipress.artifact")


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A CLIP and its story. `weights` are named as in open_clip, but for attention: q, k, v and out are Linears."""

    architecture: dict[str, Any]
    """The open_clip model config: embed_dim, vision_cfg, text_cfg, ..."""
    shapes: dict[str, dict[str, Any]]
    """Per block: heads, qk_dim, v_dim (per head), softmax scale and ffn width."""
    weights: Mapping[str, Tensor] = field(repr=False)
    preprocess: dict[str, Any]
    tokenizer: dict[str, Any]
    sparsity: dict[str, Any] | None = None
    """2:4: the pattern and the weights that hold it."""
    quantization: dict[str, Any] | None = None
    """INT8: the quantisers' settings; their scales are among the weights."""
    lineage: tuple[dict[str, Any], ...] = ()
    """One record per stage: settings, seed, data fingerprint, versions, parent's hash."""
    metrics: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    """Parameters: all, without embeddings, in blocks."""

    @property
    def hash(self) -> str:
        """Identity of the last stage and of all before it; the same inputs give the same hash."""
        return str(self.lineage[-1]["hash"]) if self.lineage else "none"


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


def save_artifact(artifact: Artifact, folder: str | Path, more: Callable[[Path], Any] = lambda _: None) -> Path:
    """Write an artefact; an older one of this name is replaced only when the new one is whole.

    `more(folder)` may write into it what belongs to it and must not be missing.
    """
    from safetensors.torch import save_file

    folder = Path(folder)

    def fill(aside: Path) -> None:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in artifact.weights.items()}
        save_file(weights, aside / WEIGHTS)
        header = {"schema_version": SCHEMA_VERSION}
        header |= {key: value for key, value in asdict(_without_weights(artifact)).items() if key != "weights"}
        header["weights_sha256"] = sha256(aside / WEIGHTS)
        (aside / HEADER).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
        more(aside)

    write_whole(folder, fill)
    return folder


def _without_weights(artifact: Artifact) -> Artifact:
    return Artifact(**{**artifact.__dict__, "weights": {}})


class _Record(BaseModel):
    """What every record of a lineage has."""

    stage: str
    hash: str


class _Header(BaseModel):
    """The types of clipress.json; what is inside the mappings is judged by those who use it."""

    architecture: dict[str, Any]
    shapes: dict[str, dict[str, Any]]
    preprocess: dict[str, Any]
    tokenizer: dict[str, Any]
    sparsity: dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None
    lineage: list[_Record]
    metrics: dict[str, Any] = {}
    counts: dict[str, NonNegativeInt] = {}
    weights_sha256: str


def read_header(folder: str | Path) -> dict[str, Any]:
    """Read an artefact's JSON half, without its weights."""
    path = Path(folder) / HEADER
    try:
        header = read_json(path)
    except FileNotFoundError:
        raise ArtifactError(f"An artefact was asked for at {folder}; there is no {HEADER} in it.") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is not readable JSON ({error}); the artefact is damaged, make it again.") from None
    version = header.get("schema_version") if isinstance(header, dict) else None
    if version != SCHEMA_VERSION:
        raise ArtifactError(f"{path} has schema_version {version!r}; this clipress reads {SCHEMA_VERSION}.")
    missing = {"architecture", "shapes", "preprocess", "tokenizer", "lineage", "weights_sha256"} - header.keys()
    if missing:
        raise ArtifactError(f"{path} lacks {', '.join(sorted(missing))}; the artefact is damaged, make it again.")
    try:
        _Header.model_validate(header)
    except ValidationError as error:
        raise ArtifactError(f"{path}, {first_problem(error)}; the artefact is damaged, make it again.") from None
    return header


def load_artifact(folder: str | Path) -> Artifact:
    """Read an artefact and check that its weights are whole."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    header = read_header(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        raise ArtifactError(f"{folder} has a {HEADER} but no {WEIGHTS}; the artefact is not whole, make it again.")
    found = sha256(path)
    if found != header["weights_sha256"]:
        raise ArtifactError(
            f"{path} ({path.stat().st_size} bytes) is truncated or changed: its sha256 starts with {found[:12]}, "
            f"{HEADER} says {str(header['weights_sha256'])[:12]}. Copy it again or make it again."
        )
    try:
        weights = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{path} is not a readable safetensors file: {error}.") from None
    fields = {key: header[key] for key in header.keys() & Artifact.__dataclass_fields__.keys()}
    return Artifact(**{**fields, "lineage": tuple(header["lineage"]), "weights": weights})


def sha256(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:  # Python 3.10
    state = hashlib.sha256()
    while block := file.read(1 << 20):
        state.update(block)
    return state.hexdigest()
