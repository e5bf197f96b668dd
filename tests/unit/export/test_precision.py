"""A graph in lower precision computes the same, in the required type."""

from collections import Counter

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from clipress.errors import ExportError
from clipress.export import precision
from clipress.export.settings import OnnxSettings
from clipress.export.torch_export import export_graph
from clipress.models import quantizers
from clipress.models.load import Model, new_model
from clipress.models.tiny import tiny_architecture
from clipress.runtime.onnx_session import open_session
from clipress.tasks import graphs_of, runs_of

NAMES = {"image": "pixel_values", "text": "input_ids"}


@pytest.fixture(scope="module")
def model():
    return new_model(tiny_architecture(layers=1), 0)


@pytest.fixture(scope="module")
def inputs(model):
    pixels = np.random.default_rng(0).standard_normal((5, 3, 32, 32)).astype("f")
    return {"image": pixels, "text": model.tokenize()([f"a red circle {i}" for i in range(5)])}


@pytest.fixture(scope="module")
def int8(model, inputs):
    copy = model.copy()

    def calibrate(module):
        module.encode_image(torch.from_numpy(inputs["image"]))
        module.encode_text(torch.from_numpy(inputs["text"]))

    with torch.no_grad():
        quantizers.attach(copy.module, quantizers.quantizable(copy.module), calibrate)
    return Model(**{**copy.__dict__, "quantization": {"dtype": "int8"}})


def exported(model, tower, folder, exporter="torchscript"):
    export_graph(model, graphs_of(model)[tower], folder / f"{tower}.onnx", OnnxSettings(exporter=exporter))
    return onnx.load(folder / f"{tower}.onnx")


def run(model, batch, folder):
    onnx.save(model, folder / "lowered.onnx")
    opened = open_session(folder / "lowered.onnx", 1, float16=True)
    return opened.run(None, {opened.get_inputs()[0].name: batch})[0]


def types(model):
    return Counter(item.data_type for item in model.graph.initializer if item.data_type != TensorProto.INT64)


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_float16_tower_agrees_with_torch_and_takes_and_gives_float32(model, inputs, tmp_path, tower, exporter):
    module = exported(model, tower, tmp_path, exporter)
    lowered = precision.lower(module, "fp16")
    (wanted,) = runs_of(model)[tower]({NAMES[tower]: inputs[tower]}).values()
    found = run(lowered, inputs[tower], tmp_path)
    assert found.dtype == np.float32
    assert (found * wanted).sum(1).min() > 0.9999
    assert abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-6  # The final normalization is still in float32.
    assert types(lowered)[TensorProto.FLOAT16] > 10 and types(lowered)[TensorProto.FLOAT] <= 2
    assert len(lowered.SerializeToString()) < 0.8 * len(module.SerializeToString())


@pytest.mark.parametrize("rest", ["fp32", "fp16"])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_an_int8_tower_keeps_its_quantizers_in_any_precision(int8, inputs, tmp_path, tower, rest):
    model = exported(int8, tower, tmp_path)
    lowered = precision.lower(model, rest)
    assert precision.engine_precision(model, rest) == f"int8-{rest}"
    wanted = run(model, inputs[tower], tmp_path)
    least = {"fp32": 0.9999, "fp16": 0.99}[
        rest
    ]  # float16 moves values across INT8 steps, how many depends on the kernel.
    assert (run(lowered, inputs[tower], tmp_path) * wanted).sum(1).min() > least
    before, after = (Counter(node.op_type for node in m.graph.node) for m in (model, lowered))
    for kind in ("QuantizeLinear", "DequantizeLinear"):
        assert before[kind] == after[kind] > 0
    constants = {item.name: numpy_helper.to_array(item) for item in lowered.graph.initializer}
    for node in lowered.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):  # TensorRT requires constant zero points of zero.
            assert constants[node.input[2]].dtype == np.int8 and not constants[node.input[2]].any()
            assert constants[node.input[1]].dtype == {"fp32": np.float32, "fp16": np.float16}[rest]


@pytest.mark.parametrize("tower", ["image", "text"])
def test_bfloat16_weights_are_the_float32_ones_rounded(model, tmp_path, tower):
    module = exported(model, tower, tmp_path)
    lowered = precision.lower(module, "bf16")
    found = {item.name: item for item in lowered.graph.initializer}
    checked = 0
    for item in module.graph.initializer:
        if item.data_type == TensorProto.FLOAT:
            wanted = numpy_helper.to_array(item).astype(ml_dtypes.bfloat16)
            np.testing.assert_array_equal(numpy_helper.to_array(found[item.name]).astype("f"), wanted.astype("f"))
            checked += 1
    assert checked > 5 and lowered.opset_import[0].version == 22
    assert lowered.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT


def model_of(nodes, weights, inputs=("x",)):
    takes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in inputs]
    gives = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])
    graph = helper.make_graph(nodes, "g", takes, [gives], [numpy_helper.from_array(v, k) for k, v in weights.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_values_beyond_float16_are_clamped_and_infinities_kept(tmp_path):
    mask = np.asarray([1e9, -np.inf, 2.0], "f")
    lowered = precision.lower(model_of([helper.make_node("Max", ["x", "m"], ["y"], name="n")], {"m": mask}), "fp16")
    found = run(lowered, np.full((1, 3), -3, "f"), tmp_path)
    np.testing.assert_array_equal(found, [[65504, -3, 2]])


def test_a_constant_used_before_and_after_the_norm_has_both_types(tmp_path):
    nodes = [
        helper.make_node("Mul", ["x", "c"], ["s"], name="s"),
        helper.make_node("ReduceL2", ["s"], ["n"], name="n", keepdims=1, axes=[1]),
        helper.make_node("Add", ["n", "c"], ["a"], name="a"),
        helper.make_node("Div", ["s", "a"], ["y"], name="y"),
    ]
    model = model_of(nodes, {"c": np.asarray([300.0], "f")})
    model.opset_import[0].version = 17
    lowered = precision.lower(model, "fp16")
    x = np.asarray([[100, 120, 140]], "f")  # Its square is far beyond float16.
    scaled = x * 300
    np.testing.assert_allclose(run(lowered, x, tmp_path), scaled / (np.linalg.norm(scaled) + 300), rtol=2e-3)
    assert types(lowered) == {TensorProto.FLOAT16: 1, TensorProto.FLOAT: 1}


def test_an_output_that_is_not_a_norm_is_cast_back(tmp_path):
    lowered = precision.lower(model_of([helper.make_node("Add", ["x", "x"], ["y"], name="n")], {}), "fp16")
    np.testing.assert_array_equal(run(lowered, np.asarray([[1, 2, 3]], "f"), tmp_path), [[2, 4, 6]])


def test_a_graph_with_branches_is_refused():
    inner = helper.make_graph([helper.make_node("Identity", ["x"], ["z"])], "then", [], [
        helper.make_tensor_value_info("z", TensorProto.FLOAT, None)])  # fmt: skip
    node = helper.make_node("If", ["c"], ["y"], name="choice", then_branch=inner, else_branch=inner)
    with pytest.raises(ExportError, match="choice has a branch"):
        precision.lower(model_of([node], {"c": np.asarray(True)}), "fp16")
