"""User mistakes on the command line: one message, exit code 2, no traceback, no data lost."""

import json
import shutil

import pytest
from helpers import clipress, write_recipe
from PIL import Image

from clipress.models.tiny import tiny_architecture


def assert_refused(result, *words):
    assert result.exit_code == 2, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.output, result.output


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_unknown_key_is_reported_before_any_work(recipe, tmp_path):
    recipe["stages"][1]["distill"]["loses"] = []
    assert_refused(clipress("run", write_recipe(recipe, tmp_path), "--out", tmp_path / "run"), "'loses'", "losses")
    assert not (tmp_path / "run").exists()


def test_an_impossible_order_of_stages_is_reported(recipe, tmp_path):
    recipe["stages"].reverse()
    assert_refused(
        clipress("run", write_recipe(recipe, tmp_path), "--out", tmp_path / "run"),
        "cannot come after",
        "Use the order distill -> prune",
    )


def test_an_error_in_a_later_section_is_reported_before_any_work(recipe, tmp_path):
    recipe["serve"]["max_batch"] = 0
    assert_refused(clipress("run", write_recipe(recipe, tmp_path), "--out", tmp_path / "run"), "serve.max_batch")
    assert not (tmp_path / "run").exists()


def test_a_missing_recipe_is_reported(tmp_path):
    assert_refused(clipress("run", tmp_path / "nowhere.yaml"), "no such file")
    assert_refused(clipress("run", "demoo"), "Did you mean 'demo'")


def test_a_missing_or_truncated_teacher_is_reported(recipe, tmp_path, tiny_run):
    recipe["teacher"] = {"artifact": str(tmp_path / "teacher")}
    path = write_recipe(recipe, tmp_path)
    assert_refused(clipress("compress", path, "--out", tmp_path / "run"), "clipress.json")
    shutil.copytree(tiny_run[0] / "teacher", tmp_path / "teacher")
    weights = tmp_path / "teacher" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert_refused(clipress("compress", path, "--out", tmp_path / "run"), "truncated")


def test_the_folder_of_a_different_run_is_left_alone(recipe, tmp_path, tiny_run):
    run, _ = tiny_run
    before = snapshot(run)
    recipe["seed"] = 1
    refused = clipress("run", write_recipe(recipe, tmp_path), "--out", run)
    assert_refused(refused, "pruned depends on seed", "int8 depends on seed", "--out", "--fresh", f"{run / 'int8'}")
    assert snapshot(run) == before


