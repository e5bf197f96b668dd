"""Guard a run folder: one writer at a time, with the folder's recipe or one that its finished stages allow.

A recipe may change as long as no finished stage depends on the change. A stage depends on the sections in `INPUTS`, on its
own entry and on those before it. Test data, `export`, `bench` and `serve` come after all stages.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from clipress.artifact import HEADER
from clipress.compress.plan import CompressPlan, compress_plan_from
from clipress.errors import ArtifactError
from clipress.recipe import Recipe, read_recipe, recipe_text
from clipress.storage import LOCK, leftovers, locked, sweep, write_text_whole

RECIPE = "recipe.yaml"
INPUTS = ("seed", "teacher", "student", "data", "runtime")
Say = Callable[[str], None]


@contextmanager
def lock_run_folder(
    run: Path, plan: CompressPlan, say: Say, fresh: bool = False, wait: Say | None = None
) -> Iterator[None]:
    """Lock a run folder for this process and write the recipe into it.

    Raises ArtifactError if the folder holds something else, or finished stages of a recipe that differs in what they depend
    on (not with `fresh`, which redoes them). A folder that another process has locked is an error too; with `wait`, a
    message is passed to it and the lock is awaited.
    """
    _refuse_others(run, plan, fresh)
    with locked(run, wait):
        kept = _refuse_others(run, plan, fresh)  # another process may have written it since
        sweep(run)
        if kept != plan.recipe:
            if kept is not None:
                _report_changes(run, kept, plan, say)
            write_text_whole(run / RECIPE, recipe_text(plan.recipe))
        yield


def _refuse_others(run: Path, plan: CompressPlan, fresh: bool) -> Recipe | None:
    """Return the recipe a folder was made with, None for a new folder. Raises ArtifactError for any other folder."""
    path = run / RECIPE
    if run.exists() and not run.is_dir():
        raise ArtifactError(f"{run} is a file, not a run folder. Choose a folder with --out.")
    if not path.is_file():
        if run.is_dir() and {*run.iterdir()} - {run / LOCK, *leftovers(run)}:
            raise ArtifactError(f"Run folder {run} is not empty and has no {RECIPE}. Choose another with --out.")
        return None
    kept = read_recipe(path)
    if kept == plan.recipe or fresh:
        return kept
    if depending := _depending(run, kept, plan):
        reasons = "; ".join(f"{stage} depends on {', '.join(changes)}" for stage, changes in depending.items())
        raise ArtifactError(
            f"Run folder {run} holds finished stages of a different recipe: {reasons}. Nothing was changed. Choose another "
            f"folder with --out, redo every stage with --fresh, or remove {', '.join(str(run / s) for s in depending)}."
        )
    return kept


def _depending(run: Path, kept: Recipe, plan: CompressPlan) -> dict[str, list[str]]:
    """Return the finished stages that depend on what changed, each with the places in the recipe that did."""
    old = compress_plan_from(kept)
    changed = _changed_inputs(old, plan)
    depending = {}
    for number, stage in enumerate(old.stages):
        entries = [f"stages.{i}" for i in range(number + 1) if old.stages[i : i + 1] != plan.stages[i : i + 1]]
        if (run / stage.name / HEADER).is_file() and changed + entries:
            depending[stage.name] = changed + entries
    return depending


def _changed_inputs(old: CompressPlan, new: CompressPlan) -> list[str]:
    """Return the sections of `INPUTS` that differ. Decoding workers and test data do not count."""

    def inputs(plan: CompressPlan) -> dict[str, object]:
        data = plan.data.model_copy(update={"test": (), "workers": 0})
        values = {"teacher": plan.teachers, "data": data, "runtime": plan.runtime}
        return {name: values.get(name, getattr(plan.recipe, name)) for name in INPUTS}

    before, after = inputs(old), inputs(new)
    return [name for name in INPUTS if before[name] != after[name]]


def _report_changes(run: Path, kept: Recipe, plan: CompressPlan, say: Say) -> None:
    """Report what the new recipe changes, and remove a copy of the teacher that may be outdated."""
    sections = [name for name in type(kept).model_fields if getattr(kept, name) != getattr(plan.recipe, name)]
    say(f"{run / RECIPE} is replaced: {', '.join(sections)} changed, and no finished stage depends on that")
    if {"teacher", "data"} & {*_changed_inputs(compress_plan_from(kept), plan)}:
        shutil.rmtree(run / "teacher", ignore_errors=True)
