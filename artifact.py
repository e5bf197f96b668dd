"""The artefact: a folder with architecture, shapes, weights, lineage and metrics. It needs nothing but itself.

    <folder>/clipress.json        everything but the weights, readable by people
    <folder>/model.safetensors    the weights; no pickle is ever written or read

It is written to a temporary name, flushed to disk and renamed, so that a folder with this name is always whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, NonNegativeInt, ValidationError

from clipress.errors import ArtifactError
from clipress.recipe import first_problem

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA_VERSION = 1
HEADER, WEIGHTS = "clipress.json", "model.safetensors"
MAX_JSON, MAX_DEPTH = 64_000_000, 64  # bytes of a description, and how deep it nests


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


def write_whole(target: Path, fill: Any) -> None:
    """Let `fill(folder)` write a folder aside, flush it to disk, then put it in place of `target`."""
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        fill(aside)
        for path in [*aside.rglob("*"), aside]:
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        old = target.with_name(f".{target.name}.{os.getpid()}.old")
        if target.exists():
            target.rename(old)
        aside.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise ArtifactError(f"{target} could not be written: {error}. What was there before is kept.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_text_whole(target: Path, text: str) -> None:
    """Write one file aside, flush it and rename it into place."""
    write_bytes_whole(target, text.encode("utf-8"))


def write_bytes_whole(target: Path, content: bytes) -> None:
    """Write one file aside, flush it and rename it into place."""
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(target)
    except OSError as error:
        raise ArtifactError(f"{target} could not be written: {error}.") from error
    finally:
        aside.unlink(missing_ok=True)


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


def save_artifact(artifact: Artifact, folder: str | Path) -> Path:
    """Write an artefact; an older one of this name is replaced only when the new one is whole."""
    from safetensors.torch import save_file

    folder = Path(folder)

    def fill(aside: Path) -> None:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in artifact.weights.items()}
        save_file(weights, aside / WEIGHTS)
        header = {"schema_version": SCHEMA_VERSION}
        header |= {key: value for key, value in asdict(_without_weights(artifact)).items() if key != "weights"}
        header["weights_sha256"] = sha256(aside / WEIGHTS)
        (aside / HEADER).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")

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
