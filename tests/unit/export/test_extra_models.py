"""Extra files give the same results as the graphs they are made from and describe themselves in metadata."""

import io
import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from fake_tensorrt import two_inputs
from helpers import clipress, write_recipe
from onnx import version_converter
from PIL import Image

from clipress.artifact import save_artifact
from clipress.data.eval_sets import evalsets
from clipress.data.spec import SourceSpec
from clipress.errors import DataError, ExportError
from clipress.export import merge, metadata, parity
from clipress.export.extra_models import extra_models_from_export, files_of
from clipress.export.settings import OnnxSettings
from clipress.export.to_onnx import onnx_from_artifact
from clipress.models import quantizers
from clipress.models.load import Model, artifact_from_model, new_model
from clipress.models.tiny import tiny_architecture
from clipress.runtime.export_folder import Exported, describe_file, read_export
from clipress.runtime.graph import Graph, Input, Output
from clipress.runtime.onnx_session import metadata_of, open_session, run_from_onnx
from clipress.serve.classify import LoadedModel
from clipress.tasks import TASKS, Task, task_named

LABELS, TEMPLATES = ("red circle", "blue square", "7"), ("a photo of a {}", "the {}, drawn")
SETTINGS = {"exporter": "torchscript", "labels": LABELS, "templates": TEMPLATES}


@pytest.fixture(scope="module")
def sets():
    return evalsets([SourceSpec(format="scenes", split="test", limit=10)])


@pytest.fixture(scope="module")
def originals(tmp_path_factory, sets):
    """Export folders of one model, in float32 and in INT8."""
    run, model = tmp_path_factory.mktemp("run"), new_model(tiny_architecture(layers=1), 0)
    copy, inputs = model.copy(), task_named("clip").samples(sets, model.preprocess, model.tokenize())

    def calibrate(module):
        module.encode_image(torch.from_numpy(inputs["image"]["pixel_values"]))
        module.encode_text(torch.from_numpy(inputs["text"]["input_ids"]))

    with torch.no_grad():
        names = quantizers.quantizable(copy.module)
        quantizers.attach(copy.module, names, calibrate)
    int8 = Model(**{**copy.__dict__, "quantization": {"dtype": "int8", "modules": names}})
    for name, one in (("fp32", model), ("int8", int8)):
        artifact = save_artifact(artifact_from_model(one, ({"stage": name, "hash": f"of {name}"},), {}), run / name)
        with pytest.MonkeyPatch.context() as patch:  # An untrained text tower rounds worse than a trained one.
            patch.setitem(parity.LIMITS, "int8", (0.99, 0.5, 5e-3))
            onnx_from_artifact(artifact, run / "export" / name, OnnxSettings(exporter="torchscript"), sets)
    return run / "export"


@pytest.fixture(params=["fp32", "int8"])
def export(originals, tmp_path, request):
    """A copy of an export folder, which a test may change."""
    return shutil.copytree(originals / request.param, tmp_path / "export" / request.param)


@pytest.fixture
def fp32(originals, tmp_path):
    return shutil.copytree(originals / "fp32", tmp_path / "export" / "fp32")


def describe(folder, **changes):
    path = folder / "export.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def real_inputs(folder, sets):
    """Return inputs of both graphs by name."""
    about = read_export(folder)
    samples = task_named("clip").samples(sets, about.preprocess, about.tokenize())
    return {**samples["image"], **samples["text"]}


def metadata_in(path):
    """Return a file's metadata as ONNX Runtime reads them."""
    return metadata_of(open_session(path))


def test_a_classifier_needs_no_text_and_gives_the_probabilities_of_both_graphs(export, sets):
    path = extra_models_from_export(export, OnnxSettings(**SETTINGS), sets)["classifier"]
    assert path == export / "classifier.onnx"
    opened, classifier = open_session(path), LoadedModel(export, threads=1)
    files = [png(sets[0].source.image(i)) for i in range(10)]
    pixels = next(sets[0].pixel_batches(read_export(export).preprocess, 10))
    assert [one.name for one in opened.get_inputs()] == ["pixel_values"]
    for batch in (1, 3, 10):
        wanted = classifier.classify(files[:batch], LABELS, TEMPLATES)
        (found,) = opened.run(None, {"pixel_values": pixels[:batch]})
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)
    assert np.ptp(wanted, axis=0).max() > 1e-3  # The images differ in their probabilities.


