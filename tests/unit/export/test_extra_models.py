"""Files put together from an export's two towers give what the towers give, and say what they are."""

import io
import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from helpers import clipress, write_recipe
from onnx import version_converter
from PIL import Image

from clipress.artifact import save_artifact
from clipress.data.eval_sets import evalsets
from clipress.data.spec import SourceSpec
from clipress.data.tokens import tokenizer_from_spec
from clipress.errors import DataError, ExportError
from clipress.export import merge as compose
from clipress.export import metadata, parity
from clipress.export.extra_models import variants_from_export
from clipress.export.settings import OnnxSettings
from clipress.export.to_onnx import onnx_from_artifact
from clipress.models import quantizers
from clipress.models.load import Model, artifact_from_model, new_model
from clipress.models.tiny import tiny_architecture
from clipress.runtime.export_folder import read_export
from clipress.runtime.onnx_session import open_session
from clipress.serve.classify import LoadedModel

LABELS, TEMPLATES = ("red circle", "blue square", "7"), ("a photo of a {}", "the {}, drawn")
ASKED = {"exporter": "torchscript", "labels": LABELS, "templates": TEMPLATES}


@pytest.fixture(scope="module")
def sets():
    return evalsets([SourceSpec(format="scenes", split="test", limit=10)])


@pytest.fixture(scope="module")
def originals(tmp_path_factory, sets):
    """Export folders of one model, in float32 and with INT8 products."""
    run, model = tmp_path_factory.mktemp("run"), new_model(tiny_architecture(layers=1), 0)
    copy, inputs = model.copy(), parity.samples(model.preprocess, model.tokenize(), sets)

    def calibrate(module):
        module.encode_image(torch.from_numpy(inputs["image"]))
        module.encode_text(torch.from_numpy(inputs["text"]))

    with torch.no_grad():
        names = quantizers.quantizable(copy.module)
        quantizers.attach(copy.module, names, calibrate)
    int8 = Model(**{**copy.__dict__, "quantization": {"dtype": "int8", "modules": names}})
    for name, one in (("fp32", model), ("int8", int8)):
        artifact = save_artifact(artifact_from_model(one, ({"stage": name, "hash": f"of {name}"},), {}), run / name)
        with pytest.MonkeyPatch.context() as patch:  # an untrained text tower rounds worse than a trained one
            patch.setitem(parity.LIMITS, "int8", (0.99, 0.5, 5e-3))
            onnx_from_artifact(artifact, run / "export" / name, OnnxSettings(exporter="torchscript"), sets)
    return run / "export"


@pytest.fixture(params=["fp32", "int8"])
def export(originals, tmp_path, request):
    """An export folder of one's own."""
    return shutil.copytree(originals / request.param, tmp_path / "export" / request.param)


@pytest.fixture
def fp32(originals, tmp_path):
    return shutil.copytree(originals / "fp32", tmp_path / "export" / "fp32")


def describe(folder, **changes):
    path = folder / "export.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def real_inputs(folder, sets):
    about = read_export(folder)
    return parity.samples(about.preprocess, tokenizer_from_spec(about.tokenizer.model_dump()), sets)


def told(path):
    """Return the metadata as ONNX Runtime shows them."""
    return json.loads(open_session(path).get_modelmeta().custom_metadata_map["clipress"])


def test_a_classifier_needs_no_text_and_gives_the_probabilities_that_both_towers_give(export, sets):
    path = variants_from_export(export, OnnxSettings(**ASKED), sets)["classifier"]
    assert path == export / "classifier.onnx"
    opened, classifier = open_session(path), LoadedModel(export, threads=1)
    files = [png(sets[0].source.image(i)) for i in range(10)]
    assert [one.name for one in opened.get_inputs()] == ["pixel_values"]
    for batch in (1, 3, 10):
        wanted = classifier.classify(files[:batch], LABELS, TEMPLATES)
        (found,) = opened.run(None, {"pixel_values": classifier.pixels(files[:batch])})
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)
    assert np.ptp(wanted, axis=0).max() > 1e-3  # the pictures are told apart


def test_a_classifier_says_its_labels_and_what_it_was_made_of(export, sets):
    about = told(variants_from_export(export, OnnxSettings(**ASKED), sets)["classifier"])
    towers = json.loads((export / "export.json").read_text())
    assert (about["tower"], about["labels"], about["templates"]) == ("classifier", [*LABELS], [*TEMPLATES])
    assert about["made_of"] == {tower: file["sha256"] for tower, file in towers["files"].items()}
    assert about["precision"] == export.name
    assert about["lineage_hash"] == f"of {export.name}" and about["preprocess"]["size"] == 32
    assert 0 <= about["parity"]["probabilities_max_difference"] < 1e-5


