"""Who may write into a run folder: one process, with the recipe the folder was made with or one that fits what is finished.

A recipe may be corrected while nothing that is finished depends on what changed: a stage depends on the sections in
`INPUTS`, on its own entry and on those before it. Test data, `export`, `bench` and `serve` come after all stages.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from clipress.artifact import HEADER
from clipress.compress.plan import Plan, plan_from
from clipress.errors import ArtifactError
from clipress.recipe import Recipe, read_recipe, recipe_text
from clipress.storage import LOCK, leftovers, locked, sweep, write_text_whole

RECIPE = "recipe.yaml"
INPUTS = ("seed", "teacher", "student", "data", "runtime")
Say = Callable[[str], None]


@contextmanager
def claimed(run: Path, plan: Plan, say: Say, fresh: bool = False, wait: Say | None = None) -> Iterator[None]:
    """Take a folder for a run and for this process alone.

    Raises ArtifactError where the folder holds something else, or finished stages that depend on what differs from the
    recipe they were made with; with `fresh` these are to be made anew anyway. A folder that another process works on is
    refused too; with `wait`, that is said and waited for.
    """
    _refuse_others(run, plan, fresh)
    with locked(run, wait):
        kept = _refuse_others(run, plan, fresh)  # somebody may have been quicker
        sweep(run)
        if kept != plan.recipe:
            if kept is not None:
                _replace(run, kept, plan, say)
            write_text_whole(run / RECIPE, recipe_text(plan.recipe))
        yield


def _refuse_others(run: Path, plan: Plan, fresh: bool) -> Recipe | None:
    """Return the recipe a folder was made with, None for a new folder."""
    path = run / RECIPE
    if run.exists() and not run.is_dir():
        raise ArtifactError(f"Run folder {run} was asked for; it is a file. Choose another with --out.")
    if not path.is_file():
        if run.is_dir() and {*run.iterdir()} - {run / LOCK, *leftovers(run)}:
            raise ArtifactError(f"Run folder {run} is not empty and holds no {RECIPE}. Choose another with --out.")
        return None
    kept = read_recipe(path)
    if kept == plan.recipe or fresh:
        return kept
    if depending := _depending(run, kept, plan):
        told = "; ".join(f"{stage} depends on {', '.join(changes)}" for stage, changes in depending.items())
        raise ArtifactError(
            f"Run folder {run} holds finished stages of a different recipe: {told}. Nothing was changed. Choose another "
            f"folder with --out, do every stage over with --fresh, or remove {', '.join(str(run / s) for s in depending)}."
        )
    return kept


def _depending(run: Path, kept: Recipe, plan: Plan) -> dict[str, list[str]]:
    """Return the finished stages that depend on what changed, each with the places in the recipe that did."""
    old = plan_from(kept)
    changed = _changed_inputs(old, plan)
    depending = {}
    for number, stage in enumerate(old.stages):
        entries = [f"stages.{i}" for i in range(number + 1) if old.stages[i : i + 1] != plan.stages[i : i + 1]]
        if (run / stage.name / HEADER).is_file() and changed + entries:
            depending[stage.name] = changed + entries
    return depending


def _changed_inputs(old: Plan, new: Plan) -> list[str]:
    """Return the sections of `INPUTS` that differ. Who decodes, and what is tested on later, does not count."""

    def told(plan: Plan) -> dict[str, object]:
        data = plan.data.model_copy(update={"test": (), "workers": 0})
        values = {"teacher": plan.teachers, "data": data, "runtime": plan.runtime}
        return {name: values.get(name, getattr(plan.recipe, name)) for name in INPUTS}

    before, after = told(old), told(new)
    return [name for name in INPUTS if before[name] != after[name]]


def _replace(run: Path, kept: Recipe, plan: Plan, say: Say) -> None:
    """Say what the new recipe changes, and remove the teacher's copy where it may be another teacher's."""
    sections = [name for name in type(kept).model_fields if getattr(kept, name) != getattr(plan.recipe, name)]
    say(f"{run / RECIPE} is replaced: {', '.join(sections)} changed, and no finished stage depends on that")
    if {"teacher", "data"} & {*_changed_inputs(plan_from(kept), plan)}:
        shutil.rmtree(run / "teacher", ignore_errors=True)
