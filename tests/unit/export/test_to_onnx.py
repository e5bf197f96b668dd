"""Exported files agree with torch and describe themselves; files that do not agree are refused."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from clipress.artifact import save_artifact
from clipress.data.eval_sets import evalsets
from clipress.data.spec import SourceSpec
from clipress.errors import ExportError, RecipeError
from clipress.export import parity, torch_export
from clipress.export.exported import is_exported
from clipress.export.settings import OnnxSettings
from clipress.export.to_onnx import onnx_from_artifact
from clipress.models import anatomy, surgery
from clipress.models.load import artifact_from_model, new_model
from clipress.models.tiny import tiny_architecture
from clipress.recipe import checked
from clipress.runtime.export_folder import read_export
from clipress.runtime.onnx_session import run_from_onnx
from clipress.serve.settings import ServeSettings
from clipress.tasks import graphs_of, model_from_artifact, runs_of


@pytest.fixture(scope="module")
def sets():
    return evalsets([SourceSpec(format="scenes", split="test", limit=10)])


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """The folder of a pruned model."""
    model = new_model(tiny_architecture(layers=1), 0)
    for part in anatomy.attentions(model.module):
        surgery.cut(part, surgery.AttnMask(torch.arange(16).expand(2, 16) < 8, torch.arange(16).expand(2, 16) < 12))
    for part in anatomy.ffns(model.module):
        surgery.cut(part, surgery.FfnMask(torch.arange(128) % 2 == 0))
    return save_artifact(
        artifact_from_model(model, ({"stage": "x", "hash": "abc"},), {}), tmp_path_factory.mktemp("a") / "x"
    )


OPSETS = [*(("torchscript", opset) for opset in (17, 18, 19, 20)), ("dynamo", 18), ("dynamo", 20)]


@pytest.mark.parametrize(("exporter", "opset"), OPSETS)
def test_towers_match_torch_at_any_batch(artifact, sets, tmp_path, exporter, opset):
    made = onnx_from_artifact(artifact, tmp_path / "e", OnnxSettings(opset=opset, exporter=exporter), sets)
    assert made.exporter == {"image": exporter, "text": exporter}
    assert sorted(p.name for p in (tmp_path / "e").iterdir()) == ["export.json", "image.onnx", "text.onnx"]
    model = model_from_artifact(artifact)
    rng = np.random.default_rng(0)
    for path in (tmp_path / "e").glob("*.onnx"):
        assert [(entry.domain, entry.version) for entry in onnx.load(path).opset_import] == [("", opset)]
    for batch in (1, 3, ServeSettings().max_batch):
        pixels = rng.standard_normal((batch, 3, 32, 32)).astype("f")
        ids = model.tokenize()([f"a red circle {i}" for i in range(batch)])
        for graph, run in runs_of(model).items():
            inputs = {"pixel_values": pixels} if graph == "image" else {"input_ids": ids}
            found, wanted = run_from_onnx(made.onnx(graph))(inputs), run(inputs)
            assert found.keys() == wanted.keys() == {f"{graph}_embeds"}
            (found,), (wanted,) = found.values(), wanted.values()
            np.testing.assert_allclose(found, wanted, atol=2e-6)
            np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("opset", [17, 20])
def test_int8_towers_match_torch_on_another_opset(tiny_run, sets, tmp_path, opset):
    artifact = tiny_run[0] / "int8"  # The run itself exports opset 18.
    made = onnx_from_artifact(artifact, tmp_path / "e", OnnxSettings(opset=opset), sets)
    assert (made.precision, made.opset) == ("int8", opset)
    assert made.parity["batches"] == [1, 3, 32]
    assert all(onnx.load(path).opset_import[0].version == opset for path in (tmp_path / "e").glob("*.onnx"))
    model, rng = model_from_artifact(artifact), np.random.default_rng(0)
    inputs = {"pixel_values": rng.standard_normal((ServeSettings().max_batch, 3, 32, 32)).astype("f")}
    wanted, found = (
        run(inputs)["image_embeds"] for run in (runs_of(model)["image"], run_from_onnx(made.onnx("image")))
    )
    assert (wanted * found).sum(1).min() > 0.999


def test_an_opset_that_dynamo_does_not_write_is_refused_and_left_to_torchscript_by_default(artifact, sets, tmp_path):
    with pytest.raises(RecipeError, match=r"export\.onnx: .*dynamo writes opset 18 or later, found 17"):
        checked(OnnxSettings, {"exporter": "dynamo", "opset": 17}, "export.onnx")
    made = onnx_from_artifact(artifact, tmp_path / "e", OnnxSettings(opset=17), sets)
    assert set(made.exporter.values()) == {"torchscript"}
    assert onnx.load(tmp_path / "e" / "text.onnx").opset_import[0].version == 17


def test_a_file_describes_its_use_in_metadata(artifact, sets, tmp_path):
    made = onnx_from_artifact(artifact, tmp_path / "e", OnnxSettings(exporter="torchscript"), sets)
    session = onnxruntime.InferenceSession(str(tmp_path / "e" / "text.onnx"), providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["clipress"])
    assert (about["task"], about["tower"], about["lineage_hash"]) == ("clip", "text", "abc")
    assert about["preprocess"]["size"] == 32 and about["tokenizer"]["context_length"] == 24
    assert about["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-5)
    assert read_export(tmp_path / "e") == made
    assert made.graphs == graphs_of(model_from_artifact(artifact))


def test_an_export_is_kept_while_artifact_settings_and_files_are_the_same(artifact, sets, tmp_path):
    target, settings = tmp_path / "e", OnnxSettings(exporter="torchscript")
    assert not is_exported(artifact, target, settings)
    onnx_from_artifact(artifact, target, settings, sets)
    assert is_exported(artifact, target, settings)
    assert is_exported(artifact, target, settings.model_copy(update={"fp16": True}))  # It changes no graph's file.
    assert not is_exported(artifact, target, settings.model_copy(update={"opset": 20}))
    described = json.loads((target / "export.json").read_text())
    for changed in ({"lineage_hash": "other"}, {"self_test": None}, {"files": {}}):
        (target / "export.json").write_text(json.dumps(described | changed))
        assert not is_exported(artifact, target, settings)


def test_an_export_that_fails_parity_is_refused_and_the_old_one_is_kept(artifact, sets, tmp_path, monkeypatch):
    target = tmp_path / "e"
    onnx_from_artifact(artifact, target, OnnxSettings(exporter="torchscript"), sets)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    honest = torch_export.write_onnx

    def damaged(module, path, opset, dynamo):
        honest(module, path, opset, dynamo)
        model, is_image = onnx.load(path), module.graph.name == "image"
        weight = max(model.graph.initializer, key=lambda i: len(i.raw_data) if is_image else -len(i.raw_data))
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight)[::-1].copy(), weight.name))
        onnx.save(model, path)

    monkeypatch.setattr(torch_export, "write_onnx", damaged)
    with pytest.raises(ExportError, match=r"image\.onnx does not agree.*least cosine"):
        onnx_from_artifact(artifact, target, OnnxSettings(exporter="torchscript"), sets)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


def test_a_different_ranking_is_refused_even_if_all_embeddings_are_close(artifact, sets, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "same_first", lambda *_: 0.9)
    with pytest.raises(ExportError, match="rank differently"):
        onnx_from_artifact(artifact, tmp_path / "e", OnnxSettings(exporter="torchscript"), sets)
    assert not (tmp_path / "e").exists()