def test_a_classifier_is_made_again_only_when_what_is_asked_for_changes_or_it_is_damaged(fp32, sets):
    path = variants_from_export(fp32, OnnxSettings(**ASKED), sets)["classifier"]
    path.touch()
    first = path.stat().st_ino
    variants_from_export(fp32, OnnxSettings(**ASKED), sets)
    assert path.stat().st_ino == first
    variants_from_export(fp32, OnnxSettings(**{**ASKED, "labels": ("a", "b")}), sets)
    assert told(path)["labels"] == ["a", "b"]
    path.write_bytes(path.read_bytes()[:500])
    variants_from_export(fp32, OnnxSettings(**{**ASKED, "labels": ("a", "b")}), sets)
    assert open_session(path).get_outputs()[0].shape[1] == 2


def test_a_file_that_does_not_agree_is_not_written(fp32, sets, monkeypatch):
    honest = compose.classifier
    monkeypatch.setattr(compose, "classifier", lambda image, classes, scale: honest(image, classes[::-1], scale))
    with pytest.raises(ExportError, match=r"classifier\.onnx: probabilities is off by .*Nothing was written"):
        variants_from_export(fp32, OnnxSettings(**ASKED), sets)
    assert sorted(path.name for path in fp32.iterdir()) == ["export.json", "image.onnx", "text.onnx"]


@pytest.mark.parametrize(
    ("labels", "templates", "message"),
    [
        ((), TEMPLATES, "at least one name, found none"),
        (("a", "a"), TEMPLATES, "repeated ones: a"),
        (LABELS, "cat", "one placeholder"),
    ],
)
def test_labels_and_templates_that_cannot_be_used_are_told(fp32, sets, labels, templates, message):
    with pytest.raises(DataError, match=message):
        variants_from_export(fp32, OnnxSettings(labels=labels, templates=templates), sets)


def test_labels_come_from_a_file_too(fp32, sets, tmp_path):
    (tmp_path / "names.txt").write_text("cat\n\ndog\n")
    path = variants_from_export(fp32, OnnxSettings(labels_file=tmp_path / "names.txt"), sets)["classifier"]
    assert told(path)["labels"] == ["cat", "dog"] and told(path)["templates"] == ["a photo of a {}"]


@pytest.mark.parametrize("bias", [None, -2.5])
def test_the_joint_file_gives_what_the_towers_give_for_any_two_batches(export, sets, bias):
    describe(export, logit_bias=bias)
    path = variants_from_export(export, OnnxSettings(joint=True), sets)["joint"]
    opened, towers = open_session(path), {t: parity.runner(export / f"{t}.onnx") for t in ("image", "text")}
    assert [(one.name, one.shape[0]) for one in opened.get_inputs()] == [
        ("pixel_values", "image_batch"),
        ("input_ids", "text_batch"),
    ]
    assert [one.name for one in opened.get_outputs()] == ["image_embeds", "text_embeds", "logits_per_image"]
    assert opened.get_outputs()[2].shape == ["image_batch", "text_batch"]
    inputs = real_inputs(export, sets)
    for images, texts in ((1, 1), (1, 10), (3, 2), (10, 3)):
        feeds = {"pixel_values": inputs["image"][:images], "input_ids": inputs["text"][:texts]}
        image_embeds, text_embeds, logits = opened.run(None, feeds)
        np.testing.assert_allclose(image_embeds, towers["image"](feeds["pixel_values"]), atol=1e-6)
        np.testing.assert_allclose(text_embeds, towers["text"](feeds["input_ids"]), atol=1e-6)
        wanted = image_embeds.astype("d") @ text_embeds.T.astype("d") / 0.07 + (bias or 0)
        np.testing.assert_allclose(logits, wanted, atol=1e-4)
    assert told(path)["tower"] == "joint"


