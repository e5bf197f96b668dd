"""Graphs are read and written without their weights in memory, and are then what onnx itself reads and writes."""

import subprocess
import sys

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper

from clipress.export import onnx_file
from clipress.runtime.export_folder import data_path

RNG = np.random.default_rng(0)
WEIGHTS = {
    "large": RNG.standard_normal((64, 32)).astype(np.float32),
    "bytes": RNG.integers(-128, 127, (64, 64), dtype=np.int8),
    "half": RNG.standard_normal((40, 40)).astype(np.float16),
    "small": np.arange(4, dtype=np.int64),
    "scalar": np.float32(2.5),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.fixture
def model():
    """A graph with weights of every size, one of them not as raw data, and one in a node."""
    typed = helper.make_tensor("typed", TensorProto.FLOAT, [600], [0.5] * 600)
    items = [*(numpy_helper.from_array(np.asarray(value), name) for name, value in WEIGHTS.items()), typed]
    constant = numpy_helper.from_array(np.ones((40, 40), np.float32), "inside")
    nodes = [
        helper.make_node("MatMul", ["x", "large"], ["y"], name="product"),
        helper.make_node("Constant", [], ["c"], value=constant),
    ]
    sides = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size]) for name, size in (("x", 64), ("y", 32))
    ]
    graph = helper.make_graph(nodes, "g", sides[:1], sides[1:], items, doc_string="about the graph")
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(made, {"key": "value"})
    return made


@pytest.fixture
def saved(model, tmp_path):
    onnx.save(model, tmp_path / "saved.onnx")
    return tmp_path / "saved.onnx"


def loaded(path):
    """Return what onnx reads, without the mark it leaves on weights that lay beside the file."""
    found = onnx.load(path)
    for item in found.graph.initializer:
        item.ClearField("data_location")
    return found


def test_large_weights_are_read_when_they_are_required(model, saved):
    found = onnx_file.read(saved)
    assert len(found.SerializeToString()) < len(model.SerializeToString()) - 14_000
    items = {item.name: item for item in found.graph.initializer}
    assert {name for name, item in items.items() if onnx_file.is_apart(item)} == {"large", "bytes", "half"}
    for name, value in WEIGHTS.items():
        np.testing.assert_array_equal(onnx_file.values(items[name]), value)
    assert [item.name for item in found.graph.initializer] == [item.name for item in model.graph.initializer]


@pytest.mark.parametrize("limit", [onnx_file.LIMIT, 0])
def test_a_file_that_is_written_is_the_one_that_was_read(model, saved, tmp_path, monkeypatch, limit):
    monkeypatch.setattr(onnx_file, "LIMIT", limit)
    made = tmp_path / "in" / "made.onnx"
    onnx_file.write(onnx_file.read(saved), made)
    assert data_path(made).is_file() == (limit == 0)
    assert loaded(made) == model
    onnx_file.write(onnx_file.read(made), made)  # in its own place
    assert loaded(made) == model


def test_a_file_that_shrinks_below_the_limit_loses_the_file_beside_it(model, saved, tmp_path, monkeypatch):
    made = tmp_path / "made.onnx"
    with monkeypatch.context() as patch:
        patch.setattr(onnx_file, "LIMIT", 0)
        onnx_file.write(model, made)
        beside = data_path(made).read_bytes()
        changed = onnx_file.read(made)
        changed.producer_name = "somebody"
        onnx_file.write_again(changed, made)
        assert data_path(made).read_bytes() == beside and onnx.load(made).producer_name == "somebody"
    onnx_file.write(onnx_file.read(made), made)
    assert not data_path(made).exists()
    model.producer_name = "somebody"
    assert loaded(made) == model


def test_weights_that_onnx_wrote_beside_a_file_are_found(model, tmp_path):
    onnx.save(onnx_file.copy_of(model), tmp_path / "a.onnx", save_as_external_data=True, location="other.bin")
    onnx_file.write(onnx_file.read(tmp_path / "a.onnx"), tmp_path / "b.onnx")
    assert loaded(tmp_path / "b.onnx") == model
    (tmp_path / "other.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"other\.bin, which has the weights of a\.onnx"):
        onnx_file.read(tmp_path / "a.onnx")


def test_a_link_is_followed_to_its_file(model, saved, tmp_path):
    link = tmp_path / "hub" / "model.onnx"
    link.parent.mkdir()
    link.symlink_to(saved)
    onnx_file.write(onnx_file.read(link), tmp_path / "made.onnx")
    assert loaded(tmp_path / "made.onnx") == model


@pytest.mark.parametrize("where", ["../secret.bin", "{folder}/secret.bin"])
def test_weights_outside_a_file_s_folder_are_not_read(model, tmp_path, where):
    (tmp_path / "secret.bin").write_bytes(bytes(8192))
    (tmp_path / "in").mkdir()
    item = model.graph.initializer[0]
    item.ClearField("raw_data")
    item.data_location = TensorProto.EXTERNAL
    item.external_data.add(key="location", value=where.format(folder=tmp_path))
    (tmp_path / "in" / "a.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(Exception, match=r"secret|location|path"):
        onnx_file.values(onnx_file.read(tmp_path / "in" / "a.onnx").graph.initializer[0])


def test_a_truncated_file_is_not_readable(saved):
    whole = saved.read_bytes()
    refused = 0
    for end in range(0, len(whole), 61):
        saved.write_bytes(whole[:end])
        try:
            onnx_file.read(saved)
        except DecodeError:
            refused += 1
    assert refused >= len(range(0, len(whole), 61)) - 2  # a cut between two fields leaves a shorter message


def test_writing_holds_one_weight_at_a_time(tmp_path):
    code = """
import resource, sys
from pathlib import Path
import numpy as np
from clipress.export import onnx_file
model = onnx_file.read(Path(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
onnx_file.write_again(model, Path(sys.argv[1]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    items = [numpy_helper.from_array(np.full((1024, 1024), place, np.float32), f"w{place}") for place in range(64)]
    graph = helper.make_graph([], "g", [], [], items)
    onnx.save(helper.make_model(graph), tmp_path / "large.onnx")  # 256 MiB
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "large.onnx"], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 40 * 1024  # KiB
    assert onnx_file.values(onnx_file.read(tmp_path / "large.onnx").graph.initializer[63]).max() == 63
