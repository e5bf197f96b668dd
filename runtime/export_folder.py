"""An export folder: export.json with types, written and read here alone, and its ONNX files checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from clipress.data.transforms import Preprocess
from clipress.errors import ArtifactError
from clipress.recipe import first_problem
from clipress.runtime.graph import Graph, clip_graphs
from clipress.storage import read_json, sha256

DESCRIPTION = "export.json"
SCHEMA_VERSION = 1


class Tokenizer(BaseModel):
    """The tokenizer's name and how long a text is, in ids."""

    name: str
    context_length: int = Field(ge=1)
    kwargs: dict[str, Any] = {}


class OnnxFile(BaseModel):
    """One ONNX file beside export.json, and what it must hash to."""

    file: str = Field(pattern=r"^[^/\\]+$")
    bytes: int = 0
    sha256: str


def describe_file(path: Path) -> OnnxFile:
    """Describe a file that is beside export.json."""
    return OnnxFile(file=path.name, bytes=path.stat().st_size, sha256=sha256(path))


class Exported(BaseModel):
    """An export of one artifact."""

    model_config = ConfigDict(frozen=True)

    folder: Path = Field(exclude=True)
    schema_version: Literal[1] = SCHEMA_VERSION
    task: str = "clip"
    stage: str
    precision: str
    graphs: dict[str, Graph] = {}
    """What the files compute, by the names of the graphs. Earlier exports are CLIPs and do not describe theirs."""
    embed_dim: int | None = Field(None, ge=1)
    """Of a model of embeddings."""
    logit_scale: FiniteFloat | None = None
    """Of a model of embeddings; already exponentiated."""
    logit_bias: FiniteFloat | None = None
    labels: tuple[str, ...] | None = None
    """Of a classifier: the names of its classes."""
    preprocess: Preprocess
    tokenizer: Tokenizer | None = None
    lineage_hash: str
    opset: int | None = None
    settings: dict[str, Any] = {}
    """The export settings that the graphs' files depend on."""
    versions: dict[str, str] = {}
    exporter: dict[str, str] = {}
    """Which of torch's exporters wrote each graph."""
    int8: dict[str, Any] | None = None
    """Which form of a convolutional INT8 tower is quicker, with milliseconds."""
    parity: dict[str, Any] = {}
    """The comparison with torch."""
    portable: bool = False
    """Whether INT8 products overflow on no CPU: weights of 7 bits, or none of INT8. Earlier files did not say."""
    self_test: dict[str, Any] | None = None
    """By file; absent in exports of earlier versions."""
    files: dict[str, OnnxFile] = Field(min_length=1)
    """Each graph's file."""
    explicit: dict[str, OnnxFile] = {}
    """Graphs whose INT8 has a second file, in the form TensorRT reads: symmetric, in front of products only."""

    @model_validator(mode="after")
    def _every_graph_has_a_file(self) -> Exported:
        if not self.graphs:
            if self.embed_dim is None or self.tokenizer is None:
                raise ValueError("expected graphs, or the embed_dim and tokenizer of a CLIP")
            known = clip_graphs(self.preprocess.size, self.tokenizer.context_length, self.embed_dim)
            object.__setattr__(self, "graphs", known)
        if self.files.keys() != self.graphs.keys() or not self.explicit.keys() <= self.graphs.keys():
            raise ValueError(f"files: expected one of each graph, {sorted(self.graphs)}, found {sorted(self.files)}")
        return self

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(file.bytes for file in self.files.values())

    def onnx(self, graph: str) -> Path:
        """Return the path of a graph's ONNX file."""
        return self.folder / self.files[graph].file

    def for_gpus(self) -> Exported:
        """Return the same export with the files meant for GPUs."""
        return self.model_copy(update={"files": {**self.files, **self.explicit}, "explicit": {}})

    def write(self) -> None:
        """Write export.json into `folder`."""
        text = self.model_dump_json(indent=2, exclude_none=True)
        (self.folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")


def read_export(folder: str | Path) -> Exported:
    """Read an export folder and check that its ONNX files are whole. Raises ArtifactError."""
    path, again = Path(folder) / DESCRIPTION, "Export it again: clipress export RUN"
    try:
        exported = Exported.model_validate({**read_json(path), "folder": folder})
    except FileNotFoundError:
        raise ArtifactError(
            f"{folder} is not an export folder: it has no {DESCRIPTION}. Create it with: clipress export RUN"
        ) from None
    except ValidationError as error:
        raise ArtifactError(f"{path}, {first_problem(error)}. {again}") from None
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}). {again}") from None
    for file in (*exported.files.values(), *exported.explicit.values()):
        onnx = exported.folder / file.file
        if not onnx.is_file():
            raise ArtifactError(f"{folder} has a {DESCRIPTION} but no {file.file}. {again}")
        found = sha256(onnx)
        if found != file.sha256:
            raise ArtifactError(
                f"{onnx} ({onnx.stat().st_size} bytes) is truncated or changed: its sha256 starts with {found[:12]}, "
                f"{DESCRIPTION} says {file.sha256[:12]}. {again}"
            )
    return exported
