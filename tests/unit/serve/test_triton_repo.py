"""Triton model repositories: what the server will read, and the python backend's model run without a server."""

import hashlib
import importlib.util
import json
import re
import sys
from types import ModuleType

import numpy as np
import onnx
import pytest
from google.protobuf import json_format, text_format
from onnx import TensorProto, helper, numpy_helper
from tritonclient.grpc.model_config_pb2 import ModelConfig

from clipress.errors import ArtifactError, ExportError
from clipress.serve import triton_repo
from clipress.serve.settings import ServeSettings
from clipress.serve.triton_repo import triton_repo_from_export

SIZE, LENGTH, DIM, WORDS = 2, 3, 4, 10
TABLE = np.random.default_rng(0).standard_normal((WORDS, DIM)).astype(np.float32)


def save(path, nodes, takes, gives, weight):
    graph = helper.make_graph(nodes, "tower", [takes], [gives], [numpy_helper.from_array(weight, "weight")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


@pytest.fixture
def export(tmp_path):
    """An export folder whose image tower is linear and whose text tower averages rows of TABLE."""
    folder = tmp_path / "run" / "export" / "int8"
    folder.mkdir(parents=True)
    save(
        folder / "image.onnx",
        [
            helper.make_node("Flatten", ["pixel_values"], ["flat"], axis=1),
            helper.make_node("MatMul", ["flat", "weight"], ["image_embeds"]),
        ],
        helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE]),
        helper.make_tensor_value_info("image_embeds", TensorProto.FLOAT, ["batch", DIM]),
        np.ones((3 * SIZE * SIZE, DIM), np.float32),
    )
    save(
        folder / "text.onnx",
        [
            helper.make_node("Gather", ["weight", "input_ids"], ["words"]),
            helper.make_node("ReduceMean", ["words"], ["text_embeds"], axes=[1], keepdims=0),
        ],
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", LENGTH]),
        helper.make_tensor_value_info("text_embeds", TensorProto.FLOAT, ["batch", DIM]),
        TABLE,
    )
    files = {
        tower: {
            "file": f"{tower}.onnx",
            "sha256": hashlib.sha256((folder / f"{tower}.onnx").read_bytes()).hexdigest(),
        }
        for tower in ("image", "text")
    }
    described = {
        "schema_version": 1,
        "stage": "int8",
        "precision": "int8",
        "embed_dim": DIM,
        "logit_scale": 20.590953826904297,
        "preprocess": {"size": SIZE, "mean": [0.5, 0.25, 0.75], "std": [0.5, 0.5, 1.0]},
        "tokenizer": {"name": "clip-bpe", "context_length": LENGTH, "kwargs": {"clean": 'lower "ä"'}},
        "lineage_hash": "0123456789abcdef",
        "files": files,
        "opset": 17,
    }
    (folder / "export.json").write_text(json.dumps(described), encoding="utf-8")
    return folder


def config_in(repository, model):
    text = (repository / model / "config.pbtxt").read_text(encoding="utf-8")
    return text_format.Parse(text, ModelConfig())


def without_parameters(config):
    kept = {key: value.string_value for key, value in config.parameters.items()}
    config.ClearField("parameters")
    return config, kept


def test_each_backend_gets_a_repository_of_both_encoders(export, tmp_path):
    target = tmp_path / "run" / "triton"
    assert triton_repo_from_export(export, target, ServeSettings()) == [target / "onnxruntime", target / "python"]
    found = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert found == {
        f"{backend}/{path}"
        for backend in ("onnxruntime", "python")
        for path in (
            "README.md",
            "image_encoder/config.pbtxt",
            "image_encoder/1/model.onnx",
            "text_encoder/config.pbtxt",
            "text_encoder/1/model.onnx",
        )
    } | {"python/image_encoder/1/model.py", "python/text_encoder/1/model.py"}
    for tower in ("image", "text"):
        copied = target / "onnxruntime" / f"{tower}_encoder" / "1" / "model.onnx"
        assert copied.read_bytes() == (export / f"{tower}.onnx").read_bytes()


def test_only_the_backend_that_is_asked_for_is_written(export, tmp_path):
    settings = ServeSettings(backend=("python", "python"))
    assert triton_repo_from_export(export, tmp_path / "triton", settings) == [tmp_path / "triton" / "python"]
    assert [path.name for path in (tmp_path / "triton").iterdir()] == ["python"]


def test_the_image_encoder_is_described_as_triton_wants_it(export, tmp_path):
    settings = ServeSettings(backend="onnxruntime", max_batch=16)
    (repository,) = triton_repo_from_export(export, tmp_path, settings)
    config, parameters = without_parameters(config_in(repository, "image_encoder"))
    expected = """
        name: "image_encoder"  backend: "onnxruntime"  max_batch_size: 16
        input [ { name: "pixel_values" data_type: TYPE_FP32 dims: [ 3, 2, 2 ] } ]
        output [ { name: "image_embeds" data_type: TYPE_FP32 dims: [ 4 ] } ]
        version_policy { latest { num_versions: 1 } }
        instance_group [ { kind: KIND_CPU count: 1 } ]
        dynamic_batching { }
        model_warmup [
          { name: "batch_1" batch_size: 1
            inputs { key: "pixel_values" value { data_type: TYPE_FP32 dims: [ 3, 2, 2 ] random_data: true } } },
          { name: "batch_16" batch_size: 16
            inputs { key: "pixel_values" value { data_type: TYPE_FP32 dims: [ 3, 2, 2 ] random_data: true } } }
        ]
    """
    assert config == text_format.Parse(expected, ModelConfig())
    assert parameters["intra_op_thread_count"] == "1"