def test_a_classifier_records_its_labels_and_sources(export, sets):
    about = metadata_in(extra_models_from_export(export, OnnxSettings(**SETTINGS), sets)["classifier"])
    towers = json.loads((export / "export.json").read_text())
    assert (about["tower"], about["labels"], about["templates"]) == ("classifier", [*LABELS], [*TEMPLATES])
    assert about["made_of"] == {tower: file["sha256"] for tower, file in towers["files"].items()}
    assert about["precision"] == export.name
    assert about["lineage_hash"] == f"of {export.name}" and about["preprocess"]["size"] == 32
    assert 0 <= about["parity"]["probabilities_max_difference"] < 1e-5


def test_a_classifier_is_rebuilt_only_if_its_settings_change_or_it_is_damaged(fp32, sets):
    path = extra_models_from_export(fp32, OnnxSettings(**SETTINGS), sets)["classifier"]
    path.touch()
    first = path.stat().st_ino
    extra_models_from_export(fp32, OnnxSettings(**SETTINGS), sets)
    assert path.stat().st_ino == first
    extra_models_from_export(fp32, OnnxSettings(**{**SETTINGS, "labels": ("a", "b")}), sets)
    assert metadata_in(path)["labels"] == ["a", "b"]
    path.write_bytes(path.read_bytes()[:500])
    extra_models_from_export(fp32, OnnxSettings(**{**SETTINGS, "labels": ("a", "b")}), sets)
    assert open_session(path).get_outputs()[0].shape[1] == 2


def test_a_file_that_fails_parity_is_not_written(fp32, sets, monkeypatch):
    honest = merge.classifier
    monkeypatch.setattr(merge, "classifier", lambda image, classes, *more: honest(image, classes[::-1], *more))
    with pytest.raises(
        ExportError, match=r"classifier\.onnx: probabilities differs from the source model by .*Nothing was written"
    ):
        extra_models_from_export(fp32, OnnxSettings(**SETTINGS), sets)
    assert sorted(path.name for path in fp32.iterdir()) == ["export.json", "image.onnx", "text.onnx"]


@pytest.mark.parametrize(
    ("labels", "templates", "message"),
    [
        ((), TEMPLATES, "at least one name, found none"),
        (("a", "a"), TEMPLATES, "repeated ones: a"),
        (LABELS, "cat", "one placeholder"),
    ],
)
def test_labels_and_templates_that_cannot_be_used_are_refused(fp32, sets, labels, templates, message):
    with pytest.raises(DataError, match=message):
        extra_models_from_export(fp32, OnnxSettings(labels=labels, templates=templates), sets)


def test_labels_can_be_read_from_a_file(fp32, sets, tmp_path):
    (tmp_path / "names.txt").write_text("cat\n\ndog\n")
    path = extra_models_from_export(fp32, OnnxSettings(labels_file=tmp_path / "names.txt"), sets)["classifier"]
    assert metadata_in(path)["labels"] == ["cat", "dog"] and metadata_in(path)["templates"] == ["a photo of a {}"]


