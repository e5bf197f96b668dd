"""Exported text graphs take texts without padding where the tower reads to its end token, and whole ones elsewhere."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from text_towers import END, TOWERS, WHOLE, clip, texts

from clipress.artifact import save_artifact
from clipress.data.eval_sets import evalsets
from clipress.data.spec import SourceSpec
from clipress.errors import ExportError
from clipress.export.metadata import read_metadata
from clipress.export.settings import OnnxSettings
from clipress.export.to_onnx import onnx_from_artifact
from clipress.models.load import artifact_from_model
from clipress.runtime.export_folder import read_export
from clipress.runtime.onnx_session import METADATA, ends_from, reference_session, run_from_onnx, run_of
from clipress.tasks import runs_of

CASES = [(name, exporter) for name in TOWERS for exporter in ("torchscript", "dynamo")]


@pytest.fixture(scope="module")
def sets():
    return evalsets([SourceSpec(format="digits", split="test", limit=4)])


def exported(model, folder, sets, **settings):
    artifact = save_artifact(artifact_from_model(model, ({"stage": "x", "hash": "abc"},), {}), folder / "artifact")
    return onnx_from_artifact(artifact, folder / "export", OnnxSettings(**settings), sets)


@pytest.mark.parametrize(("tower", "exporter"), CASES)
def test_a_text_without_padding_has_the_embedding_that_torch_gives_the_whole_one(tower, exporter, sets, tmp_path):
    text, changes = TOWERS[tower]
    model = clip(text, changes)
    path = exported(model, tmp_path, sets, exporter=exporter).onnx("text")
    session = reference_session(path)
    assert session.get_inputs()[0].shape == ["batch", "length"]
    end = text.get("eos_id", END)
    for length in (2, 5, 16, 24):
        ids = texts([length, 2, length], end)
        with torch.inference_mode():
            whole = model.module.encode_text(torch.from_numpy(ids), normalize=True).numpy()
        (found,) = session.run(None, {"input_ids": ids[:, :length]})
        np.testing.assert_allclose(found, whole, atol=1e-6)


def test_the_file_says_where_its_texts_end_and_is_run_without_their_padding(sets, tmp_path):
    model = clip({"pool_type": "eos", "eos_id": 2}, {})
    path = exported(model, tmp_path, sets).onnx("text")
    assert read_metadata(onnx.load(path))["ends"] == {"input_ids": {"eos": 2}}
    assert read_export(path.parent).graphs["text"].inputs[0].end.eos == 2
    ids = texts([3, 7], 2)
    found, expected = (run({"input_ids": ids})["text_embeds"] for run in (run_from_onnx(path), runs_of(model)["text"]))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_session_is_given_no_padding(tmp_path):
    """The graph returns the ids it is given, so that what reaches it can be seen."""
    puts = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"]) for name in ("input_ids", "seen")
    ]
    graph = helper.make_graph([helper.make_node("Identity", ["input_ids"], ["seen"])], "g", puts[:1], puts[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    ids = texts([3, 11], END)
    for ends, length in (({"input_ids": {"eos": None}}, 16), ({}, 24)):
        helper.set_model_props(model, {METADATA: json.dumps({"ends": ends})})
        onnx.save(model, path := tmp_path / "seen.onnx")
        assert run_of(reference_session(path))({"input_ids": ids})["seen"].shape == (2, length)


@pytest.mark.parametrize("ends", [[], {"input_ids": 3}, {"input_ids": {"eos": "x"}}, {"input_ids": {"end": 1}}])
def test_damaged_metadata_are_one_message(ends):
    with pytest.raises(ExportError, match="metadata of an ONNX file are damaged: ends"):
        ends_from({"ends": ends})


WITH_EMBEDDING = [tower for tower in WHOLE if not tower.startswith(("CoCa", "pooled over all"))]


@pytest.mark.parametrize("tower", WITH_EMBEDDING)
def test_a_tower_that_reads_padding_is_exported_with_one_length(tower, sets, tmp_path):
    model = clip(WHOLE[tower], {"custom_text": True})
    path = exported(model, tmp_path, sets).onnx("text")
    assert reference_session(path).get_inputs()[0].shape == ["batch", 24]
    assert "ends" not in read_metadata(onnx.load(path))
