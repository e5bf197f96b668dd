"""The workflow between the commands: sections, the chosen artifact, the Triton repository."""

import shutil

import pytest

from clipress.bench.settings import BenchSettings
from clipress.errors import ArtifactError, RecipeError
from clipress.export.settings import TensorRTSettings
from clipress.recipe import Recipe, checked, overridden
from clipress.serve.settings import ServeSettings
from clipress.serve.triton_repo import served_version
from clipress.workflow import serve
from clipress.workflow.bench import name_subjects
from clipress.workflow.plan import plan_from, read_plan


def test_a_plan_holds_every_section_with_its_type(recipe):
    recipe["export"]["tensorrt"] = {"precision": "fp32"}
    plan = plan_from(Recipe(**recipe))
    assert plan.bench == checked(BenchSettings, recipe["bench"], "bench") and plan.bench.batch == (1, 2)
    assert isinstance(plan.export.tensorrt, TensorRTSettings) and plan.export.tensorrt.precision == "fp32"
    assert plan.serve == ServeSettings(max_batch=4)
    assert plan.artifacts == ["teacher", "pruned", "recovered", "sparse", "int8"]


@pytest.mark.parametrize("section", ["export", "bench", "serve", "data", "runtime"])
def test_an_unknown_key_in_any_section_is_an_error(recipe, section):
    recipe.setdefault(section, {})["nonsense"] = 1
    with pytest.raises(RecipeError, match=rf"{section}\.nonsense: unknown key"):
        plan_from(Recipe(**recipe))


def test_the_artifact_is_the_named_one_or_the_last(recipe):
    plan = plan_from(Recipe(**recipe))
    assert (plan.artifact(None), plan.artifact("pruned")) == ("int8", "pruned")
    with pytest.raises(RecipeError, match=r"--compare prund: .*Did you mean 'pruned'"):
        plan.artifact("prund", "--compare")


def test_overrides_are_validated_together_with_the_rest():
    section = ServeSettings(max_batch=8, backend="tensorrt", precision="fp16")
    found = overridden(section, {"backend": ("python", "onnxruntime")}, "serve")
    assert (found.backend, found.max_batch, found.precision) == (("python", "onnxruntime"), 8, "fp16")
    assert overridden(section, {}, "serve") is section
    with pytest.raises(RecipeError, match=r"serve\.max_batch"):
        overridden(section, {"max_batch": 0}, "serve")


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda path: None, "no such folder"),
        (lambda path: path.write_text("x"), "it is a file"),
        (lambda path: path.mkdir(), "it has no recipe.yaml"),
    ],
)
def test_a_path_that_is_not_a_run_folder_is_refused_with_the_reason(tmp_path, make, found):
    make(tmp_path / "x")
    with pytest.raises(ArtifactError, match=rf"x is not a run folder: {found}.*clipress compress RECIPE"):
        read_plan(tmp_path / "x")


def test_subjects_have_distinct_names(tmp_path):
    artifacts = [(tmp_path / run, "int8") for run in ("a", "b", "a", "a")]
    assert [one.name for one in name_subjects(artifacts, True)] == ["a/int8", "b/int8", "a/int8 #2", "a/int8 #3"]
    assert [one.name for one in name_subjects(artifacts[:1], False)] == ["int8"]


def test_triton_writes_a_repository_only_if_missing_or_a_stage_is_named(tiny_run, tmp_path, monkeypatch):
    run = shutil.copytree(tiny_run[0], tmp_path / "run", ignore=shutil.ignore_patterns("triton"))
    started = []
    monkeypatch.setattr(serve, "serve_until_stopped", lambda repository, say, **listen: started.append(listen))
    repository, lines = run / "triton" / "python", []
    serve.start_triton(run, None, {"grpc_port": 8001}, lines.append)
    assert started == [{"grpc_port": 8001}] and served_version(repository) == 1
    # The artifact that bench kept differs between machines.
    served = serve.choose_served(run, read_plan(run), lines.append)
    serve.start_triton(run, "pruned" if served == "recovered" else "recovered", {}, lines.append)
    assert served_version(repository) == 2
    serve.switch_version(run, None, {"backend": "python"}, lines.append)
    before = len(lines)
    code = repository / "classify" / "1" / "model.py"
    today = code.read_bytes()
    code.unlink()
    code.write_text("from clipress.serve.triton_model import removed\n")
    serve.start_triton(run, None, {}, lines.append)
    assert served_version(repository) == 1 and len(lines) == before and len(started) == 3
    assert code.read_bytes() == today
    assert [path.name for path in (run / "triton").iterdir()] == ["python"]
