"""Read, check and write an export folder: the typed export.json and its ONNX files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from clipress.data.tokens import tokenizer_from_spec
from clipress.data.transforms import Preprocess
from clipress.errors import ArtifactError
from clipress.recipe import read_typed
from clipress.runtime.graph import Graph, clip_graphs
from clipress.storage import sha256

DESCRIPTION = "export.json"
SCHEMA_VERSION = 1


class Tokenizer(BaseModel):
    """The tokenizer's name, the length of a text in ids, and which tokens it has."""

    name: str
    context_length: int = Field(ge=1)
    kwargs: dict[str, Any] = {}
    kept: str | None = None
    """Only of a reduced vocabulary, see data/vocabulary.py."""
    file: str | None = None
    """Only of a tokenizer that travels with its model, see data/packed_tokenizer.py; with `pad`."""
    pad: int | None = None
    plain: bool | None = None
    prompt: str | None = None

    @model_serializer(mode="wrap")
    def _without_absent(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if value is not None}


class DataFile(BaseModel):
    """The weights of a large graph, in a file beside it."""

    file: str = Field(pattern=r"^[^/\\]+$")
    sha256: str


class OnnxFile(BaseModel):
    """One ONNX file beside export.json, with its hash."""

    file: str = Field(pattern=r"^[^/\\]+$")
    bytes: int = 0
    """With its weights."""
    sha256: str
    data: DataFile | None = None
    """Only of a graph that is too large for one file."""


def data_path(path: Path) -> Path:
    """Return where the weights of a large ONNX file are."""
    return path.with_name(f"{path.name}.data")


def describe_file(path: Path) -> OnnxFile:
    """Describe a file beside export.json."""
    data = data_path(path) if data_path(path).is_file() else None
    return OnnxFile(
        file=path.name,
        bytes=sum(one.stat().st_size for one in (path, data) if one),
        sha256=sha256(path),
        data=data and DataFile(file=data.name, sha256=sha256(data)),
    )


class Int8Form(BaseModel):
    """The form of a convolutional INT8 graph that is faster on the exporting machine."""

    form: Literal["qdq", "static"]
    milliseconds: dict[str, float]
    """Milliseconds per image, by form."""


class Exported(BaseModel):
    """An export of one artifact."""

    model_config = ConfigDict(frozen=True)

    folder: Path = Field(exclude=True)
    schema_version: Literal[1] = SCHEMA_VERSION
    task: str = "clip"
    stage: str
    precision: str
    graphs: dict[str, Graph] = {}
    """By name, in the task's order. Exports of version 1 are CLIPs; their graphs are filled in when they are read."""
    embed_dim: int | None = Field(None, ge=1)
    """Width of the embeddings; None for tasks without them."""
    logit_scale: FiniteFloat | None = None
    """Already exponentiated; None for tasks without embeddings."""
    logit_bias: FiniteFloat | None = None
    labels: tuple[str, ...] | None = None
    """A classifier's class names."""
    preprocess: Preprocess
    tokenizer: Tokenizer | None = None
    """None for a model that reads no texts."""
    lineage_hash: str
    opset: int | None = None
    settings: dict[str, Any] = {}
    """The export settings that determine the graphs' files."""
    versions: dict[str, str] = {}
    exporter: dict[str, str] = {}
    """The torch exporter that wrote each graph."""
    int8: Int8Form | None = None
    """Only of a convolutional INT8 graph."""
    parity: dict[str, Any] = {}
    """The comparison with torch."""
    portable: bool = False
    """Whether INT8 products overflow on no CPU: weights have 7 bits, or nothing is INT8."""
    self_test: dict[str, Any] | None = None
    """By file; absent in exports of earlier versions."""
    files: dict[str, OnnxFile] = Field(min_length=1)
    """By graph."""
    explicit: dict[str, OnnxFile] = {}
    """By graph: a second INT8 file in the form that TensorRT reads, symmetric and only in front of products."""

    @model_validator(mode="after")
    def _every_graph_has_a_file(self) -> Exported:
        if not self.graphs:
            if self.embed_dim is None or self.tokenizer is None:
                raise ValueError("expected graphs, or the embed_dim and tokenizer of a CLIP")
            known = clip_graphs(self.preprocess.size, self.tokenizer.context_length, self.embed_dim)
            object.__setattr__(self, "graphs", known)
        if self.files.keys() != self.graphs.keys() or not self.explicit.keys() <= self.graphs.keys():
            raise ValueError(f"files: expected one per graph, {sorted(self.graphs)}, found {sorted(self.files)}")
        return self

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(file.bytes for file in self.files.values())

    @property
    def least_cosines(self) -> dict[str, float]:
        """The least cosine between ONNX Runtime's and torch's outputs, by graph."""
        return {graph: self.parity[f"{graph}_min_cosine"] for graph in self.graphs}

    def onnx(self, graph: str) -> Path:
        """Return the path of a graph's ONNX file."""
        return self.folder / self.files[graph].file

    def data(self, graph: str) -> Path | None:
        """Return the path of a large graph's weights; None for a graph that has them inside."""
        data = self.files[graph].data
        return None if data is None else self.folder / data.file

    def tokenize(self) -> Callable | None:
        """Return the tokenizer, texts -> int64 ids [N, L]; None for a model that reads no texts."""
        return None if self.tokenizer is None else tokenizer_from_spec(self.tokenizer.model_dump())

    def for_gpus(self) -> Exported:
        """Return the same export with the files that are meant for GPUs."""
        return self.model_copy(update={"files": {**self.files, **self.explicit}, "explicit": {}})

    def write(self) -> None:
        """Write export.json into `folder`."""
        text = self.model_dump_json(indent=2, exclude_none=True)
        (self.folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")


def read_export(folder: str | Path) -> Exported:
    """Read an export folder and check the hashes of its ONNX files. Raises ArtifactError."""
    path, again = Path(folder) / DESCRIPTION, "Export it again: clipress export RUN"
    try:
        exported = read_typed(Exported, path, again, folder=folder)
    except FileNotFoundError:
        raise ArtifactError(
            f"{folder} is not an export folder: it has no {DESCRIPTION}. Create it with: clipress export RUN"
        ) from None
    described = [*exported.files.values(), *exported.explicit.values()]
    for file in (*described, *(file.data for file in described if file.data is not None)):
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
