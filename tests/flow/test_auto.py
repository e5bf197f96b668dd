"""`clipress auto` finds a model that holds the line, leaves a run that can be run again, and says when there is none."""

import json

import pytest
import yaml
from helpers import RECIPE, clipress

from clipress.artifact import read_header
from clipress.recipe import read_recipe


@pytest.fixture(scope="module")
def model(tiny_run):
    return tiny_run[0] / "teacher"


@pytest.fixture
def data(tmp_path):
    """A recipe, of which only the data and how to export and measure count."""
    path = tmp_path / "data.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def found_in(out):
    results = json.loads((out / "bench" / "results.json").read_text())
    return results["rows"][0], results["rows"][-1]


def test_a_size_is_met_by_the_most_accurate_model_within_it(model, data, tmp_path):
    out = tmp_path / "found"
    words = ["--target", "params<=7M", "--no-int8", "--tries", 3, "--vocabulary"]
    result = clipress("auto", model, "--data", data, *words, "--out", out)
    assert result.exit_code == 0, (result.output, result.exception)
    teacher, last = found_in(out)
    assert last["params"] <= 7e6 < teacher["params"] or teacher["params"] <= 7e6
    assert "Found: " in result.output and "try 1: uncut" in result.output
    again = clipress("run", out / "recipe.yaml", "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    stage = read_recipe(out / "recipe.yaml").stages[-1]
    name = "pruned" if "prune" in stage else "int8"
    weights = [read_header(folder / name)["weights_sha256"] for folder in (out, tmp_path / "again")]
    assert weights[0] == weights[1]  # The recipe makes the same model.


def test_a_smaller_target_cuts_blocks_and_calibrates(model, data, tmp_path):
    dense = read_header(model)["counts"]["params"]
    out = tmp_path / "found"
    limit = f"params<={dense - 3000}"
    result = clipress("auto", model, "--data", data, "--target", limit, "--tries", 3, "--out", out)
    assert result.exit_code == 0, (result.output, result.exception)
    teacher, last = found_in(out)
    assert last["params"] <= dense - 3000 and last["block_params"] < teacher["block_params"]
    assert f"{limit}: " in result.output
    assert (out / "triton" / "python").is_dir()


def test_an_accuracy_line_that_everything_holds_gives_the_smallest_model(model, data, tmp_path):
    out = tmp_path / "found"
    words = ["--max-accuracy-drop", 100, "--no-int8", "--steps", 2]
    result = clipress("auto", model, "--data", data, *words, "--out", out)
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.output.count("points lost: holds") == 3  # uncut, and the smallest budget without recovery and with it
    _, last = found_in(out)
    assert last["block_params_kept"] < 0.5


def test_a_target_that_nothing_meets_names_the_nearest_model(model, data, tmp_path):
    words = ["--target", "params<=1K", "--no-int8"]
    result = clipress("auto", model, "--data", data, *words, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "no model holds the line. The nearest one: " in result.output
    assert "Traceback" not in result.output and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Set --target, --max-accuracy-drop or both"),
        (["--target", "speed<=5ms"], "unknown figure 'speed'"),
    ],
)
def test_a_request_without_a_line_is_refused(model, data, tmp_path, words, message):
    result = clipress("auto", model, "--data", data, *words, "--out", tmp_path / "out")
    assert result.exit_code == 2 and message in result.output


def test_a_folder_with_a_run_in_it_is_refused_before_any_try(model, data, tiny_run):
    result = clipress("auto", model, "--data", data, "--target", "size<=1MB", "--out", tiny_run[0])
    assert result.exit_code == 2 and "holds a run already" in result.output


@pytest.mark.parametrize(("name", "message"), [("ViT-B-32", "NAME:TAG"), (".", "is not an artifact")])
def test_a_model_that_is_neither_a_folder_nor_a_name_is_refused(data, tmp_path, name, message):
    result = clipress("auto", name, "--data", data, "--target", "size<=1MB", "--out", tmp_path / "out")
    assert result.exit_code == 2 and message in result.output


def test_a_vocabulary_that_the_validation_texts_do_not_fit_is_reported(model, tmp_path):
    """Trained on digits alone, the words of the scenes are gone, so not even the uncut model keeps its accuracy."""
    sections = RECIPE | {"data": {**RECIPE["data"], "train": [{"format": "digits", "limit": 96}]}}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(sections))
    words = ["--max-accuracy-drop", 0, "--no-int8", "--vocabulary"]
    result = clipress("auto", model, "--data", tmp_path / "data.yaml", *words, "--out", tmp_path / "out")
    assert result.exit_code == 2, (result.output, result.exception)
    assert "no model holds the line. The nearest one: uncut" in result.output
