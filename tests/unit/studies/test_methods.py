"""A study lists its runs and summarises seeds; committed tables match committed figures."""

import json
import math
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from helpers import write_recipe

import clipress
from clipress.errors import ArtifactError, RecipeError
from clipress.recipe import read_recipe
from clipress.studies import every_cpu, faults, gpu, serving, speed
from clipress.studies.chart import draw_chart
from clipress.studies.methods import merge_sections, read_study, row_of, run_case, run_study, time_alone
from clipress.studies.study import Case, Sized, StepCost, Study, StudyRow, TimedSteps
from clipress.studies.table import Point, at_latency, front, lost, markdown, points, summary

SHIPPED = sorted((Path(clipress.__file__).parent / "configs" / "studies").glob("*.yaml"))
TABLES = Path(clipress.__file__).parent / "studies"


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

    return StudyRow(
        method=method,
        ratio="2x",
        seed=seed,
        dense=accuracy(80.0),
        slimmed=accuracy(slimmed),
        final=accuracy(recovered),
        macs=5e6,
        latency_of_dense=0.5,
        peak_memory_mb=900,
    )


@pytest.fixture
def rows():
    return [row("a", 0, 40, 70), row("a", 1, 44, 72), row("b", 0, 70, 78), row("b", 1, 70, 79)]


def test_seeds_become_mean_and_standard_deviation(study, rows):
    a, b = summary(study, rows)
    assert a["r1_slimmed"] == pytest.approx((42, 8**0.5)) and a["lost_final"] == pytest.approx((9, 2**0.5))
    assert b["lost_slimmed"] == pytest.approx((10, 0)) and b["seeds"] == 2
    assert lost(rows[0], "slimmed") == 40


def test_the_table_compares_recovered_models_with_the_reference(study, rows):
    lines = markdown(study, rows, {"device": "x"}).splitlines()
    found = next(line for line in lines if line.startswith("| 2x | b |"))
    # 78.5 against 71 with spreads 0.7 and 1.4, pooled 1.118.
    assert " 70.0 ± 0.0 | 78.5 ± 0.7 | 10.0 ± 0.0 | 1.5 ± 0.7 | +7.5 (+6.7 sd) |" in found
    assert lines[-1] == "Conditions: device x."


def test_without_ratios_methods_are_compared_in_points_and_standard_deviations(study, rows):
    plain = study.model_copy(update={"ratios": {}})
    lines = markdown(plain, [row.model_copy(update={"ratio": None}) for row in rows], {}).splitlines()
    # 78.5 against 71 with spreads 0.7 and 1.4, pooled 1.118.
    assert next(line for line in lines if line.startswith("| b |")).startswith(
        "| b | 2 | 78.5 ± 0.7 | +7.5 (+6.7 sd) |"
    )
    assert next(line for line in lines if line.startswith("| a |")).startswith("| a | 2 | 71.0 ± 1.4 | – |")


def test_a_study_without_classes_has_a_dash_for_top1(study, rows):
    bare = {"scenes/text_r1": 70.0, "scenes/image_r1": 72.0}
    rows = [row.model_copy(update={"dense": bare, "slimmed": bare, "final": bare}) for row in rows]
    lines = markdown(study, rows, {}).splitlines()
    assert "| – | – | – | 5.0 ± 0.0 |" in next(line for line in lines if line.startswith("| 2x | b |"))
    assert "zero-shot" not in "".join(lines)