def test_every_file_alone_says_how_to_use_it_and_where_it_is_from(export, sets):
    variants_from_export(export, OnnxSettings(**ASKED, joint=True), sets)
    files = {path.stem: told(path) for path in export.glob("*.onnx")}
    assert files.keys() == {"image", "text", "classifier", "joint"}
    for name, about in files.items():
        assert (about["tower"], about["precision"], about["lineage_hash"]) == (name, export.name, f"of {export.name}")
        assert about["preprocess"]["size"] == 32 and about["tokenizer"]["context_length"] == 24
        assert about["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-5) and about["logit_bias"] is None
        assert about["versions"].keys() == {"clipress", "torch", "onnx", "onnxruntime"}
        assert ("labels" in about) == (name == "classifier") and about["parity"]
        documented = {word for line in metadata.__doc__.splitlines() for word in line[:40].replace(",", " ").split()}
        assert about.keys() <= documented, about.keys() - documented


def test_float16_files_agree_with_the_ones_they_were_made_from_and_are_smaller(export, sets, monkeypatch):
    monkeypatch.setitem(parity.LIMITS, "int8-fp16", (0.99, 0.9, 5e-2))  # an untrained text tower rounds worse
    made = variants_from_export(export, OnnxSettings(**ASKED, joint=True, fp16=True), sets)
    precision = {"fp32": "fp16", "int8": "int8-fp16"}[export.name]
    assert made.keys() == {"classifier", "joint"} | {
        f"{name}.{precision}" for name in ("image", "text", "classifier", "joint")
    }
    inputs = real_inputs(export, sets)
    for name in ("image", "text", "classifier", "joint"):
        source, path = export / f"{name}.onnx", export / f"{name}.{precision}.onnx"
        before, after = open_session(source), open_session(path, float16=True)
        feeds = {"pixel_values": inputs["image"][:3], "input_ids": inputs["text"][:4]}
        feeds = {one.name: feeds[one.name] for one in before.get_inputs()}
        for wanted, found in zip(before.run(None, feeds), after.run(None, feeds), strict=True):
            assert found.dtype == np.float32
            scale = max(1, np.abs(wanted).max())
            assert np.abs(found - wanted).max() / scale < (5e-3 if precision == "fp16" else 0.1)
        types = [item.data_type for item in onnx.load(path).graph.initializer]
        assert onnx.TensorProto.FLOAT16 in types and path.stat().st_size < source.stat().st_size
        about = json.loads(after.get_modelmeta().custom_metadata_map["clipress"])
        assert (about["tower"], about["precision"]) == (name, precision)
        assert ("labels" in about) == (name == "classifier")


def test_a_float16_file_out_of_its_limits_is_not_written(fp32, sets, monkeypatch):
    monkeypatch.setitem(parity.LIMITS, "fp16", (0.9999999999, 1.0, 0.0))
    with pytest.raises(ExportError, match=r"image\.fp16\.onnx does not agree.*at fp16"):
        variants_from_export(fp32, OnnxSettings(fp16=True), sets)
    assert not list(fp32.glob("*.fp16.onnx"))


def test_towers_of_different_opsets_can_be_joined(originals):
    image, text = (onnx.load(originals / "fp32" / f"{tower}.onnx") for tower in ("image", "text"))
    model = compose.joint(image, version_converter.convert_version(text, 20), 10.0, None)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]


def test_the_command_takes_labels_in_place_of_the_recipes_and_makes_no_tower_again(originals, tmp_path):
    recipe = {
        "name": "labelled",
        "teacher": {"artifact": str(originals.parent / "fp32")},
        "data": {split: [{"format": "scenes", "split": "test", "limit": 10}] for split in ("train", "test")},
        "export": {"onnx": {"exporter": "torchscript", "labels": ["a", "b"]}},
    }
    run = tmp_path / "run"
    for arguments in (["compress", write_recipe(recipe, tmp_path), "--out", run], ["export", run]):
        result = clipress(*arguments)
        assert result.exit_code == 0, result.output
    (path,) = run.glob("export/*/classifier.onnx")
    assert told(path)["labels"] == ["a", "b"]
    before = path.with_name("image.onnx").stat().st_ino
    result = clipress("export", run, "--labels", "cat, dog,fox", "--template", "the {}")
    assert result.exit_code == 0 and f"classifier, matches the separate encoders -> {path}" in result.output
    assert (told(path)["labels"], told(path)["templates"]) == (["cat", "dog", "fox"], ["the {}"])
    assert path.with_name("image.onnx").stat().st_ino == before
    result = clipress("export", run, "--labels", "cat", "--labels-file", tmp_path / "names.txt")
    assert result.exit_code == 2 and "either labels or labels_file is asked for" in result.output
    result = clipress("export", run, "--template", "a {}")  # the recipe names the labels
    assert result.exit_code == 0 and (told(path)["labels"], told(path)["templates"]) == (["a", "b"], ["a {}"])


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
