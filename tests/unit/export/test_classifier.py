"""Exporting a classifier: a task with one graph, no texts and no embeddings."""

import json

import numpy as np
import onnx
import pytest
import torch
from fake_tensorrt import fake_machine

from clipress.artifact import save_artifact
from clipress.data.eval_sets import evalsets
from clipress.data.spec import SourceSpec
from clipress.errors import ExportError
from clipress.export import parity
from clipress.export.exported import is_exported
from clipress.export.extra_models import extra_models_from_export
from clipress.export.settings import OnnxSettings, TensorRTSettings
from clipress.export.to_onnx import onnx_from_artifact
from clipress.export.to_tensorrt import engines_from_export, prepare_export
from clipress.export.verify import verify
from clipress.models import quantizers
from clipress.models.load import Model, artifact_from_model
from clipress.runtime.export_folder import read_export
from clipress.runtime.onnx_session import metadata_of, open_session, run_from_onnx
from clipress.runtime.tensorrt import load_engine, read_sidecar
from clipress.tasks import model_from_artifact, runs_of, task_named

LABELS = tuple(str(digit) for digit in range(10))
STUDENT = {"width": 32, "layers": 2, "heads": 2, "patch_size": 8, "image_size": 32, "labels": list(LABELS)}
TASK = task_named("classification")


@pytest.fixture(scope="module")
def sets():
    return evalsets([SourceSpec(format="digits", split="test", limit=20)])


@pytest.fixture(scope="module")
def run(sets, tmp_path_factory):
    """A run folder with one classifier in float32 and one in INT8, both exported."""
    folder, fp32 = tmp_path_factory.mktemp("run"), TASK.student_from(STUDENT, None, 0)
    int8 = fp32.copy()
    pixels = torch.from_numpy(TASK.samples(sets, fp32.preprocess, None)["image"]["pixel_values"])
    names = quantizers.quantizable(int8.module)
    with torch.no_grad():
        quantizers.attach(int8.module, names, lambda module: module(pixels), portable=True)
    int8 = Model(**{**int8.__dict__, "quantization": {"dtype": "int8", "modules": names, "portable": True}})
    for name, model in (("fp32", fp32), ("int8", int8)):
        artifact = artifact_from_model(model, ({"stage": name, "hash": f"of {name}"},), {})
        save_artifact(artifact, folder / name)
        with pytest.MonkeyPatch.context() as patch:  # An untrained model rounds worse than a trained one.
            patch.setitem(parity.LIMITS, "int8", (0.99, 0.5, 5e-2))
            onnx_from_artifact(folder / name, folder / "export" / name, OnnxSettings(exporter="torchscript"), sets)
    return folder


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_the_graph_of_a_classifier_matches_torch_at_any_batch(run, sets, tmp_path, exporter):
    made = onnx_from_artifact(run / "fp32", tmp_path / "e", OnnxSettings(exporter=exporter), sets)
    assert sorted(path.name for path in (tmp_path / "e").iterdir()) == ["export.json", "image.onnx"]
    assert made.parity.keys() == {"samples", "batches", "image_min_cosine", "image_same_first_place"}
    reference, found = runs_of(model_from_artifact(run / "fp32"))["image"], run_from_onnx(made.onnx("image"))
    for batch in (1, 3, 17):
        inputs = made.graphs["image"].example(batch)
        np.testing.assert_allclose(found(inputs)["logits"], reference(inputs)["logits"], atol=1e-5)


@pytest.mark.parametrize("stage", ["fp32", "int8"])
def test_the_export_of_a_classifier_has_labels_and_no_keys_of_a_clip(run, stage):
    folder = run / "export" / stage
    described, exported = json.loads((folder / "export.json").read_text()), read_export(folder)
    assert (exported.task, exported.labels, exported.precision) == ("classification", LABELS, stage)
    about = metadata_of(open_session(exported.onnx("image")))
    assert (about["tower"], about["agrees"], about["labels"]) == ("image", "logits", [*LABELS])
    for keys in (described, about):
        assert not keys.keys() & {"tokenizer", "embed_dim", "logit_scale", "logit_bias"}
    assert is_exported(run / stage, folder, OnnxSettings(exporter="torchscript"))
    assert [one.precision for one in verify(folder)] == [stage]


def test_int8_products_of_a_classifier_run_on_integers(run):
    model = onnx.load(run / "export" / "int8" / "image.onnx")
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("DequantizeLinear") > 2 * 6 and "Conv" not in kinds


def test_the_static_int8_form_is_refused_for_a_classifier(run, sets, tmp_path):
    with pytest.raises(ExportError, match=r"int8: static is not possible: the graph 'image' is not convolutional"):
        onnx_from_artifact(run / "int8", tmp_path / "e", OnnxSettings(int8="static"), sets)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("stage", ["fp32", "int8"])
def test_a_classifier_is_written_in_float16_and_built_as_an_engine(run, sets, stage, monkeypatch):
    for precision in ("int8-fp16", "int8 engine"):
        monkeypatch.setitem(parity.LIMITS, precision, (0.99, 0.5, 5e-2))
    folder, machine = run / "export" / stage, fake_machine()
    precision = {"fp32": "fp16", "int8": "int8-fp16"}[stage]
    assert extra_models_from_export(folder, OnnxSettings(fp16=True), sets).keys() == {f"image.{precision}"}
    settings = TensorRTSettings(batch={"max": 16})
    (path,) = engines_from_export(folder, prepare_export(folder, settings), machine, settings, sets).values()
    sidecar, inputs = read_sidecar(path), read_export(folder).graphs["image"].example(20)
    assert sidecar.precision == precision and sidecar.parity["image_same_first_place"] >= 0.5
    assert load_engine(path, machine)(inputs)["logits"].shape == (20, len(LABELS))


def test_a_zero_shot_classifier_made_of_a_classifier_is_refused(run, sets):
    with pytest.raises(ExportError, match=r"export\.onnx\.labels: zero-shot classifiers need a CLIP"):
        extra_models_from_export(run / "export" / "fp32", OnnxSettings(labels=("cat", "dog")), sets)
