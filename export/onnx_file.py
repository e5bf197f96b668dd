"""Read and write ONNX files of any size: protobuf ends at 2 GiB, so the weights of larger graphs lie in a file beside them.

image.onnx        the graph, and its weights up to LIMIT
image.onnx.data   the weights beyond it, as ONNX's external data
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
from onnx import ModelProto, TensorProto

from clipress.runtime.export_folder import data_path

LIMIT = 1_800_000_000  # bytes of weights inside a file; the graph needs room too
SMALL = 1024  # bytes of tensors that stay in the graph, such as shapes


def read(path: Path) -> ModelProto:
    """Read a graph with its weights."""
    return onnx.load(path)


def read_graph(path: Path) -> ModelProto:
    """Read a graph, without weights that lie beside it."""
    return onnx.load(path, load_external_data=False)


def write(model: ModelProto, path: Path) -> None:
    """Write a graph with its weights, whose memory is given back where they go into a file of their own."""
    data = data_path(path)
    data.unlink(missing_ok=True)
    if is_large(model):
        onnx.save(model, path, save_as_external_data=True, location=data.name, size_threshold=SMALL)
        data.chmod(path.stat().st_mode)  # onnx lets only the owner read it
        onnx.checker.check_model(str(path), full_check=True)
    else:
        onnx.save(model, path)


def write_graph(model: ModelProto, path: Path) -> None:
    """Write a graph whose weights, if they lie beside it, stay as they are: what `read_graph` returns."""
    onnx.save(model, path)


def write_whole(model: ModelProto, path: Path) -> None:
    """Write a graph with its weights aside and put it in place once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=".") as aside:
        made = Path(aside) / path.name
        write(model, made)
        move(made, path)


def move(made: Path, path: Path) -> None:
    """Move a file and its weights, which come first: a graph is never without them. The name stays the same."""
    if (data := data_path(made)).is_file():
        data.replace(data_path(path))
    else:
        data_path(path).unlink(missing_ok=True)
    made.replace(path)


def check(model: ModelProto) -> None:
    """Check a graph by ONNX's rules. One that is too large to be checked in memory is checked when it is written."""
    if not is_large(model):
        onnx.checker.check_model(model, full_check=True)


def is_large(model: ModelProto) -> bool:
    """Return whether a graph's weights lie in a file of their own."""
    return sum(len(item.raw_data) for item in model.graph.initializer) > LIMIT


def copy_of(model: ModelProto) -> ModelProto:
    """Return a copy. Protobuf copies by serialising, which ends at 2 GiB, so weights are copied one by one."""
    copy = ModelProto()
    with weights_apart(model) as held:
        copy.CopyFrom(model)
    put_weights(copy, held)
    return copy


@contextmanager
def weights_apart(model: ModelProto) -> Iterator[dict[str, bytes]]:
    """Within, a graph has no large weights, so that ONNX's own tools, which serialise it, can work on it. Yields them by name."""
    held = {item.name: item.raw_data for item in model.graph.initializer if len(item.raw_data) > SMALL}
    for item in model.graph.initializer:
        if item.name in held:
            item.ClearField("raw_data")
            item.data_location = TensorProto.EXTERNAL
    try:
        yield held
    finally:
        put_weights(model, held)


def put_weights(model: ModelProto, held: Mapping[str, bytes]) -> None:
    """Put weights back into a graph by name."""
    for item in model.graph.initializer:
        if item.name in held:
            item.raw_data = held[item.name]
            item.ClearField("data_location")
