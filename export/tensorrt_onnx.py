"""The ONNX file that TensorRT parses: checked, in the precision of the engine, with a profile per input."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from clipress.data.padding import CAPTION
from clipress.errors import ArtifactError, ExportError
from clipress.export import metadata, onnx_file
from clipress.export.precision import engine_precision, lower
from clipress.export.settings import BatchProfile, TensorRTSettings
from clipress.runtime.graph import Graph, Input, Output
from clipress.runtime.onnx_session import ends_from
from clipress.runtime.tensorrt import Profile

DTYPES = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.INT64: "int64"}
IDS = 399  # Every vocabulary has ids up to this one.


@dataclass(frozen=True)
class Prepared:
    """An ONNX file that TensorRT can parse."""

    source: Path
    path: Path
    """The file in the precision of the engine."""
    name: str
    """The graph's name; of another tool's file, the file's."""
    graph: Graph
    """As the file describes it."""
    precision: str
    model: dict[str, Any]
    """The source's clipress metadata; empty for another tool's file."""
    profiles: dict[str, Profile]
    """By input."""


def prepare(source: Path, folder: Path, settings: TensorRTSettings, foreign: bool = False) -> Prepared:
    """Check an ONNX file and write it into `folder` in the precision of the settings. Needs neither TensorRT nor a GPU.

    Raises ExportError for a file that clipress did not make (unless `foreign`), NaN weights, and shapes that are
    dynamic beyond one batch.
    """
    try:
        model = onnx_file.read(source)
    except FileNotFoundError:
        raise ArtifactError(f"{source}: expected an ONNX file, found no such file. Check the path.") from None
    except Exception as error:  # Protobuf's errors have no common type.
        raise ArtifactError(f"{source} is not a readable ONNX file: {error}.") from None
    about = _metadata(model, source, foreign)
    _refuse_nan(model, source)
    profiles = _profiles(model, source, settings.batch, about)
    name = about.get("tower", source.stem)
    graph = _graph(model, source, about, profiles)
    precision = engine_precision(model, settings.precision)
    path = folder / f"{name}.{precision}.onnx"
    lowered = lower(model, settings.precision)
    if about:  # The self-test is the source's; an engine is compared with the source instead.
        kept = {key: value for key, value in about.items() if key != "self_test"}
        metadata.stamp(lowered, kept | {"precision": precision})
    onnx_file.write(lowered, path)
    return Prepared(source, path, name, graph, precision, about, profiles)


def _metadata(model: onnx.ModelProto, source: Path, foreign: bool) -> dict[str, Any]:
    try:
        about = metadata.read_metadata(model)
    except ValueError as error:
        raise ExportError(f"{source}: its 'clipress' metadata are damaged ({error}). Export it again.") from None
    if about is None and not foreign:
        raise ExportError(
            f"{source} was not made by clipress: it has no 'clipress' metadata, so its inputs and outputs are unknown. "
            "Export one with: clipress export RUN; or build it anyway with --foreign."
        )
    return about or {}


def _refuse_nan(model: onnx.ModelProto, source: Path) -> None:
    for item in model.graph.initializer:
        try:
            values = onnx_file.values(item)
        except Exception as error:  # A tensor's shape, type and bytes can be anything in a damaged file.
            raise ArtifactError(f"{source} is not a readable ONNX file: {item.name}: {error!s:.200}.") from None
        if item.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16):
            count = int(np.isnan(values).sum())
            if count:
                raise ExportError(
                    f"{source}: {count} of the {np.prod(item.dims, dtype=int)} values of {item.name} are not numbers "
                    "(NaN). Its training diverged: look at the log and train it again."
                )


def _profiles(
    model: onnx.ModelProto, source: Path, batch: BatchProfile, about: Mapping[str, Any]
) -> dict[str, Profile]:
    """Return the shapes of every input: the batch from the settings if it is dynamic, the rest from the file.

    Texts that may be shorter are tuned for a caption's length and taken up to the context length.
    """
    profiles = {}
    firsts = [dim for put in model.graph.input for dim in put.type.tensor_type.shape.dim[:1]]
    if len(batches := {dim.dim_param or dim.dim_value for dim in firsts}) != 1:
        found = ", ".join(sorted(map(str, batches))) or "no inputs"
        raise ExportError(f"{source}: expected one batch for all inputs, found {found}. Build its parts instead.")
    for put in model.graph.input:
        dims = [dim.dim_value if dim.HasField("dim_value") else None for dim in put.type.tensor_type.shape.dim]
        lengths: dict[str, tuple[int, ...]] = dict.fromkeys(("min", "opt", "max"), tuple(dims[1:]))
        if put.name in ends_from(about):
            longest = int(about["tokenizer"]["context_length"])
            lengths = {"min": (1,), "opt": (min(CAPTION, longest),), "max": (longest,)}
        if not dims or any(None in sides for sides in lengths.values()):
            raise ExportError(
                f"{source}: {put.name} is dynamic in more than its first dimension, the batch. Export it with fixed "
                "ones."
            )
        sizes = dict.fromkeys(("min", "opt", "max"), dims[0]) if dims[0] else batch.model_dump()
        profiles[put.name] = Profile(**{key: (size, *lengths[key]) for key, size in sizes.items()})
    return profiles


def _graph(model: onnx.ModelProto, source: Path, about: dict[str, Any], profiles: dict[str, Profile]) -> Graph:
    """Describe a file's inputs and outputs."""
    inputs = []
    for put in model.graph.input:
        dtype = DTYPES.get(put.type.tensor_type.elem_type)
        if dtype is None:
            found = onnx.TensorProto.DataType.Name(put.type.tensor_type.elem_type).lower()
            raise ExportError(f"{source}: expected inputs of float32 or int64, found {put.name} of {found}.")
        end = ends_from(about).get(put.name)
        inputs.append(Input(name=put.name, dtype=dtype, shape=profiles[put.name].max[1:], largest=IDS, end=end))
    outputs = tuple(
        Output(name=put.name, shape=tuple(dim.dim_value for dim in put.type.tensor_type.shape.dim[1:]))
        for put in model.graph.output
    )
    name = re.sub(r"\W+", "_", f"graph_{source.stem}".lower(), flags=re.ASCII)
    return Graph(name=name, inputs=tuple(inputs), outputs=outputs, agrees=about.get("agrees", "embeddings"))