def test_the_text_encoder_follows_the_settings(export, tmp_path):
    settings = ServeSettings(backend="python", max_batch=8, queue_delay_us=250, instances=2, threads=3)
    (repository,) = triton_repo_from_export(export, tmp_path, settings)
    config, parameters = without_parameters(config_in(repository, "text_encoder"))
    expected = """
        name: "text_encoder"  backend: "python"  max_batch_size: 8
        input [ { name: "input_ids" data_type: TYPE_INT64 dims: [ 3 ] } ]
        output [ { name: "text_embeds" data_type: TYPE_FP32 dims: [ 4 ] } ]
        version_policy { latest { num_versions: 1 } }
        instance_group [ { kind: KIND_CPU count: 2 } ]
        dynamic_batching { max_queue_delay_microseconds: 250 }
        model_warmup [
          { name: "batch_1" batch_size: 1
            inputs { key: "input_ids" value { data_type: TYPE_INT64 dims: [ 3 ] zero_data: true } } },
          { name: "batch_8" batch_size: 8
            inputs { key: "input_ids" value { data_type: TYPE_INT64 dims: [ 3 ] zero_data: true } } }
        ]
    """
    assert config == text_format.Parse(expected, ModelConfig())
    assert parameters["intra_op_thread_count"] == "3"


@pytest.mark.parametrize("model", ["image_encoder", "text_encoder"])
def test_a_client_finds_all_it_needs_in_the_parameters(export, tmp_path, model):
    (repository,) = triton_repo_from_export(export, tmp_path, ServeSettings(backend="onnxruntime"))
    _, parameters = without_parameters(config_in(repository, model))
    assert float(parameters["logit_scale"]) == 20.590953826904297
    assert (parameters["lineage_hash"], parameters["precision"]) == ("0123456789abcdef", "int8")
    assert json.loads(parameters["preprocess"]) == {
        "size": 2,
        "mean": [0.5, 0.25, 0.75],
        "std": [0.5, 0.5, 1.0],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
    }
    assert json.loads(parameters["tokenizer"]) == {
        "name": "clip-bpe",
        "context_length": 3,
        "kwargs": {"clean": 'lower "ä"'},
    }


def test_a_largest_batch_of_one_is_warmed_up_once(export, tmp_path):
    (repository,) = triton_repo_from_export(export, tmp_path, ServeSettings(backend="python", max_batch=1))
    assert [warm_up.batch_size for warm_up in config_in(repository, "text_encoder").model_warmup] == [1]


def test_the_same_export_gives_the_same_bytes(export, tmp_path):
    first, second = (
        triton_repo_from_export(export, tmp_path / name, ServeSettings(backend="python"))[0] for name in ("a", "b")
    )
    files = [path.relative_to(first) for path in first.rglob("*") if path.is_file()]
    assert all((first / file).read_bytes() == (second / file).read_bytes() for file in files)


def test_an_older_repository_is_replaced_whole(export, tmp_path):
    stale = tmp_path / "python" / "image_encoder" / "2" / "model.onnx"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"old")
    triton_repo_from_export(export, tmp_path, ServeSettings(backend="python"))
    assert not stale.exists()
    assert (tmp_path / "python" / "text_encoder" / "1" / "model.py").is_file()


def test_a_disk_that_fills_up_leaves_the_older_repository(export, tmp_path, monkeypatch):
    target = tmp_path / "triton"
    kept = target / "python" / "README.md"
    kept.parent.mkdir(parents=True)
    kept.write_text("older")
    real, copies = triton_repo.shutil.copyfile, []

    def full_at_the_third(source, copy):
        copies.append(copy)
        if len(copies) == 3:
            raise OSError(28, "No space left on device")
        return real(source, copy)

    monkeypatch.setattr(triton_repo.shutil, "copyfile", full_at_the_third)
    with pytest.raises(ArtifactError, match="No space left"):
        triton_repo_from_export(export, target, ServeSettings(backend="python"))
    assert [path.relative_to(target) for path in target.rglob("*") if path.is_file()] == [kept.relative_to(target)]


@pytest.mark.parametrize(
    "printed, told", [('name: "other"', "another configuration"), ("nme: 1", "cannot be read back")]
)
def test_a_configuration_that_does_not_read_back_is_not_written(export, tmp_path, monkeypatch, printed, told):
    monkeypatch.setattr(text_format, "MessageToString", lambda config: printed)
    with pytest.raises(ExportError, match=f"image_encoder.*{told}"):
        triton_repo_from_export(export, tmp_path / "triton", ServeSettings())
    assert list((tmp_path / "triton").glob("*")) == []