def test_ratios_have_the_unit_of_the_study_and_keep_what_else_the_budget_says(tmp_path, recipe):
    write_recipe(recipe, tmp_path)
    prune = {"criterion": "upop", "steps": 1, "budget": {"upop_attention": 12}}
    study = {
        "name": "s", "recipe": "recipe-under-test.yaml", "methods": {"a": [{"prune": prune}]}, "reference": "a",
        "ratios": {"4x": 0.25}, "unit": "upop", "seeds": [0],
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    _, (case,) = read_study(tmp_path / "study.yaml")
    assert case.recipe["stages"][0]["prune"]["budget"] == {"upop_attention": 12, "upop": 0.25}


def test_step_costs_are_ratios_within_a_round(study, rows):
    study = study.model_copy(update={"step_cost": StepCost(reference="plain", cases={"plain": {}}, rounds=3)})
    cost = [TimedSteps(case="ours", seconds=[0.2, 0.3, 0.4], ratios=[1.1, 1.3, 1.2], peak_memory_mb=7)]
    assert "| ours | 0.300 | 1.20 (1.10–1.30) | 7 |" in markdown(study, rows, {}, cost).splitlines()


def test_a_finished_run_made_with_other_settings_is_refused(tiny_run, tmp_path):
    folder, _ = tiny_run
    recipe = read_recipe(folder / "recipe.yaml")
    (tmp_path / "m-2x-s0").symlink_to(folder)
    same = Case(method="m", ratio="2x", seed=0, recipe=recipe.model_dump())
    assert run_case(same, tmp_path, 1) == tmp_path / "m-2x-s0"
    other = Case(method="m", ratio="2x", seed=0, recipe=recipe.model_copy(update={"seed": 7}).model_dump())
    with pytest.raises(ArtifactError, match="other settings"):
        run_case(other, tmp_path, 1)


def test_a_case_changes_only_the_settings_it_names():
    base = {"teacher": {"recipe": 1}, "stages": [1], "data": {"train": 2, "workers": 0}}
    changed = merge_sections(base, {"teacher": {"cache": {"views": 2}}, "stages": [2], "data": {"workers": 4}})
    assert changed == {
        "teacher": {"recipe": 1, "cache": {"views": 2}}, "stages": [2], "data": {"train": 2, "workers": 4},
    }  # fmt: skip
    assert base["teacher"] == {"recipe": 1}


def test_a_study_runs_resumes_and_times_its_steps(recipe, tmp_path):
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
    assert run_study(tmp_path / "study.yaml", tmp_path / "runs", tmp_path / "out") == table  # Nothing is repeated.


def test_the_chart_is_one_line_per_method_and_precision(study, rows):
    drawn = ElementTree.fromstring(draw_chart(study, rows))
    assert len(drawn.findall("{*}polyline")) == 2
    assert {"dense teacher", "a", "b"} <= {text.text for text in drawn.findall("{*}text")}
    both = ElementTree.fromstring(draw_chart(study, in_int8(rows)))
    assert len(both.findall("{*}polyline")) == 4
    tips = [tip.text for tip in both.iter() if tip.tag.endswith("title")]
    assert "b, 2x, int8: 0.250 of dense, R@1 77.5" in tips


def in_int8(rows):
    """The same rows, each with an INT8 artifact that loses a point and is twice as fast."""
    return [
        row.model_copy(
            update={
                "int8": {key: value - 1 for key, value in row.final.items()},
                "int8_latency_of_dense": row.latency_of_dense / 2,
            }
        )
        for row in rows
    ]


def test_int8_is_a_point_and_a_line_of_the_table(study, rows):
    found = points(study, in_int8(rows))
    assert [(p.method, p.precision, p.latency) for p in found] == [
        ("a", "fp32", 0.5), ("a", "int8", 0.25), ("b", "fp32", 0.5), ("b", "int8", 0.25),
    ]  # fmt: skip
    text = markdown(study, in_int8(rows), {})
    assert "Pareto front, fastest first, latency and R@1: b 2x int8 (0.250: 77.5), b 2x fp32 (0.500: 78.5)." in text
    assert "| 77.5 ± 0.7 |" in text and "Pareto" not in markdown(study, rows, {})


def test_the_front_has_what_nothing_beats_in_both():
    def point(latency, r1):
        return Point("m", "2x", "fp32", latency, r1)

    best = [point(0.2, 50), point(0.4, 70), point(0.9, 90)]
    assert front([point(0.5, 60), *reversed(best), point(0.4, 65), point(1.0, 90)]) == best


def test_accuracy_at_a_latency_lies_between_its_neighbours():
    line = [Point("m", "2x", "fp32", 0.4, 90.0), Point("m", "8x", "fp32", 0.1, 70.0)]
    assert at_latency(line, 0.2) == pytest.approx(80.0)  # Half way, by the logarithm.
    assert at_latency(line, 0.4) == pytest.approx(90.0)
    assert math.isnan(at_latency(line, 0.05)) and math.isnan(at_latency(line[:1], 0.4))


def test_a_method_with_students_has_a_run_per_student_and_no_budget(tmp_path, recipe):
    write_recipe(recipe, tmp_path)
    student = {"inherit": {"image": {"layers": 1}}}
    study = {
        "name": "s", "recipe": "recipe-under-test.yaml", "reference": "a", "ratios": {"2x": 0.5, "4x": 0.25}, "seeds": [0],
        "methods": {
            "a": [{"prune": {"steps": 1}}],
            "b": {"students": {"4x": student}, "stages": [{"distill": {"steps": 1}}]},
        },
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    _, cases = read_study(tmp_path / "study.yaml")
    assert [case.name for case in cases] == ["a-2x-s0", "a-4x-s0", "b-4x-s0"]
    assert cases[-1].recipe["student"] == student and cases[0].recipe["student"] is None


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_studies_expand_to_valid_runs(path):
    from clipress.recipe import Recipe
    from clipress.workflow.plan import plan_from

    study, cases = read_study(path)
    ratios = [
        len(how.students) if isinstance(how, Sized) else max(len(study.ratios), 1) for how in study.methods.values()
    ]
    assert len(cases) == sum(ratios) * len(study.seeds)
    assert len({case.name for case in cases}) == len(cases)
    for sections in study.step_cost.cases.values() if study.step_cost else ():
        plan_from(Recipe(**merge_sections(cases[0].recipe, sections)))
    for case in cases:
        plan = plan_from(Recipe(**case.recipe))
        if isinstance(study.methods[case.method], Sized):
            assert plan.artifacts[:2] == ["teacher", "distilled"] and plan.recipe.student
        elif study.ratios:
            assert plan.artifacts[:2] == ["teacher", "pruned"]
            budget = plan.stages[0].settings.budget
            assert (budget.unit, getattr(budget, study.unit)) == (study.unit, study.ratios[case.ratio])
        assert plan.recipe.seed == case.seed
    teachers = [case.recipe["teacher"] for case in cases]
    assert all(teacher == teachers[0] for teacher in teachers)  # Every method and seed has the same teacher.


def test_an_unknown_key_in_a_study_is_reported(tmp_path):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"name": "x", "methds": {}}))
    with pytest.raises(RecipeError, match="Did you mean 'methods'"):
        read_study(tmp_path / "s.yaml")


