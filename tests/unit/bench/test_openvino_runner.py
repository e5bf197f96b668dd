"""OpenVINO computes what ONNX Runtime computes, or says why it does not run."""

import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest

from clipress.bench.runners import open_runner
from clipress.bench.settings import BenchSettings
from clipress.errors import BackendMissing, ExportError
from clipress.export import metadata
from clipress.runtime.export_folder import describe_file, read_export


def opened(export, backend="openvino"):
    return open_runner(backend, export, export, BenchSettings(threads=2))


def test_without_openvino_one_message_names_the_extra(tiny_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendMissing, match=r"pip install 'clipress\[openvino\]'"):
        opened(tiny_run[0] / "export" / "pruned")


@pytest.fixture
def export(tiny_run, tmp_path):
    """A copy of an export that a test may change."""
    pytest.importorskip("openvino")
    return shutil.copytree(tiny_run[0] / "export" / "pruned", tmp_path / "export")


def change_image(export, change, keep_as=None):
    """Change image.onnx and describe it anew; `keep_as` keeps the unchanged file as the graph's second form."""
    exported, path = read_export(export), export / "image.onnx"
    model, explicit = onnx.load(path), {}
    if keep_as:
        shutil.copy(path, export / keep_as)
        explicit = {"image": describe_file(export / keep_as)}
    change(model)
    onnx.save(model, path)
    files = exported.files | {"image": describe_file(path)}
    exported.model_copy(update={"files": files, "explicit": explicit}).write()


def negate(model):
    """Change the sign of the outputs, so that the file's self-test fails."""
    (output,) = model.graph.output
    for node in model.graph.node:
        node.output[:] = ["before" if name == output.name else name for name in node.output]
    model.graph.node.append(onnx.helper.make_node("Neg", ["before"], [output.name]))


def forget_self_test(model):
    about = metadata.read_metadata(model)
    metadata.stamp(model, {key: value for key, value in about.items() if key != "self_test"})


@pytest.mark.parametrize("stage", ["pruned", "int8"])
def test_openvino_and_onnx_runtime_give_the_same_outputs_for_texts_of_any_length(tiny_run, stage):
    pytest.importorskip("openvino")
    first, second = (opened(tiny_run[0] / "export" / stage, backend) for backend in ("onnxruntime", "openvino"))
    assert (second.backend, second.model.precision) == ("openvino", first.model.precision)
    for graph in first.model.graphs.values():
        for inputs in (graph.example(3), graph.example(5, 9)):
            (a,), (b,) = (runner.run(graph.name)(inputs).values() for runner in (first, second))
            np.testing.assert_allclose(a, b, atol=1e-5 if stage == "pruned" else 1e-2)
        (timed,), (own,) = second.query(graph.name, 3)(), second.run(graph.name)(graph.example(3)).values()
        np.testing.assert_array_equal(timed, own)
        assert np.shape(second.fresh_query(graph.name, 2, 5)()[0]) == (2, *graph.outputs[0].shape)


def test_a_file_that_openvino_computes_otherwise_is_refused(export):
    change_image(export, negate)
    with pytest.raises(ExportError, match=r"image\.onnx fails its self-test .*cosine of -1\.0.*openvino \d+\.\d"):
        opened(export)


def test_a_file_without_a_self_test_is_refused(export):
    change_image(export, forget_self_test)
    with pytest.raises(ExportError, match="has no self-test, so nothing tells whether OpenVINO computes it correctly"):
        opened(export)


def test_the_second_form_of_a_graph_runs_where_the_first_fails_and_the_precision_says_so(export, tiny_run):
    change_image(export, negate, keep_as="image.qdq.onnx")
    runner = opened(export)
    assert runner.model.precision == "fp32, image.qdq.onnx"
    graph = runner.model.graphs["image"]
    (expected,) = opened(tiny_run[0] / "export" / "pruned", "onnxruntime").run("image")(graph.example(3)).values()
    for found in (runner.run("image")(graph.example(3))["image_embeds"], runner.fresh_query("image", 3)()[0]):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_file_that_is_no_onnx_is_one_message(export):
    exported = read_export(export)
    (export / "image.onnx").write_bytes(b"nothing")
    exported.model_copy(update={"files": exported.files | {"image": describe_file(export / "image.onnx")}}).write()
    with pytest.raises(ExportError, match=r"image\.onnx cannot be opened by OpenVINO \d"):
        opened(export)


SIGNALLED = """
import signal, sys
from pathlib import Path
from clipress.runtime.openvino import OpenVinoSession
first, second = (OpenVinoSession(Path(sys.argv[1])) for _ in range(2))
del first
third = OpenVinoSession(Path(sys.argv[1]))
del second, third
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
signal.raise_signal(signal.SIGTERM)
"""


def test_a_signal_is_handled_after_models_have_ended_in_any_order(export):
    file = read_export(export).onnx("image")
    done = subprocess.run([sys.executable, "-c", SIGNALLED, file], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