def test_a_folder_with_other_files_is_left_alone(recipe, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("a note")
    assert_refused(
        clipress("compress", write_recipe(recipe, tmp_path), "--out", tmp_path / "mine"), "expected an empty folder"
    )
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_file_that_is_not_an_image_is_reported(tmp_path, tiny_run):
    (tmp_path / "note.png").write_text("not an image")
    assert_refused(
        clipress("predict", tiny_run[0], tmp_path / "note.png", "--labels", "a,b"), "note.png", "not a readable image"
    )
    assert_refused(clipress("predict", tiny_run[0], tmp_path / "gone.png", "--labels", "a,b"), "no such file")


@pytest.mark.parametrize("content", ["", "\n  \n"])
def test_an_empty_label_file_is_reported(tmp_path, tiny_run, content):
    Image.new("RGB", (32, 32)).save(tmp_path / "x.png")
    (tmp_path / "labels.txt").write_text(content)
    assert_refused(
        clipress("predict", tiny_run[0], tmp_path / "x.png", "--labels-file", tmp_path / "labels.txt"),
        "labels.txt",
        "holds no label",
    )


@pytest.mark.parametrize("command", ["export", "bench", "bench-server", "serve", "triton", "eval"])
def test_a_missing_run_folder_is_reported(tmp_path, command):
    assert_refused(clipress(command, tmp_path / "nowhere"), "no such folder", "clipress compress")


def test_an_unknown_stage_is_reported(tiny_run):
    assert_refused(clipress("serve", tiny_run[0], "--stage", "prunned"), "Did you mean 'pruned'")


def test_a_missing_version_of_a_repository_is_reported(tiny_run):
    assert_refused(
        clipress("serve", tiny_run[0], "--backend", "python", "--version", "9"),
        "expected version 9",
        "clipress serve RUN",
    )


def test_serving_a_missing_engine_is_refused(tiny_run):
    assert_refused(
        clipress("serve", tiny_run[0], "--backend", "tensorrt"), "engines found: none", "export RUN --tensorrt"
    )


def test_predicting_before_exporting_is_refused(tiny_run, tmp_path):
    shutil.copytree(tiny_run[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "export")
    assert_refused(clipress("predict", tmp_path / "run", "x.png", "--labels", "a,b"), "clipress export")


def test_an_export_with_a_damaged_file_is_not_served(tiny_run, tmp_path):
    shutil.copytree(tiny_run[0], tmp_path / "run")
    path = tmp_path / "run" / "export" / "int8" / "image.onnx"
    path.write_bytes(path.read_bytes()[:-50])
    from clipress.errors import ClipressError
    from clipress.serve.settings import ServeSettings
    from clipress.serve.triton_repo import triton_repo_from_export

    with pytest.raises(ClipressError, match=r"image\.onnx"):
        triton_repo_from_export(path.parent, tmp_path / "repo", ServeSettings())


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    import pickle

    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "model.pth").write_bytes(pickle.dumps({"model": Payload()}))
    assert_refused(clipress("import", tmp_path / "model.pth", tmp_path / "out"), "model.pth")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_import_does_not_replace_a_folder_with_other_files(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("a note")
    assert_refused(clipress("import", tmp_path / "model.pth", tmp_path / "out"), "is not an artifact")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "a note"


def test_a_template_without_labels_is_refused(tiny_run):
    assert_refused(clipress("export", tiny_run[0], "--template", "a photo of a {}"), "--template", "add --labels")
    assert not list((tiny_run[0] / "export").rglob("classifier.onnx"))


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x08\x09"])
def test_an_invalid_onnx_file_is_reported(tmp_path, content):
    (tmp_path / "image.onnx").write_bytes(content)
    assert_refused(clipress("export", tmp_path / "image.onnx", "--tensorrt"), "image.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["image.onnx"]


def test_a_foreign_onnx_file_in_an_export_is_not_benchmarked(tiny_run, tmp_path):
    import json
    import shutil

    import onnx
    from onnx import TensorProto, helper

    from clipress.storage import sha256

    run = shutil.copytree(tiny_run[0], tmp_path / "run")
    takes, gives = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 8]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [takes], [gives])
    path = run / "export" / "int8" / "image.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    about = json.loads((path.parent / "export.json").read_text())
    about["files"]["image"] |= {"sha256": sha256(path), "bytes": path.stat().st_size}
    (path.parent / "export.json").write_text(json.dumps(about))
    assert_refused(
        clipress("bench", run, "--stage", "int8", "--no-accuracy"),
        "image.onnx does not have the inputs and outputs of graph 'image'",
    )


def recipe_calibrated_on(recipe, tmp_path, teacher, colours):
    """Write a recipe that quantizes a teacher, calibrated on one-colour images."""
    (tmp_path / "images" / "one").mkdir(parents=True)
    for number, colour in enumerate(colours):
        Image.new("RGB", (32, 32), colour).save(tmp_path / "images" / "one" / f"{number}.png")
    recipe["teacher"] = {"artifact": str(teacher)}
    recipe["data"] = {"train": [{"format": "folder", "images": str(tmp_path / "images")}]}
    recipe["stages"] = [{"quantize": {"calibrate": 8, "batch_size": 8, "steps": 0}}]
    return write_recipe(recipe, tmp_path)


@pytest.mark.parametrize(("colours", "words"), [([], "no usable records"), (["red"] * 16, "found 8 identical ones")])
def test_empty_or_constant_calibration_data_are_refused(recipe, tmp_path, tiny_run, colours, words):
    path = recipe_calibrated_on(recipe, tmp_path, tiny_run[0] / "recovered", colours)
    assert_refused(clipress("compress", path, "--out", tmp_path / "run"), words)
    assert not (tmp_path / "run" / "int8").exists()


@pytest.fixture
def broken(tiny_run, tmp_path):
    """An otherwise valid artifact with a NaN weight."""
    from clipress.artifact import save_artifact
    from clipress.models.load import artifact_from_model
    from clipress.tasks import model_from_artifact

    model = model_from_artifact(tiny_run[0] / "recovered")
    model.module.visual.conv1.weight.data[0, 0, 0, 0] = float("nan")
    return save_artifact(artifact_from_model(model, ({"stage": "x", "hash": "abc"},), {}), tmp_path / "broken")


def test_a_model_with_nan_weights_is_not_compressed(recipe, tmp_path, broken):
    path = recipe_calibrated_on(recipe, tmp_path, broken, ["red", "blue"] * 8)
    assert_refused(clipress("compress", path, "--out", tmp_path / "run"), "not finite", "visual.conv1.weight")
    assert not (tmp_path / "run" / "int8").exists()


@pytest.mark.parametrize("command", ["export", "bench"])
def test_nan_weights_are_named_before_anything_is_exported(tiny_run, tmp_path, broken, command):
    import shutil

    run = shutil.copytree(tiny_run[0], tmp_path / "run")
    shutil.rmtree(run / "recovered")
    shutil.copytree(broken, run / "recovered")
    assert_refused(
        clipress(command, run, "--stage", "recovered"), "not numbers (NaN): visual.conv1.weight. Nothing was written"
    )


def test_predict_goes_on_without_a_damaged_image(tmp_path, tiny_run):
    for number in range(3):
        Image.effect_noise((64, 64), 60 + number).convert("RGB").save(tmp_path / f"{number}.png")
    whole = clipress("predict", tiny_run[0], tmp_path / "0.png", tmp_path / "2.png", "--labels", "a,b", "--json")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:500])
    given = [tmp_path / f"{number}.png" for number in range(3)]
    found = clipress("predict", tiny_run[0], *given, "--labels", "a,b", "--json")
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert [line for line in lines if "error" not in line] == [json.loads(line) for line in whole.stdout.splitlines()]
    assert [line["image"] for line in lines if "error" in line] == [str(tmp_path / "1.png")]
    assert found.exit_code == 2 and "1 of 3 images could not be read" in found.stderr


