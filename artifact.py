"""The artifact: a self-contained folder with architecture, shapes, weights, lineage and metrics.

    <folder>/clipress.json        everything but the weights, readable by people
    <folder>/model.safetensors    the weights; pickle is never written or read

It is written to a temporary name, flushed to disk and renamed, so that an artifact is always complete.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, NonNegativeInt, ValidationError

from clipress.errors import ArtifactError
from clipress.recipe import first_problem
from clipress.storage import read_json, sha256, write_whole

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA_VERSION = 1
HEADER, WEIGHTS = "clipress.json", "model.safetensors"
PART = 64 << 20  # bytes of a file that are mapped at once


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A CLIP and its story. `weights` are named as in open_clip, but for attention: q, k, v and out are Linears."""

    architecture: dict[str, Any]
    """The open_clip model config: embed_dim, vision_cfg, text_cfg, ..."""
    shapes: dict[str, dict[str, Any]]
    """Per block: heads, qk_dim, v_dim (per head), softmax scale and ffn width."""
    weights: Mapping[str, Tensor] = field(repr=False)
    preprocess: dict[str, Any]
    tokenizer: dict[str, Any] | None
    """None for a model that reads no texts."""
    task: str = "clip"
    """The model's task: a name in tasks.TASKS."""
    sparsity: dict[str, Any] | None = None
    """2:4 sparsity: the pattern and the names of the weights that have it."""
    quantization: dict[str, Any] | None = None
    """INT8: settings of the quantizers; their scales are among the weights."""
    lineage: tuple[dict[str, Any], ...] = ()
    """One record per stage: settings, seed, data fingerprint, versions, parent's hash."""
    metrics: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    """Numbers of parameters: total, without embeddings, in blocks."""

    @property
    def hash(self) -> str:
        """Hash of the last stage and of all stages before it; the same inputs give the same hash."""
        return str(self.lineage[-1]["hash"]) if self.lineage else "none"


def save_artifact(artifact: Artifact, folder: str | Path, more: Callable[[Path], Any] = lambda _: None) -> Path:
    """Write an artifact atomically; an older one of this name is replaced once the new one is complete.

    `more(folder)` may write further files into it.
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
    """The fields of every lineage record."""

    stage: str
    hash: str


class _Header(BaseModel):
    """The types of clipress.json; the content of the mappings is validated where it is used."""

    architecture: dict[str, Any]
    shapes: dict[str, dict[str, Any]]
    preprocess: dict[str, Any]
    tokenizer: dict[str, Any] | None = None
    task: str = "clip"
    sparsity: dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None
    lineage: list[_Record]
    metrics: dict[str, Any] = {}
    counts: dict[str, NonNegativeInt] = {}
    weights_sha256: str


def read_header(folder: str | Path) -> dict[str, Any]:
    """Read an artifact's clipress.json, without the weights."""
    path = Path(folder) / HEADER
    try:
        header = read_json(path)
    except FileNotFoundError:
        raise ArtifactError(f"{folder} is not an artifact: it has no {HEADER}.") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} is not readable JSON ({error}); the artifact is damaged, create it again."
        ) from None
    version = header.get("schema_version") if isinstance(header, dict) else None
    if version != SCHEMA_VERSION:
        raise ArtifactError(f"{path} has schema_version {version!r}; this version of clipress reads {SCHEMA_VERSION}.")
    missing = {"architecture", "shapes", "preprocess", "tokenizer", "lineage", "weights_sha256"} - header.keys()
    if missing:
        raise ArtifactError(f"{path} lacks {', '.join(sorted(missing))}; the artifact is damaged, create it again.")
    try:
        _Header.model_validate(header)
    except ValidationError as error:
        raise ArtifactError(f"{path}, {first_problem(error)}; the artifact is damaged, create it again.") from None
    return header


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, every tensor into memory of its own, 16-bit floats as they are.

    The file is mapped in parts, so that what was read of it does not stay in memory beside the tensors.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        names = file.offset_keys()
    found: dict[str, Tensor] = {}
    while len(found) < len(names):
        with safe_open(path, "pt") as file:
            read = 0
            for name in names[len(found) :]:
                found[name] = file.get_tensor(name).clone()
                read += found[name].nbytes
                if read > PART:
                    break
    return found


def load_artifact(folder: str | Path) -> Artifact:
    """Read an artifact and check its weights against their checksum."""
    from safetensors import SafetensorError

    folder = Path(folder)
    header = read_header(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        raise ArtifactError(f"{folder} has a {HEADER} but no {WEIGHTS}: the artifact is incomplete, create it again.")
    found = sha256(path)
    if found != header["weights_sha256"]:
        raise ArtifactError(
            f"{path} ({path.stat().st_size} bytes) is truncated or changed: expected a sha256 that starts with "
            f"{str(header['weights_sha256'])[:12]}, found {found[:12]}. Copy or create it again."
        )
    try:
        weights = read_tensors(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{path} is not a readable safetensors file: {error}.") from None
    fields = {key: header[key] for key in header.keys() & Artifact.__dataclass_fields__.keys()}
    return Artifact(**{**fields, "lineage": tuple(header["lineage"]), "weights": weights})
