"""Graphs beyond protobuf's 2 GiB have their weights in a file beside them, on every path. The limit is zero here."""

import numpy as np
import onnx
import pytest

from clipress.artifact import save_artifact
from clipress.data.eval_sets import evalsets
from clipress.data.spec import SourceSpec
from clipress.errors import ArtifactError
from clipress.export import metadata, onnx_file
from clipress.export.extra_models import extra_models_from_export
from clipress.export.settings import OnnxSettings, TensorRTSettings
from clipress.export.tensorrt_onnx import prepare
from clipress.export.to_onnx import onnx_from_artifact
from clipress.export.verify import verify
from clipress.models.load import artifact_from_model, new_model
from clipress.models.tiny import tiny_architecture
from clipress.runtime.export_folder import data_path, read_export
from clipress.runtime.onnx_session import run_from_onnx
from clipress.serve.settings import ServeSettings
from clipress.serve.triton_repo import triton_repo_from_export
from clipress.storage import sha256
from clipress.tasks import runs_of

EXTRA = OnnxSettings(labels=("cat", "dog"), joint=True, fp16=True)


@pytest.fixture
def beside(monkeypatch):
    monkeypatch.setattr(onnx_file, "LIMIT", 0)


@pytest.fixture
def sets():
    return evalsets([SourceSpec(format="scenes", split="test", limit=8)])


@pytest.fixture
def model():
    return new_model(tiny_architecture(layers=1), 0)


@pytest.fixture
def artifact(model, tmp_path):
    return save_artifact(artifact_from_model(model, ({"stage": "x", "hash": "abc"},), {}), tmp_path / "x")


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_an_export_with_weights_beside_it_computes_what_torch_does(beside, model, artifact, sets, tmp_path, exporter):
    made = onnx_from_artifact(artifact, tmp_path / "e", OnnxSettings(exporter=exporter), sets)
    files = ["export.json", "image.onnx", "image.onnx.data", "text.onnx", "text.onnx.data"]
    assert sorted(path.name for path in (tmp_path / "e").iterdir()) == files
    rng = np.random.default_rng(0)
    for name, run in runs_of(model).items():
        path = made.onnx(name)
        inputs = (
            made.graphs[name].example(3)
            if name == "text"
            else {"pixel_values": rng.standard_normal((3, 3, 32, 32), "f")}
        )
        for output, wanted in run(inputs).items():
            np.testing.assert_allclose(run_from_onnx(path)(inputs)[output], wanted, atol=1e-5)
        assert all(len(item.raw_data) <= onnx_file.SMALL for item in onnx_file.read(path).graph.initializer)
        assert data_path(path).stat().st_mode == path.stat().st_mode
        assert made.files[name].bytes == path.stat().st_size + data_path(path).stat().st_size
        assert metadata.read_metadata(onnx_file.read(path))["data_sha256"] == sha256(data_path(path))
    assert [one.path.name for one in verify(tmp_path / "e")] == ["image.onnx", "text.onnx"]


def test_damaged_weights_beside_a_graph_are_reported(beside, artifact, sets, tmp_path):
    made = onnx_from_artifact(artifact, tmp_path / "e", OnnxSettings(), sets)
    data = made.data("text")
    content = bytearray(data.read_bytes())
    content[1000] ^= 1
    data.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"text\.onnx\.data .* is truncated or changed"):
        read_export(tmp_path / "e")
    data.unlink()
    with pytest.raises(ArtifactError, match=r"no text\.onnx\.data"):
        read_export(tmp_path / "e")


def test_files_made_of_such_graphs_are_those_made_of_whole_ones(artifact, sets, tmp_path, monkeypatch):
    found = {}
    for place, limit in (("inside", onnx_file.LIMIT), ("beside", 0)):
        monkeypatch.setattr(onnx_file, "LIMIT", limit)
        onnx_from_artifact(artifact, tmp_path / place, EXTRA, sets)
        found[place] = extra_models_from_export(tmp_path / place, EXTRA, sets)
    assert found["inside"].keys() == found["beside"].keys() and len(found["beside"]) == 6
    for name, path in found["beside"].items():
        assert data_path(path).is_file(), name
        whole, apart = onnx.load(found["inside"][name]), onnx.load(path)
        assert len(whole.graph.node) == len(apart.graph.node), name
        weights = [{item.name: item.raw_data for item in one.graph.initializer} for one in (whole, apart)]
        assert weights[0] == weights[1], name


def test_a_prepared_engine_source_and_a_triton_repository_bring_the_weights_along(beside, artifact, sets, tmp_path):
    made = onnx_from_artifact(artifact, tmp_path / "e", OnnxSettings(), sets)
    prepared = prepare(made.onnx("image"), tmp_path / "trt", TensorRTSettings())
    assert prepared.path.is_file() and data_path(prepared.path).is_file()
    triton_repo_from_export(tmp_path / "e", tmp_path / "triton", ServeSettings(backend=("onnxruntime",)))
    served = next((tmp_path / "triton").rglob("text_encoder/1/model.onnx"))
    inputs = made.graphs["text"].example(2)
    expected = run_from_onnx(made.onnx("text"))(inputs)["text_embeds"]
    np.testing.assert_array_equal(run_from_onnx(served)(inputs)["text_embeds"], expected)