def test_predict_decodes_every_image_once(tmp_path, tiny_run, monkeypatch):
    for number in range(40):  # more than a batch
        Image.effect_noise((64, 64), 10 + number).convert("RGB").save(tmp_path / f"{number:02}.png")
    opened, open_file = [], Image.open
    monkeypatch.setattr(
        Image, "open", lambda file, *args, **more: opened.append(str(file)) or open_file(file, *args, **more)
    )
    found = clipress("predict", tiny_run[0], tmp_path, "--labels", "a,b", "--json")
    assert found.exit_code == 0, found.output
    named = [json.loads(line)["image"] for line in found.stdout.splitlines()]
    assert opened == named == [str(tmp_path / f"{number:02}.png") for number in range(40)]


def test_a_learning_rate_that_is_far_too_high_is_one_message(recipe, tmp_path):
    recipe |= {"student": tiny_architecture(layers=1), "runtime": {"precision": "bf16"}}
    recipe["stages"] = [{"distill": {"losses": ["contrastive"], "lr": 1e30, "steps": 60, "batch_size": 2}}]
    del recipe["teacher"]
    assert_refused(
        clipress("compress", write_recipe(recipe, tmp_path), "--out", tmp_path / "run"),
        "distilled: contrastive was not finite for 20 steps in a row", "Lower 'lr' (now 1e+30)",
    )  # fmt: skip
