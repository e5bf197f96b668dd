"""The recipe sections that `compress` uses, typed and validated before any work starts."""

from __future__ import annotations

from dataclasses import dataclass

from clipress.compress.losses import check_losses, terms_from
from clipress.compress.names import TEACHER
from clipress.compress.settings import Runtime
from clipress.compress.stage import Stage, stages_from
from clipress.data.spec import DataSpec
from clipress.errors import RecipeError
from clipress.models.load import TeacherSpec
from clipress.recipe import Recipe, checked
from clipress.tasks import TASKS, Task


@dataclass(frozen=True)
class CompressPlan:
    """A validated recipe and its typed sections."""

    recipe: Recipe
    data: DataSpec
    runtime: Runtime
    teachers: tuple[TeacherSpec, ...]
    stages: tuple[Stage, ...]

    @property
    def artifacts(self) -> list[str]:
        """Names of the artifacts that the run produces, in order."""
        return ([TEACHER] if self.teachers else []) + [stage.name for stage in self.stages]


def compress_plan_from(recipe: Recipe) -> CompressPlan:
    """Validate the recipe sections that `compress` uses. Raises RecipeError."""
    task = TASKS.find(recipe.task, "task")()
    raw = recipe.teacher if isinstance(recipe.teacher, list) else [recipe.teacher]
    teachers = tuple(checked(TeacherSpec, one, "teacher") for one in raw if one is not None)
    stages = tuple(stages_from(recipe.stages, task.stage_defaults))
    for number, stage in enumerate(stages):
        _check_task(stage, task, f"stages.{number}.{stage.kind}")
    if not teachers and recipe.student is None:
        raise RecipeError("The recipe has no model to start from: set 'teacher', 'student' or both.")
    if len({teacher.cache is None for teacher in teachers}) > 1:
        raise RecipeError(
            "teacher: expected a 'cache' for every teacher or for none, found both. Set it for all teachers, or remove it."
        )
    if teachers and any(stage.name == TEACHER for stage in stages):
        raise RecipeError("stages: the name 'teacher' is reserved for the teacher's artifact. Rename the stage.")
    if recipe.student is not None:
        task.check_student(recipe.student, bool(teachers))
    for teacher in teachers:
        if teacher.recipe is not None:
            compress_plan_from(checked(Recipe, teacher.recipe, "teacher.recipe"))
    data = checked(DataSpec, recipe.data, "data")
    return CompressPlan(recipe, data, checked(Runtime, recipe.runtime, "runtime"), teachers, stages)


def _check_task(stage: Stage, task: Task, where: str) -> None:
    """Raise RecipeError for losses or a tower that the task does not support."""
    settings = stage.settings
    for name in ("losses", "distill_losses"):
        losses = getattr(settings, name, ())
        check_losses(terms_from(losses, f"{where}.{name}"), task, f"{where}.{name}")
    tower = getattr(settings, "towers", "both")
    if tower not in ("both", *task.towers):
        raise RecipeError(f"{where}.towers: expected {' or '.join(('both', *task.towers))}, found '{tower}'.")