@pytest.mark.parametrize("bias", [None, -2.5])
def test_the_joint_file_gives_the_same_as_both_graphs_for_any_two_batches(export, sets, bias):
    describe(export, logit_bias=bias)
    path = extra_models_from_export(export, OnnxSettings(joint=True), sets)["joint"]
    opened, runs = open_session(path), {t: run_from_onnx(export / f"{t}.onnx") for t in ("image", "text")}
    assert [(one.name, one.shape[0]) for one in opened.get_inputs()] == [
        ("pixel_values", "image_batch"),
        ("input_ids", "text_batch"),
    ]
    assert [one.name for one in opened.get_outputs()] == ["image_embeds", "text_embeds", "logits_per_image"]
    assert opened.get_outputs()[2].shape == ["image_batch", "text_batch"]
    inputs = real_inputs(export, sets)
    for images, texts in ((1, 1), (1, 10), (3, 2), (10, 3)):
        feeds = {"pixel_values": inputs["pixel_values"][:images], "input_ids": inputs["input_ids"][:texts]}
        image_embeds, text_embeds, logits = opened.run(None, feeds)
        np.testing.assert_allclose(
            image_embeds, runs["image"]({"pixel_values": feeds["pixel_values"]})["image_embeds"], atol=1e-6
        )
        np.testing.assert_allclose(
            text_embeds, runs["text"]({"input_ids": feeds["input_ids"]})["text_embeds"], atol=1e-6
        )
        wanted = image_embeds.astype("d") @ text_embeds.T.astype("d") / 0.07 + (bias or 0)
        np.testing.assert_allclose(logits, wanted, atol=1e-4)
    assert metadata_in(path)["tower"] == "joint"


def test_every_file_describes_its_use_and_origin(export, sets):
    extra_models_from_export(export, OnnxSettings(**SETTINGS, joint=True), sets)
    files = {path.stem: metadata_in(path) for path in export.glob("*.onnx")}
    assert files.keys() == {"image", "text", "classifier", "joint"}
    for name, about in files.items():
        assert (about["tower"], about["precision"], about["lineage_hash"]) == (name, export.name, f"of {export.name}")
        assert about["preprocess"]["size"] == 32 and about["tokenizer"]["context_length"] == 24
        assert about["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-5) and about["logit_bias"] is None
        assert (about["task"], about["agrees"]) == ("clip", "embeddings")
        assert about["versions"].keys() == {"clipress", "torch", "onnx", "onnxruntime"}
        assert ("labels" in about) == (name == "classifier") and about["parity"]
        documented = {word for line in metadata.__doc__.splitlines() for word in line[:40].replace(",", " ").split()}
        assert about.keys() <= documented, about.keys() - documented


def test_float16_files_agree_with_the_ones_they_were_made_from_and_are_smaller(export, sets, monkeypatch):
    monkeypatch.setitem(parity.LIMITS, "int8-fp16", (0.99, 0.9, 5e-2))  # An untrained text tower rounds worse.
    made = extra_models_from_export(export, OnnxSettings(**SETTINGS, joint=True, fp16=True), sets)
    precision = {"fp32": "fp16", "int8": "int8-fp16"}[export.name]
    assert made.keys() == {"classifier", "joint"} | {
        f"{name}.{precision}" for name in ("image", "text", "classifier", "joint")
    }
    inputs = real_inputs(export, sets)
    for name in ("image", "text", "classifier", "joint"):
        source, path = export / f"{name}.onnx", export / f"{name}.{precision}.onnx"
        before, after = open_session(source), open_session(path, float16=True)
        feeds = {"pixel_values": inputs["pixel_values"][:3], "input_ids": inputs["input_ids"][:4]}
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


def test_a_float16_file_beyond_its_limits_is_not_written(fp32, sets, monkeypatch):
    monkeypatch.setitem(parity.LIMITS, "fp16", (0.9999999999, 1.0, 0.0))
    with pytest.raises(ExportError, match=r"image\.fp16\.onnx does not agree.*at fp16"):
        extra_models_from_export(fp32, OnnxSettings(fp16=True), sets)
    assert not list(fp32.glob("*.fp16.onnx"))


def test_graphs_of_different_opsets_can_be_joined(originals):
    models = {tower: onnx.load(originals / "fp32" / f"{tower}.onnx") for tower in ("image", "text")}
    models["text"] = version_converter.convert_version(models["text"], 20)
    model = merge.joint(models, 10.0, None)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]


