"""A corrected recipe continues in its run folder if no finished stage depends on the correction."""

import shutil

import pytest
from helpers import SHORT, clipress, write_recipe

from clipress.artifact import read_header
from clipress.recipe import read_recipe


@pytest.fixture
def run(tiny_run, tmp_path):
    """The artifacts and the recipe of a finished run."""
    folder = tmp_path / "run"
    shutil.copytree(tiny_run[0], folder, ignore=shutil.ignore_patterns("export", "bench", "triton"))
    return folder


def hashes(run):
    return {path.parent.name: read_header(path.parent)["lineage"][-1]["hash"] for path in run.glob("*/clipress.json")}


def reused(done):
    """Return the stages that a command reused."""
    return [stage for stage in ("pruned", "recovered", "sparse", "int8") if f"\n{stage}: reused" in done.output]


def test_a_typo_that_failed_the_first_stage_can_be_corrected_in_the_same_folder(recipe, tmp_path):
    recipe["stages"] = [{"distill": SHORT}]
    good = recipe["data"]["train"]
    recipe["data"]["train"] = [{"format": "csv", "annotations": str(tmp_path / "piars.csv")}]
    failed = clipress("compress", write_recipe(recipe, tmp_path), "--out", tmp_path / "run")
    assert failed.exit_code == 2 and "piars.csv" in failed.output and (tmp_path / "run" / "recipe.yaml").is_file()
    recipe["data"]["train"] = good
    done = clipress("compress", write_recipe(recipe, tmp_path), "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert "replaced, since data changed and no finished stage depends on it" in done.output
    assert read_recipe(tmp_path / "run" / "recipe.yaml").data == recipe["data"]


def test_sections_after_all_stages_may_change_at_any_time(recipe, run, tmp_path):
    before = hashes(run)
    recipe["bench"]["batch"] = [1]
    recipe["serve"]["max_batch"] = 2
    recipe["data"]["test"] = recipe["data"]["test"][:1]
    done = clipress("compress", write_recipe(recipe, tmp_path), "--out", run)
    assert done.exit_code == 0, done.output
    assert len(reused(done)) == 4 and hashes(run) == before
    assert read_recipe(run / "recipe.yaml").bench["batch"] == [1]


def test_an_unfinished_stage_may_change_and_finished_stages_are_kept(recipe, run, tmp_path):
    shutil.rmtree(run / "int8")
    before = hashes(run)
    recipe["stages"][3]["quantize"]["lr"] = 1e-5
    done = clipress("compress", write_recipe(recipe, tmp_path), "--out", run)
    assert done.exit_code == 0, done.output
    assert reused(done) == ["pruned", "recovered", "sparse"]
    after = hashes(run)
    assert after.keys() - before.keys() == {"int8"} and after.items() >= before.items()


def test_spelling_out_defaults_does_not_change_a_stage(recipe, run, tmp_path):
    recipe["stages"][3]["quantize"]["portable"] = True
    done = clipress("compress", write_recipe(recipe, tmp_path), "--out", run)
    assert done.exit_code == 0 and len(reused(done)) == 4


def test_stages_that_depend_on_a_change_are_named_and_nothing_is_modified(recipe, run, tmp_path):
    before = hashes(run)
    recipe["stages"][1]["distill"]["lr"] = 3e-4
    refused = clipress("compress", write_recipe(recipe, tmp_path), "--out", run)
    assert refused.exit_code == 2
    for words in ("recovered depends on stages.1", "sparse depends on stages.1", "int8 depends on stages.1", "--fresh"):
        assert words in refused.output
    assert "pruned depends" not in refused.output and hashes(run) == before


def test_removing_the_named_folder_is_enough(recipe, run, tmp_path):
    recipe["stages"][3]["quantize"]["steps"] = 1
    refused = clipress("compress", write_recipe(recipe, tmp_path), "--out", run)
    assert refused.exit_code == 2 and f"or remove {run / 'int8'}." in refused.output
    shutil.rmtree(run / "int8")
    assert clipress("compress", write_recipe(recipe, tmp_path), "--out", run).exit_code == 0


def test_fresh_reruns_a_changed_recipe(recipe, run, tmp_path):
    before = hashes(run)
    recipe["stages"] = recipe["stages"][:1]
    recipe["seed"] = 1
    done = clipress("compress", write_recipe(recipe, tmp_path), "--out", run, "--fresh")
    assert done.exit_code == 0, done.output
    assert hashes(run)["pruned"] != before["pruned"]


def test_a_changed_teacher_replaces_the_previous_copy(recipe, run, tmp_path):
    for stage in ("pruned", "recovered", "sparse", "int8"):
        shutil.rmtree(run / stage)
    before = hashes(run)["teacher"]
    recipe["teacher"]["recipe"]["stages"][0]["distill"]["steps"] = 5
    recipe["stages"] = recipe["stages"][:1]
    assert clipress("compress", write_recipe(recipe, tmp_path), "--out", run).exit_code == 0
    assert hashes(run)["teacher"] != before
