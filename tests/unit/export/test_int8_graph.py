"""INT8 files compute what the quantized model computes, and ONNX Runtime runs them on integers."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
from helpers import SourceAround
from int8_models import CONVOLUTIONAL, quantized
from onnx import TensorProto, helper, numpy_helper

from clipress.artifact import save_artifact
from clipress.data.eval_sets import evalsets
from clipress.data.spec import SourceSpec
from clipress.errors import DataError, ExportError
from clipress.export import int8_form, parity, static_int8
from clipress.export import int8_graph as int8
from clipress.export.extra_models import extra_models_from_export
from clipress.export.settings import OnnxSettings, TensorRTSettings
from clipress.export.to_onnx import onnx_from_artifact
from clipress.export.to_tensorrt import prepare_export
from clipress.models import anatomy
from clipress.models.load import artifact_from_model
from clipress.models.tiny import tiny_architecture
from clipress.runtime.export_folder import read_export
from clipress.runtime.graph import Graph, Input, Output

KEPT = "visual.trunk.layer1.0.conv1"


def run(model, **feed):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feed)[0]


def model_of(nodes, inputs, outputs, initializers):
    graph = helper.make_graph(
        nodes, "g", inputs, outputs, [numpy_helper.from_array(v, k) for k, v in initializers.items()]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_folding_weight_quantizers_changes_no_output_and_stores_int8():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 32)).astype("f")
    scale = (np.abs(weight).max(0) / 127).astype("f")
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "s", "z"], ["q"], axis=1),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], axis=1),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", d]) for n, d in (("x", 64), ("y", 32)))
    model = model_of(nodes, [x], [y], {"w": weight, "s": scale, "z": np.zeros(32, np.int8)})
    values = rng.standard_normal((5, 64)).astype("f")
    before, size = run(model, x=values), len(model.SerializeToString())
    int8.fold_weight_quantizers(model)
    onnx.checker.check_model(model)
    np.testing.assert_array_equal(run(model, x=values), before)
    assert len(model.SerializeToString()) < 0.4 * size
    assert [node.op_type for node in model.graph.node] == ["DequantizeLinear", "MatMul"]


def test_a_shrunk_embedding_differs_by_at_most_half_a_step_per_row():
    rng = np.random.default_rng(0)
    table = (rng.standard_normal((2000, 16)) * rng.uniform(0.01, 10, (2000, 1))).astype("f")
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["b", 3])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["b", 3, 16])
    model = model_of([helper.make_node("Gather", ["table", "ids"], ["out"])], [ids], [out], {"table": table})
    size = len(model.SerializeToString())
    int8.shrink_embedding(model)
    onnx.checker.check_model(model)
    chosen = rng.integers(0, 2000, (7, 3))
    step = np.abs(table[chosen]).max(-1, keepdims=True) / 127
    assert (np.abs(run(model, ids=chosen) - table[chosen]) <= 0.5001 * step).all()
    assert len(model.SerializeToString()) < 0.4 * size


@pytest.mark.parametrize("bias", [True, False])
def test_a_patch_embedding_as_a_product_matches_the_convolution(bias):
    rng = np.random.default_rng(0)
    model = patch_embedding(rng, bias=bias)
    pixels = rng.standard_normal((3, 3, 8, 12)).astype("f")
    before = run(model, x=pixels)
    int8.patches_as_product(model)
    onnx.checker.check_model(model, full_check=True)
    assert "Conv" not in {node.op_type for node in model.graph.node}
    np.testing.assert_allclose(run(model, x=pixels), before, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(run(model, x=pixels[:1]), before[:1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changed", [{"strides": [2, 4]}, {"pads": [0, 0, 0, 1]}, {"size": (9, 12)}])
def test_a_convolution_whose_windows_do_not_tile_the_image_is_kept(changed):
    model = patch_embedding(np.random.default_rng(0), **changed)
    before = model.SerializeToString()
    int8.patches_as_product(model)
    assert model.SerializeToString() == before


def patch_embedding(rng, bias=True, size=(8, 12), **attributes):
    """A convolution of 4 x 4 patches between Q/DQ."""
    weight = rng.integers(-64, 65, (5, 3, 4, 4)).astype(np.int8)
    constants = {"w": weight, "s": rng.uniform(0.01, 0.1, 5).astype("f"), "z": np.zeros(5, np.int8)}
    constants |= {"xs": np.float32(0.02), "xz": np.int8(0), "b": rng.standard_normal(5).astype("f")}
    given = {"kernel_shape": [4, 4], "strides": [4, 4], "pads": [0, 0, 0, 0], **attributes}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wd"], axis=0),
        helper.make_node("Conv", ["xd", "wd", "b"][: 3 if bias else 2], ["y"], **given),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, *size])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 5, None, None])
    return model_of(nodes, [x], [y], constants)


@pytest.fixture(scope="module")
def sets():
    return evalsets([SourceSpec(format="scenes", split="test", limit=20)])


@pytest.fixture(scope="module")
def artifacts(sets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("a")
    models = {
        "transformer": quantized(tiny_architecture(layers=2), sets),
        "convolutional": quantized(CONVOLUTIONAL, sets),
        "kept": quantized(CONVOLUTIONAL, sets, (KEPT,)),
    }
    return {
        name: save_artifact(artifact_from_model(model, ({"stage": name, "hash": name},), {}), folder / name)
        for name, model in models.items()
    }


@pytest.fixture(autouse=True)
def untrained(monkeypatch):
    """Untrained models round worse than trained ones."""
    for precision in ("int8", "static int8", "int8-fp16"):
        monkeypatch.setitem(parity.LIMITS, precision, (0.98, 0.3, 5e-2))


def export(artifact, target, sets, **settings):
    settings = OnnxSettings(exporter="torchscript", **settings)
    return onnx_from_artifact(artifact, target, settings, sets)


def kernels(path, tmp_path):
    """Return the graph that ONNX Runtime's optimizer makes of a file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return onnx.load(tmp_path / "optimised.onnx").graph