def without_notes(text):
    """Return a table without its handwritten notes."""
    return [line for line in text.splitlines() if line and not line.startswith("> ")]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_committed_table_and_chart_of_a_study_follow_from_its_figures(path):
    study, _ = read_study(path)
    found = json.loads((TABLES / f"{study.name}.json").read_text())
    rows, cost = [StudyRow(**row) for row in found["rows"]], [TimedSteps(**row) for row in found["step_cost"]]
    made = markdown(study, rows, found["conditions"], cost)
    assert without_notes(made) == without_notes((TABLES / f"{study.name}.md").read_text())
    if study.ratios:
        assert draw_chart(study, rows) == (TABLES / f"{study.name}.svg").read_text()


@pytest.mark.parametrize("name", ["faults", "serving", "speed", "every_cpu", "gpu"])
def test_the_committed_table_of_a_program_follows_from_its_figures(name):
    found = json.loads((TABLES / f"{name}.json").read_text())
    made = {
        "faults": lambda: faults.markdown(found),
        "serving": lambda: serving.markdown(found),
        "speed": lambda: speed.markdown(found["rows"], found["conditions"]),
        "every_cpu": lambda: every_cpu.markdown(found["rows"], found["conditions"]),
        "gpu": lambda: gpu.markdown(found),
    }[name]()
    assert made == (TABLES / f"{name}.md").read_text()


def test_a_row_of_a_study_matches_the_results_of_its_run(tiny_run):
    run, _ = tiny_run
    found = row_of(Case(method="m", ratio="2x", seed=3, recipe={}), run)
    results = json.loads((run / "bench" / "results.json").read_text())
    teacher, pruned, last = results["rows"][0], results["rows"][1], results["rows"][-1]
    assert (found.method, found.ratio, found.seed) == ("m", "2x", 3)
    before = results["rows"][-2]
    assert (found.dense, found.slimmed) == (teacher["accuracy"], pruned["accuracy"])
    assert (found.final, found.int8) == (before["accuracy"], last["accuracy"]) and last["precision"] == "int8"
    for row, of_dense in ((before, found.latency_of_dense), (last, found.int8_latency_of_dense)):
        own, dense = (sum(t["median_ms"] for t in one["latency"] if t["batch"] == 2) for one in (row, teacher))
        assert of_dense == pytest.approx(own / dense, abs=1e-4)
    assert found.block_params_kept == pruned["block_params_kept"] and found.shapes


def test_only_the_first_backend_of_a_run_counts(tiny_run, tmp_path):
    run, _ = tiny_run
    results = json.loads((run / "bench" / "results.json").read_text())
    case = Case(method="m", ratio="2x", seed=3, recipe={})
    expected = row_of(case, run)
    both = [
        {**row, "stage": f"{row['stage']} ({backend})", "backend": backend, "accuracy": row["accuracy"] if own else {}}
        for backend, own in (("onnxruntime", True), ("torch", False))
        for row in results["rows"]
    ]
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "results.json").write_text(json.dumps(results | {"rows": both}))
    assert row_of(case, tmp_path) == expected
    lost = [{**row, "artifact": f"{row['artifact']}-renamed"} for row in both]
    (tmp_path / "bench" / "results.json").write_text(json.dumps(results | {"rows": lost}))
    with pytest.raises(ArtifactError, match="holds no readable results"):
        row_of(case, tmp_path)


def test_latencies_that_were_measured_alone_replace_those_of_the_run(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run[0], tmp_path / "run")
    case = Case(method="m", ratio="2x", seed=3, recipe={})
    before = row_of(case, run)
    time_alone(run)
    alone = json.loads((run / "bench" / "alone" / "results.json").read_text())
    after = row_of(case, run)
    assert alone["rows"][0]["artifact"] == "teacher" and not alone["rows"][0]["accuracy"]
    teacher, last = alone["rows"][0], alone["rows"][-2]
    own, dense = (sum(timing["median_ms"] for timing in row["latency"]) for row in (last, teacher))
    assert after.latency_of_dense == pytest.approx(own / dense, abs=1e-4)
    same = {"latency_of_dense", "int8_latency_of_dense", "latency_ms"}
    assert before.model_dump(exclude=same) == after.model_dump(exclude=same)
    assert {timing["batch"] for timing in teacher["latency"]} == {2}  # Only the largest batch is compared.