def test_the_command_overrides_the_recipes_labels_and_keeps_the_graphs_files(originals, tmp_path):
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
    assert metadata_in(path)["labels"] == ["a", "b"]
    before = path.with_name("image.onnx").stat().st_ino
    result = clipress("export", run, "--labels", "cat, dog,fox", "--template", "the {}")
    assert result.exit_code == 0 and f"classifier, matches the separate encoders -> {path}" in result.output
    assert (metadata_in(path)["labels"], metadata_in(path)["templates"]) == (["cat", "dog", "fox"], ["the {}"])
    assert path.with_name("image.onnx").stat().st_ino == before
    result = clipress("export", run, "--labels", "cat", "--labels-file", tmp_path / "names.txt")
    assert result.exit_code == 2 and "expected labels or labels_file, found both" in result.output
    result = clipress("export", run, "--template", "a {}")  # The labels are the recipe's.
    assert result.exit_code == 0 and (metadata_in(path)["labels"], metadata_in(path)["templates"]) == (
        ["a", "b"],
        ["a {}"],
    )


QUESTION = Graph(
    name="question",
    inputs=(Input(name="states", dtype="float32", shape=(8,)), Input(name="memory", dtype="float32", shape=(5,))),
    outputs=(Output(name="logits", shape=(5,)),),
    agrees="logits",
)


@pytest.fixture
def questions(tmp_path):
    """An export of another task: one graph with two inputs, no tokenizer, no embeddings."""

    class Questions(Task):
        name, main_graph, towers, figures, provides = "questions", "question", (), (), frozenset()

        def samples(self, sets, preprocess, tokenize):
            assert tokenize is None
            return {"question": QUESTION.example(6)}

    for member in Questions.__abstractmethods__:
        setattr(Questions, member, None)
    Questions.__abstractmethods__ = frozenset()
    folder = tmp_path / "questions"
    folder.mkdir()
    onnx.save(two_inputs(np.random.default_rng(0).standard_normal((8, 5)).astype("f")), folder / "question.onnx")
    exported = Exported(
        folder=folder,
        task="questions",
        stage="fp32",
        precision="fp32",
        graphs={"question": QUESTION},
        preprocess={"size": 32},
        labels=("a", "b", "c", "d", "e"),
        lineage_hash="0",
        files={"question": describe_file(folder / "question.onnx")},
    )
    exported.write()
    with TASKS.registered("questions", Questions):
        yield exported


def test_float16_files_are_made_for_every_graph_of_any_task(questions):
    made = extra_models_from_export(questions.folder, OnnxSettings(fp16=True), [])
    assert made == {"question.fp16": questions.folder / "question.fp16.onnx"}
    about = metadata_of(open_session(made["question.fp16"], float16=True))
    assert (about["tower"], about["precision"], about["agrees"]) == ("question", "fp16", "logits")
    assert about["parity"]["question_min_cosine"] > 0.999 and about["parity"]["question_same_first_place"] >= 0.97


@pytest.mark.parametrize("settings", [{"labels": ("a", "b")}, {"joint": True}])
def test_files_that_only_a_clip_has_are_refused_for_other_tasks(questions, settings):
    (key,) = settings
    with pytest.raises(ExportError, match=rf"export\.onnx\.{key}: .* needs? a CLIP; .* is a model for 'questions'"):
        extra_models_from_export(questions.folder, OnnxSettings(**settings), [])


def test_metadata_of_a_task_without_embeddings_have_its_labels_and_no_keys_of_clip(questions):
    about = metadata.of_graph(questions, "question")
    assert (about["task"], about["tower"], about["agrees"]) == ("questions", "question", "logits")
    assert about["labels"] == ["a", "b", "c", "d", "e"]
    assert not about.keys() & {"embed_dim", "logit_scale", "logit_bias", "tokenizer", "files", "graphs"}


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_only_files_that_were_made_of_the_same_graphs_are_an_exports(fp32, sets):
    extra_models_from_export(fp32, OnnxSettings(exporter="torchscript", fp16=True, joint=True), sets)
    exported = read_export(fp32)
    assert files_of(exported) == {
        (name, precision): fp32 / f"{name}{ending}.onnx"
        for name in ("image", "text", "joint")
        for precision, ending in (("fp32", ""), ("fp16", ".fp16"))
    }
    again = exported.files["text"].model_copy(update={"sha256": "of another export"})
    left = files_of(exported.model_copy(update={"files": {**exported.files, "text": again}}))
    assert left.keys() == {("image", "fp32"), ("text", "fp32"), ("image", "fp16")}