@pytest.mark.parametrize("tower", anatomy.TOWERS)
def test_every_quantized_layer_of_a_transformer_runs_on_integers(artifacts, sets, tmp_path, tower):
    export(artifacts["transformer"], tmp_path / "e", sets)
    graph = kernels(tmp_path / "e" / f"{tower}.onnx", tmp_path)
    constants = {item.name for item in graph.initializer}
    ran = [node.op_type for node in graph.node]
    # Per block q, k, v, out and two of the MLP; one for the image tower's patches.
    assert ran.count("MatMulIntegerToFloat") == 2 * 6 + (tower == "image")
    assert "Conv" not in ran
    products = [n for n in graph.node if n.op_type in ("MatMul", "FusedMatMul", "Gemm") and n.input[1] in constants]
    assert len(products) == 1  # The projection, which is a parameter and not a layer.


def test_every_convolution_of_a_static_file_runs_on_integers(artifacts, sets, tmp_path):
    made = export(artifacts["convolutional"], tmp_path / "e", sets, int8="static")
    assert made.int8.form == "static"
    ran = [node.op_type for node in kernels(tmp_path / "e" / "image.onnx", tmp_path).node]
    convolutions = sum(n.op_type == "Conv" for n in onnx.load(tmp_path / "e" / "image.onnx").graph.node)
    assert ran.count("QLinearConv") == convolutions > 10
    plain = [node.op_type for node in kernels(tmp_path / "e" / "image.qdq.onnx", tmp_path).node]
    assert plain.count("QLinearConv") < ran.count("QLinearConv")  # Otherwise no other form would be needed.


def test_the_faster_form_becomes_the_file_and_tensorrt_gets_symmetric_scales_either_way(
    artifacts, sets, tmp_path, monkeypatch
):
    def pretend(qdq, static):
        monkeypatch.setattr(int8_form, "milliseconds", lambda *_: {"qdq": qdq, "static": static})

    pretend(1.0, 2.0)
    made = export(artifacts["convolutional"], tmp_path / "q", sets)
    assert made.int8.model_dump() == {"form": "qdq", "milliseconds": {"qdq": 1.0, "static": 2.0}} and not made.explicit
    assert sorted(path.name for path in (tmp_path / "q").iterdir()) == ["export.json", "image.onnx", "text.onnx"]
    pretend(2.0, 1.0)
    made = export(artifacts["convolutional"], tmp_path / "s", sets)
    assert made.int8.form == "static" and read_export(tmp_path / "s").explicit["image"].file == "image.qdq.onnx"
    settings = TensorRTSettings()
    parsed = onnx.load(prepare_export(tmp_path / "s", settings)["image"].path)
    assert zero_points(parsed) == {TensorProto.INT8}
    assert TensorProto.UINT8 in zero_points(onnx.load(tmp_path / "s" / "image.onnx"))
    extra = extra_models_from_export(tmp_path / "s", OnnxSettings(fp16=True, joint=True), sets)
    assert zero_points(onnx.load(extra["image.int8-fp16"])) == {TensorProto.INT8}
    assert zero_points(onnx.load(extra["joint.int8-fp16"])) == {TensorProto.INT8}
    about = json.loads((tmp_path / "s" / "export.json").read_text())
    (tmp_path / "s" / "image.qdq.onnx").unlink()
    with pytest.raises(Exception, match=r"no image\.qdq\.onnx"):
        read_export(tmp_path / "s")
    assert about["parity"]["image_min_cosine"] > 0.98


