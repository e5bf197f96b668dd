"""A file's self-test has the same inputs everywhere, and fails for a file that computes something else."""

import json
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from clipress.errors import ExportError
from clipress.export import metadata
from clipress.runtime.graph import Graph, Input, Output
from clipress.runtime.onnx_session import open_session, self_test_of
from clipress.runtime.self_test import inputs_of, self_test_from

GRAPH = Graph(
    name="image",
    inputs=(Input(name="pixel_values", dtype="float32", shape=(3, 2, 2)),),
    outputs=(Output(name="image_embeds", shape=(6,)),),
)


def put(name, kind, *shape):
    return SimpleNamespace(name=name, type=kind, shape=["batch", *shape])


def test_inputs_are_the_same_on_every_machine():
    image, ids = put("pixel_values", "tensor(float)", 3, 9, 8), put("input_ids", "tensor(int64)", 5)
    made = inputs_of([image, ids], 0, 4, {}, {})
    pixels, words = made["pixel_values"], made["input_ids"]
    assert (pixels.dtype, pixels.shape, words.dtype, words.shape) == (np.float32, (4, 3, 9, 8), np.int64, (4, 5))
    assert pixels[0, 0, 0, 0] == np.float32(1.764052345967664)  # The stream of numpy's legacy generator is frozen.
    assert len(np.unique(pixels[1])) <= 3 * 16 and len(np.unique(pixels[2])) > 200  # Uniform squares, and noise.
    assert words.min() >= 1 and words.max() < 400
    np.testing.assert_array_equal(made["pixel_values"], inputs_of([image, ids], 0, 4, {}, {})["pixel_values"])
    assert (made["pixel_values"] != inputs_of([image], 1, 4, {}, {})["pixel_values"]).any()


def test_floats_that_are_not_images_are_noise():
    states, ids = put("states", "tensor(float)", 7, 4), put("question_ids", "tensor(int64)", 5)
    made = inputs_of([states, ids], 0, 4, {}, {})
    assert (made["states"].dtype, made["states"].shape) == (np.float32, (4, 7, 4))
    assert len(np.unique(made["states"])) == 4 * 7 * 4 and made["question_ids"].shape == (4, 5)


@pytest.fixture
def file(tmp_path):
    """A linear image tower with a self-test."""
    path = tmp_path / "image.onnx"
    save(path, np.random.default_rng(0).standard_normal((12, 6)).astype("f"))
    stamp(path, self_test_of(path, [GRAPH]))
    return path


@pytest.fixture
def vocabulary(tmp_path):
    """A text tower with a table of five rows, whose file needs ids below 5."""
    path = tmp_path / "text.onnx"
    takes = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", 3])
    gives = helper.make_tensor_value_info("text_embeds", TensorProto.FLOAT, ["batch", 3, 2])
    table = numpy_helper.from_array(np.random.default_rng(0).standard_normal((5, 2)).astype("f"), "table")
    nodes = [helper.make_node("Gather", ["table", "ids"], ["text_embeds"])]
    graph = helper.make_graph(nodes, "tower", [takes], [gives], [table])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def test_ids_stay_below_the_largest_that_a_graph_takes(vocabulary):
    ids = Input(name="ids", dtype="int64", shape=(3,), largest=4)
    graph = Graph(name="text", inputs=(ids,), outputs=(Output(name="text_embeds", shape=(3, 2)),))
    test = self_test_of(vocabulary, [graph])
    assert test["largest"] == {"ids": 4}
    stamp(vocabulary, test)
    assert open_session(vocabulary).run(None, {"ids": np.ones((1, 3), np.int64)})[0].shape == (1, 3, 2)


def test_ids_of_a_file_that_names_no_largest_are_those_of_earlier_files():
    ids = put("input_ids", "tensor(int64)", 5)
    expected = np.random.RandomState(0).randint(1, 400, (4, 5))
    for largest in ({}, {"input_ids": 399}, {"other": 3}):
        np.testing.assert_array_equal(inputs_of([ids], 0, 4, largest, {})["input_ids"], expected)


def save(path, weight, props=()):
    takes = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, 2, 2])
    gives = helper.make_tensor_value_info("image_embeds", TensorProto.FLOAT, ["batch", 6])
    nodes = [
        helper.make_node("Flatten", ["pixel_values"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["image_embeds"]),
    ]
    graph = helper.make_graph(nodes, "tower", [takes], [gives], [numpy_helper.from_array(weight, "weight")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    model.metadata_props.extend(props)
    onnx.save(model, path)


def stamp(path, test):
    model = onnx.load(path)
    metadata.stamp(model, {"precision": "fp32", "portable": True, "self_test": test})
    onnx.save(model, path)


def test_an_unchanged_file_is_opened(file):
    found = open_session(file).run(None, {"pixel_values": np.ones((1, 3, 2, 2), np.float32)})[0]
    assert found.shape == (1, 6)


def test_a_file_with_different_results_is_refused_with_its_cosine(file):
    props = onnx.load(file).metadata_props
    save(file, np.random.default_rng(1).standard_normal((12, 6)).astype("f"), props)
    with pytest.raises(
        ExportError, match=r"image\.onnx fails its self-test on this machine.*at least 0\.9995 is required"
    ):
        open_session(file)


def test_a_changed_file_is_tested_again_although_it_passed_before(file):
    open_session(file)
    save(file, -np.ones((12, 6), np.float32), onnx.load(file).metadata_props)
    with pytest.raises(ExportError, match="fails its self-test"):
        open_session(file)


def test_nan_outputs_fail(file):
    save(file, np.full((12, 6), np.nan, np.float32), onnx.load(file).metadata_props)
    with pytest.raises(ExportError, match=r"a cosine of -1\.0000"):
        open_session(file)


@pytest.mark.parametrize(("apart", "least"), [(0.0, 0.9995), (0.0001, 0.9995), (0.01, 0.97)])
def test_a_model_that_is_sensitive_to_rounding_has_a_looser_limit(apart, least):
    """The outputs of two sessions differ by an angle with cosine 1 - apart."""

    def session(row):
        put = SimpleNamespace(name="x", type="tensor(float)", shape=["batch", 3, 2, 2])
        gives = SimpleNamespace(name="y")
        return SimpleNamespace(
            get_inputs=lambda: [put], get_outputs=lambda: [gives], run=lambda *_: [np.tile(np.float32(row), (4, 1))]
        )

    cosine = 1 - apart
    test = self_test_from(lambda: session([1, 0]), lambda: session([cosine, (1 - cosine**2) ** 0.5]), {}, {})
    assert test["least_cosine"] == pytest.approx(least, abs=1e-5)


@pytest.mark.parametrize(
    "damage",
    [
        {"outputs": {"image_embeds": {"shape": [4, 6], "float16": "no base64!"}}},
        {"outputs": {"image_embeds": {"shape": [4, 7], "float16": ""}}},
        {"outputs": {"other": {"shape": [4, 6], "float16": ""}}},
        {"outputs": []},
        {"rows": 1 << 40},
        {"rows": "many"},
        {"seed": -1},
        {"largest": {"pixel_values": 0, "ids": "many"}},
        {"largest": 5},
        {"seed": None},
        {"least_cosine": "high"},
    ],
)
def test_a_damaged_self_test_is_one_message(file, damage):
    about = metadata.read_metadata(onnx.load(file))
    stamp(file, json.loads(json.dumps(about["self_test"] | damage)))
    with pytest.raises(ExportError, match=r"The self-test in .*image\.onnx cannot be read .*clipress export RUN"):
        open_session(file)
