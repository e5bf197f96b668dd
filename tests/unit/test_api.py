"""The Python API: `clipress.run`, `clipress.load` and their results."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import write_recipe
from PIL import Image

import clipress
from clipress.data import digits
from clipress.data.transforms import fitted, normalised
from clipress.errors import ArtifactError, DataError, RecipeError
from clipress.runtime.onnx_session import open_session
from clipress.runtime.sessions import RUNTIMES
from clipress.tasks import model_from_artifact
from clipress.tasks.clip import encoders

TEXTS = ["a photo of the number three", "a red circle", "two"]


@pytest.fixture(scope="module")
def model(tiny_run):
    return clipress.load(tiny_run[0] / "int8")


@pytest.fixture(scope="module")
def images():
    return list(digits.digits("test")[0][:5])


def test_run_applies_overrides_and_returns_what_it_made(recipe, tmp_path):
    recipe["stages"] = recipe["stages"][:1]
    lines = []
    overrides = {"stages.0.prune.name": "half", "bench.batch": [1], "serve.backend": "python"}
    run = clipress.run(write_recipe(recipe, tmp_path), tmp_path / "run", overrides, say=lines.append)
    assert isinstance(run, clipress.Run)
    assert (run.folder, run.artifacts) == (tmp_path / "run", ("teacher", "half"))
    assert [row.stage for row in run.results.rows] == ["teacher", "half"]
    assert run.served == "half" and any(line.startswith("half: prune") for line in lines)
    assert [path.name for path in (run.folder / "triton").iterdir()] == ["python"]
    assert clipress.load(run.folder / run.served).encode_text(["a"]).shape == (1, 32)


def test_run_prints_nothing(tiny_run, recipe, tmp_path, capsys):
    copy = shutil.copytree(tiny_run[0], tmp_path / "run")
    again = clipress.run(write_recipe(recipe, tmp_path), copy)
    assert again.artifacts[-1] == "int8" and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"stages.9.prune.steps": 1}, r"Override stages\.9.*no such key"),
        ({"serve.max_batch": 0}, r"serve\.max_batch"),
        ({"bench.batches": 1}, "Did you mean 'batch'"),
    ],
)
def test_an_invalid_override_is_an_error_before_any_work(recipe, tmp_path, overrides, words):
    with pytest.raises(RecipeError, match=words):
        clipress.run(write_recipe(recipe, tmp_path), tmp_path / "run", overrides)
    assert not (tmp_path / "run").exists()


def test_a_missing_recipe_is_an_error():
    with pytest.raises(RecipeError, match="Did you mean 'demo'"):
        clipress.run("demoo")


def test_embeddings_match_the_artifact_in_torch(tiny_run, images):
    loaded, artifact = clipress.load(tiny_run[0] / "recovered"), model_from_artifact(tiny_run[0] / "recovered")
    encode_image, encode_text = encoders(artifact, "Test")
    found = loaded.encode_image(images)
    assert found.dtype == np.float32 and found.shape == (5, 32)
    pixels = normalised(np.stack([fitted(image, artifact.preprocess) for image in images]), artifact.preprocess)
    np.testing.assert_allclose(found, encode_image(pixels), atol=1e-5)
    np.testing.assert_allclose(loaded.encode_text(TEXTS), encode_text(artifact.tokenize()(TEXTS)), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_a_stage_and_its_export_are_the_same_model(tiny_run, model):
    exported = clipress.load(tiny_run[0] / "export" / "int8")
    np.testing.assert_array_equal(exported.encode_text(TEXTS), model.encode_text(TEXTS))


def test_an_export_is_found_without_its_artifact(tiny_run, tmp_path, model):
    shutil.copytree(tiny_run[0] / "export" / "int8", tmp_path / "run" / "export" / "int8")
    moved = clipress.load(tmp_path / "run" / "int8")
    np.testing.assert_array_equal(moved.encode_text(TEXTS), model.encode_text(TEXTS))


def test_an_image_may_be_a_path_bytes_a_pillow_image_or_an_array(model, images, tmp_path):
    path = tmp_path / "digit.png"
    Image.fromarray(images[0]).save(path)
    forms = [path, str(path), path.read_bytes(), Image.open(path), images[0]]
    found = model.encode_image(forms)
    assert all(np.array_equal(row, found[0]) for row in found)
    for form in forms:
        assert model.encode_image(form).shape == (1, 32)
    np.testing.assert_array_equal(model.encode_image(np.stack(images)), model.encode_image(images))


def test_a_pillow_image_is_rotated_and_converted_like_a_file(model, tmp_path):
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6  # Rotated by 90 degrees.
    turned, grey = tmp_path / "turned.jpg", tmp_path / "grey.png"
    Image.fromarray(rng.integers(0, 256, (40, 64, 3), np.uint8)).save(turned, exif=exif)
    Image.fromarray(rng.integers(0, 65_536, (40, 40), np.uint16)).save(grey)
    for path in (turned, grey):
        np.testing.assert_array_equal(model.encode_image(Image.open(path)), model.encode_image(path))


def test_empty_inputs_give_no_rows(model):
    assert model.encode_image([]).shape == model.encode_text([]).shape == (0, 32)
    assert model.classify([], ["a", "b"]).shape == (0, 2)


def test_a_single_string_is_one_text(model):
    np.testing.assert_array_equal(model.encode_text("two"), model.encode_text(["two"]))


def test_probabilities_follow_from_the_embeddings(model, images):
    labels, templates = ["three", "four"], ["a photo of the number {}", "the digit {}"]
    found = model.classify(images, labels=labels, templates=templates)
    means = np.stack([model.encode_text([t.format(label) for t in templates]).mean(axis=0) for label in labels])
    logits = (
        model.exported.logit_scale * model.encode_image(images) @ (means / np.linalg.norm(means, axis=1)[:, None]).T
    )
    np.testing.assert_allclose(found, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), atol=1e-5)
    np.testing.assert_allclose(
        model.classify(images[0], labels, templates), found[0], atol=1e-6
    )  # another batch rounds otherwise
    np.testing.assert_array_equal(model.classify(images, labels, "the {}"), model.classify(images, labels, ["the {}"]))


def test_label_embeddings_are_cached(tiny_run, images, monkeypatch):
    model = clipress.load(tiny_run[0] / "int8")
    first = model.classify(images, ["one", "two"])
    monkeypatch.setitem(model.sessions, "text", None)
    np.testing.assert_array_equal(model.classify(images, ["one", "two"]), first)
    with pytest.raises(AttributeError):
        model.classify(images, ["one", "three"])


@pytest.mark.parametrize(
    "image",
    [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3)), np.zeros((0, 8, 3), np.uint8)],
)
def test_an_invalid_array_is_refused_with_the_expected_form(model, image):
    with pytest.raises(DataError, match=r"expected uint8 \[H, W, 3\] in RGB, found"):
        model.encode_image([image])


def test_loading_something_else_says_what_to_do(tiny_run, tmp_path):
    run = tiny_run[0]
    with pytest.raises(ArtifactError, match=r"expected an export folder or an artifact.*clipress export RUN"):
        clipress.load(tmp_path)
    with pytest.raises(ArtifactError, match=r"found a run folder\. Choose one of its exports: .*int8"):
        clipress.load(run)
    shutil.copytree(run / "int8", tmp_path / "run" / "int8")
    with pytest.raises(ArtifactError, match=rf"int8 has not been exported.*clipress export {tmp_path / 'run'}"):
        clipress.load(tmp_path / "run" / "int8")


def test_the_number_of_threads_reaches_the_runtime(tiny_run, monkeypatch):
    seen = []
    monkeypatch.setitem(RUNTIMES, "onnxruntime", lambda path, n: seen.append(n) or open_session(path, n))
    clipress.load(tiny_run[0] / "int8", threads=2)
    assert seen == [2, 2]


def test_loading_and_classifying_imports_no_torch(tiny_run, tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    code = (
        "import sys, clipress\n"
        f"model = clipress.load({str(tiny_run[0] / 'int8')!r})\n"
        f"assert model.classify({str(tmp_path / 'red.png')!r}, labels=['red', 'blue']).shape == (2,)\n"
        "assert 'onnxruntime' in sys.modules\n"
        "heavy = {'torch', 'open_clip', 'modelopt', 'onnx', 'sklearn', 'click'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_importing_clipress_imports_nothing_heavy_and_lists_its_api():
    code = (
        "import sys, clipress\n"
        "assert not {'numpy', 'pydantic', 'torch', 'click'} & set(sys.modules)\n"
        "assert {'run', 'load', 'Run', 'LoadedModel', '__version__'} <= set(dir(clipress)) & set(clipress.__all__)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        clipress.lod  # noqa: B018


def test_an_unknown_runtime_is_an_error_and_openvino_gives_the_same_probabilities(tiny_run):
    export = tiny_run[0] / "export" / "pruned"
    with pytest.raises(RecipeError, match=r"runtime 'openvin' does not exist. Did you mean 'openvino'"):
        clipress.load(export, runtime="openvin")
    pytest.importorskip("openvino")
    models = [clipress.load(export, 1, runtime) for runtime in ("onnxruntime", "openvino")]
    a, b = (model.encode_text(["a red circle", "two"]) for model in models)
    np.testing.assert_allclose(a, b, atol=1e-5)
