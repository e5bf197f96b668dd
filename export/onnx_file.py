"""Read and write ONNX files of any size: weights stay in their files until they are read.

image.onnx        the graph, and its weights up to LIMIT
image.onnx.data   the weights of a larger one, as ONNX's external data: protobuf ends at 2 GiB

A graph that was read points at its large weights, in its own file or beside it, in the words of ONNX's external data. So the
files that it points at must be there until it is written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from mmap import ACCESS_READ, mmap
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto, TensorProto, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor

from clipress.export.onnx_wire import without, without_weights, write_model
from clipress.runtime.export_folder import data_path

LIMIT = 1_800_000_000  # bytes of weights inside a file; the graph needs room too
SMALL = 1024  # bytes of tensors that stay in the graph, such as shapes
PAGE = 4096  # Weights beside a graph begin at one, so that a runtime can map them.


def read(path: Path) -> ModelProto:
    """Read a graph that points at its weights. Raises OSError, DecodeError and ValueError for what cannot be read."""
    file = Path(path).resolve()  # ONNX follows no links.
    if file.stat().st_size == 0:
        raise DecodeError("the file is empty")

    def pointer(offset: int, length: int) -> bytes | None:
        if length <= SMALL:
            return None
        return _pointer(file.name, offset, length, file.parent).SerializeToString()

    with file.open("rb") as opened, mmap(opened.fileno(), 0, access=ACCESS_READ) as data:
        model = ModelProto.FromString(without_weights(data, pointer))
    for item in model.graph.initializer:
        if is_apart(item) and not _where(item).get("basepath"):
            where = _where(item)
            if not (file.parent / where["location"]).is_file():
                raise FileNotFoundError(f"{file.parent / where['location']}, which has the weights of {file.name}")
            item.external_data.add(key="basepath", value=str(file.parent))
    return model


def values(item: TensorProto) -> np.ndarray:
    """Return a tensor's values. Raises ValueError for damaged ones."""
    return numpy_helper.to_array(_loaded(item) if is_apart(item) else item)


def is_apart(item: TensorProto) -> bool:
    """Return whether a tensor points at its values."""
    return item.data_location == TensorProto.EXTERNAL


def copy_of(model: ModelProto) -> ModelProto:
    """Return a copy of a graph that points at its weights."""
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def write(model: ModelProto, path: Path, data: str | None = None) -> None:
    """Write a graph with its weights, check it, and put it in place once it is complete.

    `data` is the name of the file with the weights of a large graph.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = data or data_path(path).name
    with TemporaryDirectory(dir=path.parent, prefix=".") as aside:
        made = Path(aside) / path.name
        _write_apart(model, made, made.with_name(data)) if is_large(model) else _write_whole(model, made)
        _check(made, made.with_name("graph.onnx"))
        move(made, path, data)


def write_again(model: ModelProto, path: Path) -> None:
    """Write the graph of a file that was read and changed; weights that lie beside it stay as they are."""
    with TemporaryDirectory(dir=path.parent, prefix=".") as aside:
        made = Path(aside) / path.name
        if data_path(path).is_file():
            with made.open("wb") as file:
                write_model(file, model, [(_moved(item), 0, bytes) for item in model.graph.initializer])
        else:
            _write_whole(model, made)
        made.replace(path)


def move(made: Path, path: Path, data: str | None = None) -> None:
    """Move a file and its weights, which come first: a graph is never without them. The names stay the same."""
    data = data or data_path(path).name
    if (beside := made.with_name(data)).is_file():
        beside.replace(path.with_name(data))
    else:
        path.with_name(data).unlink(missing_ok=True)
    made.replace(path)


def is_large(model: ModelProto) -> bool:
    """Return whether a graph's weights lie in a file of their own."""
    return sum(map(_length, model.graph.initializer)) > LIMIT


def _check(path: Path, graph: Path) -> None:
    """Check a file by ONNX's rules: the graph that points at its weights, of which the checker would hold two copies."""
    graph.write_bytes(read(path).SerializeToString())
    onnx.checker.check_model(str(graph), full_check=True)


def _write_whole(model: ModelProto, path: Path) -> None:
    tensors = [(_head(item), _length(item), partial(_raw, item)) for item in model.graph.initializer]
    with path.open("wb") as file:
        write_model(file, model, tensors)


def _write_apart(model: ModelProto, path: Path, data: Path) -> None:
    tensors: list[tuple[TensorProto, int, Callable[[], bytes]]] = []
    with data.open("wb") as file:
        for item in model.graph.initializer:
            head, length = _head(item), _length(item)
            if length <= SMALL:
                tensors.append((head, length, partial(_raw, item)))
                continue
            file.seek(-file.tell() % PAGE, 1)
            head.MergeFrom(_pointer(data.name, file.tell(), length))
            file.write(_raw(item))
            tensors.append((head, 0, bytes))
    with path.open("wb") as file:
        write_model(file, model, tensors)


def _pointer(name: str, offset: int, length: int, folder: Path | None = None) -> TensorProto:
    """Return the fields of a tensor whose values lie in a file."""
    where = {"location": name, "offset": str(offset), "length": str(length)}
    if folder is not None:
        where["basepath"] = str(folder)
    entries = [onnx.StringStringEntryProto(key=key, value=value) for key, value in where.items()]
    return TensorProto(data_location=TensorProto.EXTERNAL, external_data=entries)


def _where(item: TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in item.external_data}


def _loaded(item: TensorProto) -> TensorProto:
    """Return a tensor with the values that it points at; onnx checks that they lie within its folder and its file."""
    loaded = TensorProto()
    loaded.CopyFrom(item)
    load_external_data_for_tensor(loaded, _where(item).get("basepath", ""))
    loaded.ClearField("data_location")
    del loaded.external_data[:]
    return loaded


def _head(item: TensorProto) -> TensorProto:
    """Return a tensor without its raw data, or what points at them."""
    pointers = ("data_location", "external_data") if is_apart(item) else ()
    return TensorProto.FromString(without(item, *(["raw_data"] if _length(item) else []), *pointers))


def _moved(item: TensorProto) -> TensorProto:
    """Return a tensor as its file has it, without the folder in which that lay."""
    moved = TensorProto()
    moved.CopyFrom(item)
    if is_apart(item):
        kept = {key: value for key, value in _where(item).items() if key != "basepath"}
        del moved.external_data[:]
        moved.external_data.extend(onnx.StringStringEntryProto(key=key, value=value) for key, value in kept.items())
    return moved


def _length(item: TensorProto) -> int:
    """Return the bytes of a tensor's raw data."""
    if not is_apart(item):
        return len(item.raw_data)
    where = _where(item)
    return int(where["length"]) if "length" in where else len(_loaded(item).raw_data)


def _raw(item: TensorProto) -> bytes:
    return _loaded(item).raw_data if is_apart(item) else item.raw_data
