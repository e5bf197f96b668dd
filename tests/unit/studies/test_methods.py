"""A study spells out its runs and gathers seeds as statistics says."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from helpers import write_recipe

import clipress
from clipress.errors import ArtifactError, RecipeError
from clipress.recipe import read_recipe
from clipress.studies.methods import (
    Case,
    StepCost,
    Study,
    _changed,
    _run,
    lost,
    markdown,
    picture,
    read_study,
    run_study,
    summary,
)

SHIPPED = sorted((Path(clipress.__file__).parent / "configs" / "studies").glob("*.yaml"))


@pytest.fixture
def study():
    prune = {"prune": {"steps": 1}}
    return Study(
        name="s",
        recipe="r.yaml",
        methods={"a": [prune], "b": [prune]},
        reference="a",
        ratios={"2x": 0.5},
        seeds=(0, 1),
    )


def row(method, seed, slimmed, recovered):
    def accuracy(r1):
        return {"scenes/text_r1": r1 + 1, "scenes/image_r1": r1 - 1, "digits/top1": 90.0}

    return {
        "method": method, "ratio": "2x", "seed": seed, "dense": accuracy(80.0), "slimmed": accuracy(slimmed),
        "final": accuracy(recovered), "macs": 5e6, "latency_of_dense": 0.5, "peak_memory_mb": 900,
    }  # fmt: skip


@pytest.fixture
def rows():
    return [row("a", 0, 40, 70), row("a", 1, 44, 72), row("b", 0, 70, 78), row("b", 1, 70, 79)]


def test_seeds_become_mean_and_standard_deviation(study, rows):
    a, b = summary(study, rows)
    assert a["r1_slimmed"] == pytest.approx((42, 8**0.5)) and a["lost_final"] == pytest.approx((9, 2**0.5))
    assert b["lost_slimmed"] == pytest.approx((10, 0)) and b["seeds"] == 2
    assert lost(rows[0], "slimmed") == 40


def test_the_table_says_what_part_of_the_references_loss_is_lost(study, rows):
    lines = markdown(study, rows, {"device": "x"}).splitlines()
    told = next(line for line in lines if line.startswith("| 2x | b |"))
    assert " 70.0 ± 0.0 | 78.5 ± 0.7 | 10.0 ± 0.0 | 1.5 ± 0.7 | 26% / 17% |" in told
    assert lines[-1] == "Conditions: device x."


def test_without_ratios_methods_are_compared_in_points_and_standard_deviations(study, rows):
    plain = study.model_copy(update={"ratios": {}})
    lines = markdown(plain, [row | {"ratio": None} for row in rows], {}).splitlines()
    # 78.5 against 71, spreads 0.7 and 1.4: pooled 1.118
    assert next(line for line in lines if line.startswith("| b |")).startswith(
        "| b | 2 | 78.5 ± 0.7 | +7.5 (+6.7 sd) |"
    )
    assert next(line for line in lines if line.startswith("| a |")).startswith("| a | 2 | 71.0 ± 1.4 | – |")


def test_step_costs_are_told_as_ratios_of_the_same_round(study, rows):
    study = study.model_copy(update={"step_cost": StepCost(reference="plain", cases={"plain": {}}, rounds=3)})
    cost = [{"case": "ours", "seconds": [0.2, 0.3, 0.4], "ratios": [1.1, 1.3, 1.2], "peak_memory_mb": 7}]
    assert "| ours | 0.300 | 1.20 (1.10–1.30) | 7 |" in markdown(study, rows, {}, cost).splitlines()


def test_a_finished_run_made_with_other_settings_is_refused(tiny_run, tmp_path):
    folder, _ = tiny_run
    recipe = read_recipe(folder / "recipe.yaml")
    (tmp_path / "m-2x-s0").symlink_to(folder)
    same = Case(method="m", ratio="2x", seed=0, recipe=recipe.model_dump())
    assert _run(same, tmp_path, 1) == tmp_path / "m-2x-s0"
    other = Case(method="m", ratio="2x", seed=0, recipe=recipe.model_copy(update={"seed": 7}).model_dump())
    with pytest.raises(ArtifactError, match="other settings"):
        _run(other, tmp_path, 1)


def test_a_case_changes_what_it_names_and_leaves_the_rest():
    base = {"teacher": {"recipe": 1}, "stages": [1], "data": {"train": 2, "workers": 0}}
    changed = _changed(base, {"teacher": {"cache": {"views": 2}}, "stages": [2], "data": {"workers": 4}})
    assert changed == {
        "teacher": {"recipe": 1, "cache": {"views": 2}}, "stages": [2], "data": {"train": 2, "workers": 4},
    }  # fmt: skip
    assert base["teacher"] == {"recipe": 1}


def test_a_whole_study_runs_finishes_and_times_its_steps(recipe, tmp_path):
    write_recipe(recipe, tmp_path)
    stages = recipe["stages"]
    study = {
        "name": "tiny", "recipe": "recipe-under-test.yaml", "reference": "a", "ratios": {"2x": 0.5}, "seeds": [0],
        "bench": recipe["bench"], "methods": {"a": stages[:2]},
        "step_cost": {"reference": "plain", "rounds": 1, "cases": {
            "plain": {"stages": [{"distill": {"losses": ["contrastive"], "steps": 6, "batch_size": 32}}]},
            "search": {"stages": stages[:1]},
        }},
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    table = run_study(tmp_path / "study.yaml", tmp_path / "runs", tmp_path / "out")
    assert "| 2x | a | 1 |" in table and "| plain |" in table and "1.00 (1.00–1.00)" in table
    kept = json.loads((tmp_path / "out" / "tiny.json").read_text())
    assert [row["case"] for row in kept["step_cost"]] == ["plain", "search"] and len(kept["rows"]) == 1
    assert kept["rows"][0]["block_params_kept"] <= 0.5
    assert run_study(tmp_path / "study.yaml", tmp_path / "runs", tmp_path / "out") == table  # nothing is done again


def test_the_picture_is_one_line_per_method(study, rows):
    drawn = ElementTree.fromstring(picture(study, rows))
    assert len(drawn.findall("{*}polyline")) == 2
    assert {"dense teacher", "a", "b"} <= {text.text for text in drawn.findall("{*}text")}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_studies_spell_out_valid_runs(path):
    from clipress.recipe import Recipe
    from clipress.workflow.plan import plan_from

    study, cases = read_study(path)
    assert len(cases) == len(study.methods) * len(study.seeds) * max(len(study.ratios), 1)
    assert len({case.name for case in cases}) == len(cases)
    for sections in study.step_cost.cases.values() if study.step_cost else ():
        plan_from(Recipe(**_changed(cases[0].recipe, sections)))
    for case in cases:
        plan = plan_from(Recipe(**case.recipe))
        if study.ratios:
            assert plan.artifacts == ["teacher", "pruned", "recovered"]
            assert plan.stages[0].settings.budget.params == study.ratios[case.ratio]
        assert plan.recipe.seed == case.seed
    teachers = [case.recipe["teacher"] for case in cases]
    assert all(teacher == teachers[0] for teacher in teachers)  # the same one for every method and seed


def test_a_study_with_an_unknown_key_is_told(tmp_path):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"name": "x", "methds": {}}))
    with pytest.raises(RecipeError, match="Did you mean 'methods'"):
        read_study(tmp_path / "s.yaml")