def zero_points(model):
    """Return the types that activations and weights are rounded to."""
    types = {item.name: item.data_type for item in model.graph.initializer}
    linear = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    return {types[node.input[2]] for node in linear if types.get(node.input[2]) != TensorProto.INT32}


def test_scales_of_a_static_file_come_from_the_calibration_images(artifacts, sets, tmp_path):
    seen = []

    def calibration():
        seen.append(True)
        return evalsets([SourceSpec(format="digits", split="train", limit=20)])

    settings = OnnxSettings(exporter="torchscript", int8="static")
    files = [tmp_path / name / "image.onnx" for name in "ab"]
    onnx_from_artifact(artifacts["convolutional"], files[0].parent, settings, sets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "check", lambda *_: {})  # Scales from digits do not fit scenes.
        onnx_from_artifact(artifacts["convolutional"], files[1].parent, settings, sets, calibration)
    assert seen and files[0].read_bytes() != files[1].read_bytes()


def test_a_damaged_calibration_image_is_replaced_by_another(artifacts, sets, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(parity, "check", lambda *_: {})
    settings = OnnxSettings(exporter="torchscript", int8="static")
    files = []
    for lost, others in ((3, ()), (None, (3,))):
        (one,) = evalsets([SourceSpec(format="digits", split="train", limit=20)])
        one.source = ImageLost(one.source, lost, others)
        folder = tmp_path / str(lost)
        onnx_from_artifact(artifacts["convolutional"], folder, settings, sets, lambda one=one: [one])
        files.append(folder / "image.onnx")
    assert "replaced record 3 of source 'digits': image 3 is lost" in caplog.text
    numbers = [[item.SerializeToString() for item in onnx.load(file).graph.initializer] for file in files]
    assert numbers[0] == numbers[1]


class ImageLost(SourceAround):
    """A source of which one image cannot be read, or of which some are those that replace them."""

    def __init__(self, source, lost, replaced):
        super().__init__(source)
        self.lost, self.replaced = lost, replaced

    def image(self, index):
        if index == self.lost:
            raise DataError(f"image {index} is lost")
        if index in self.replaced:
            index = int(np.random.default_rng([index, 1]).integers(len(self)))
        return self.source.image(index)


@pytest.mark.parametrize(
    ("name", "why"), [("transformer", "not convolutional"), ("kept", f"{KEPT} stays in full precision")]
)
def test_a_form_that_a_model_cannot_have_is_refused(artifacts, sets, tmp_path, name, why):
    with pytest.raises(ExportError, match=f"static is not possible.*{why}.*Use int8: auto"):
        export(artifacts[name], tmp_path / "e", sets, int8="static")


def test_an_excluded_layer_stays_in_full_precision(artifacts, sets, tmp_path):
    assert export(artifacts["kept"], tmp_path / "e", sets).int8 is None
    export(artifacts["convolutional"], tmp_path / "w", sets, int8="qdq")
    weights = [onnx.load(tmp_path / folder / "image.onnx").graph.initializer for folder in "ew"]
    rounded = [sum(item.data_type == TensorProto.INT8 and len(item.dims) == 4 for item in each) for each in weights]
    assert rounded[0] == rounded[1] - 1


def test_files_are_timed_alike(tmp_path):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3, 8, 8])
    onnx.save(model_of([helper.make_node("Relu", ["x"], ["y"])], [x], [y], {}), tmp_path / "relu.onnx")
    relu = Graph(
        name="relu",
        inputs=(Input(name="x", dtype="float32", shape=(3, 8, 8)),),
        outputs=(Output(name="y", shape=(3, 8, 8)),),
    )
    taken = static_int8.milliseconds({"a": tmp_path / "relu.onnx", "b": tmp_path / "relu.onnx"}, relu)
    assert taken.keys() == {"a", "b"} and all(one > 0 for one in taken.values())