def test_a_missing_export_says_how_to_make_it(tmp_path):
    with pytest.raises(ArtifactError, match="clipress export RUN"):
        triton_repo_from_export(tmp_path / "export" / "int8", tmp_path / "triton", ServeSettings())
    assert not (tmp_path / "triton").exists()


def test_a_changed_onnx_file_is_not_served(export, tmp_path):
    (export / "text.onnx").write_bytes((export / "image.onnx").read_bytes())
    with pytest.raises(ArtifactError, match=r"text\.onnx .* changed.*clipress export RUN"):
        triton_repo_from_export(export, tmp_path / "triton", ServeSettings())
    assert not (tmp_path / "triton").exists()


def test_the_readme_starts_the_server_its_backend_needs(export, tmp_path):
    pages = [
        (repository / "README.md").read_text(encoding="utf-8")
        for repository in triton_repo_from_export(export, tmp_path, ServeSettings())
    ]
    for page in pages:
        assert re.search(
            r"docker run .*\n  nvcr\.io/nvidia/tritonserver:\d\d\.\d\d-py3 .*--model-repository=/models", page
        )
        body = json.loads(re.search(r"-d '(.*)'", page)[1])
        assert np.asarray(body["inputs"][0]["data"]).reshape(body["inputs"][0]["shape"]).shape == (1, LENGTH)
        compile(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], "README.md", "exec")
    assert ["pip install onnxruntime" in page for page in pages] == [False, True]


class Tensor:
    """Stands in for pb_utils.Tensor, and for one input of a request."""

    def __init__(self, name, array):
        self.name, self.array = name, array

    def as_numpy(self):
        return self.array


class Response:
    def __init__(self, output_tensors=(), error=None):
        self.outputs, self.error = {tensor.name: tensor.array for tensor in output_tensors}, error


@pytest.fixture
def text_model(export, tmp_path, monkeypatch):
    """The python backend's text encoder, started the way Triton does; `runs` holds each run's batch size."""
    utils = ModuleType("triton_python_backend_utils")
    utils.Tensor, utils.InferenceResponse, utils.TritonError = Tensor, Response, str
    utils.get_input_tensor_by_name = lambda request, name: request[name]
    monkeypatch.setitem(sys.modules, utils.__name__, utils)
    (repository,) = triton_repo_from_export(export, tmp_path, ServeSettings(backend="python", threads=2))
    spec = importlib.util.spec_from_file_location("model", repository / "text_encoder" / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    config = json_format.MessageToJson(config_in(repository, "text_encoder"), preserving_proto_field_name=True)
    model.initialize({"model_config": config})
    model.runs = []
    session, run = model.session, model.session.run

    class Counted:
        def run(self, names, feed):
            model.runs.append(len(feed["input_ids"]))
            return run(names, feed)

    assert session.get_session_options().intra_op_num_threads == 2
    model.session = Counted()
    return model


def request(*texts):
    return {"input_ids": Tensor("input_ids", np.asarray(texts, np.int64))}


def test_requests_that_come_together_are_one_run_and_are_answered_apart(text_model):
    alone, three = [[1, 2, 3]], [[4, 4, 4], [0, 9, 1], [7, 5, 2]]
    first, second = text_model.execute([request(*alone), request(*three)])
    assert text_model.runs == [4]
    for response, texts in ((first, alone), (second, three)):
        assert response.error is None
        by_hand = [(TABLE[a] + TABLE[b] + TABLE[c]) / 3 for a, b, c in texts]
        np.testing.assert_allclose(response.outputs["text_embeds"], by_hand, atol=1e-6)


def test_a_request_of_the_wrong_shape_is_answered_with_an_error(text_model):
    (response,) = text_model.execute([request([1, 2])])
    assert response.outputs == {}
    assert response.error.startswith("input_ids: ")


def test_one_bad_request_does_not_spoil_its_neighbours(text_model):
    good, bad, other = text_model.execute([request([1, 1, 1]), request([0, 0, WORDS]), request([2, 2, 2], [3, 3, 3])])
    np.testing.assert_allclose(good.outputs["text_embeds"], TABLE[[1]], atol=1e-6)
    np.testing.assert_allclose(other.outputs["text_embeds"], TABLE[[2, 3]], atol=1e-6)
    assert bad.outputs == {} and "Gather" in bad.error


def test_when_every_request_is_bad_each_gets_an_error_and_the_model_lives_on(text_model):
    responses = text_model.execute([request([1, 2]), request([0, 0, WORDS])])
    assert [bool(response.error) for response in responses] == [True, True]
    (after,) = text_model.execute([request([5, 5, 5])])
    np.testing.assert_allclose(after.outputs["text_embeds"], TABLE[[5]], atol=1e-6)


def test_a_model_that_is_unloaded_lets_go_of_its_session(text_model):
    text_model.finalize()
    assert text_model.session is None
