"""Commands that take a run use what bench kept, unless an artifact is named, and say so."""

import json
import shutil
import sys

import pytest
from helpers import clipress
from PIL import Image

from clipress.artifact import read_header
from clipress.errors import RecipeError
from clipress.workflow.kept import Choice, choose_artifact, choose_exported, results_of
from clipress.workflow.plan import read_plan


def kept(run, artifact, runtime="onnxruntime", preferred=True):
    """Return what results.json would say of an artifact that is kept of int8."""
    hashes = {name: read_header(run / name)["lineage"][-1]["hash"] for name in (artifact, "int8")}
    return {
        "backend": runtime,
        "artifact": artifact,
        "hash": hashes[artifact],
        "of": "int8",
        "of_hash": hashes["int8"],
        "preferred": preferred,
        "text": "",
    }


def keep(run, *entries):
    path = results_of(run)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kept": list(entries)}))


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy of the tiny run, of which bench kept the sparse artifact."""
    run = shutil.copytree(tiny_run[0], tmp_path / "run", ignore=shutil.ignore_patterns("triton"))
    keep(run, kept(run, "sparse"))
    return run


@pytest.fixture
def image(tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def choose(run, stage=None, runtime=None):
    said = []
    chosen = choose_artifact(run, read_plan(run), stage, said.append, "Using", runtime)
    return chosen, said


def test_what_bench_kept_is_chosen_and_said_in_one_line(run):
    line = f"Using sparse instead of int8, as {run}/bench/results.json recommends. Override: --stage int8"
    assert choose(run) == (Choice("sparse"), [line])


def test_a_named_artifact_is_chosen_silently_and_an_unknown_one_is_an_error(run):
    assert choose(run, "pruned") == (Choice("pruned"), [])
    with pytest.raises(RecipeError, match="no such artifact"):
        choose(run, "prund")


def test_nothing_is_said_where_the_last_artifact_was_kept(run):
    keep(run, kept(run, "int8"))
    assert choose(run) == (Choice("int8"), [])


def test_without_measurements_or_with_those_of_other_artifacts_the_last_one_is_chosen(run):
    keep(run, kept(run, "sparse") | {"of_hash": "other"})
    assert choose(run) == (Choice("int8"), [])
    results_of(run).unlink()
    assert choose(run) == (Choice("int8"), [])


def test_the_preferred_runtime_is_chosen_unless_the_command_has_its_own(run):
    keep(run, kept(run, "sparse", preferred=False), kept(run, "int8", "openvino"))
    chosen, (line,) = choose(run)
    assert chosen == Choice("int8", "openvino") and line.startswith("Using int8 in openvino, as ")
    chosen, (line,) = choose(run, runtime="onnxruntime")
    assert chosen == Choice("sparse") and line.startswith("Using sparse instead of int8, as ")
    assert choose(run, "pruned") == (Choice("pruned"), [])


def test_runners_that_serve_nothing_do_not_choose(run):
    keep(run, kept(run, "sparse", "torch"))
    assert choose(run) == (Choice("int8"), [])


def test_predict_uses_what_is_kept_and_its_output_stays_clean(run, image):
    shutil.rmtree(run / "export" / "int8")
    result = clipress("predict", run, image, "--labels", "a,b", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["probabilities"].keys() == {"a", "b"}
    assert result.stderr.startswith("Predicting with sparse instead of int8, as ")
    result = clipress("predict", run, image, "--labels", "a,b", "--stage", "int8")
    assert result.exit_code == 2 and "has not been exported" in result.stderr


def test_predict_runs_in_openvino_where_bench_preferred_it(run, image, monkeypatch):
    pytest.importorskip("openvino")
    keep(run, kept(run, "sparse", "openvino"))
    found = [
        json.loads(clipress("predict", run, image, "--labels", "a,b", "--json", *options).stdout)["probabilities"]
        for options in ((), ("--runtime", "onnxruntime", "--stage", "sparse"))
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    monkeypatch.setitem(sys.modules, "openvino", None)
    result = clipress("predict", run, image, "--labels", "a,b")
    assert result.exit_code == 2 and "clipress[openvino]" in result.stderr and "choose onnxruntime" in result.stderr


def test_eval_evaluates_what_is_kept(run):
    result = clipress("eval", run, "--json", run / "figures.json")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("Evaluating sparse instead of int8, as ")
    assert json.loads((run / "figures.json").read_text())["stage"] == "sparse"


def test_export_exports_what_is_kept_or_all_where_nothing_is(run):
    plan, said = read_plan(run), []
    assert choose_exported(run, plan, (), False, said.append) == ["sparse"] and len(said) == 1
    assert choose_exported(run, plan, (), True, said.append) == plan.artifacts
    assert choose_exported(run, plan, ("pruned", "int8"), False, said.append) == ["pruned", "int8"]
    results_of(run).unlink()
    assert choose_exported(run, plan, (), False, said.append) == plan.artifacts and len(said) == 1


def test_the_export_command_says_what_it_exports_and_has_a_way_to_export_all(run):
    result = clipress("export", run)
    assert result.exit_code == 0 and result.output.startswith("Exporting sparse, which ")
    assert result.output.count("already exported") == 1
    assert clipress("export", run, "--all").output.count("already exported") == 5
    result = clipress("export", run, "--all", "--stage", "int8")
    assert result.exit_code == 2 and "--all and --stage cannot be combined" in result.output
