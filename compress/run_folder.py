"""Run folder guard: one writer at a time, and only recipe changes that finished stages do not depend on.

A stage depends on the sections in `INPUTS`, on its own entry and on the entries before it. Test data, `export`, `bench` and
`serve` are used after all stages and may always change.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clipress.artifact import HEADER
from clipress.compress.plan import CompressPlan, compress_plan_from
from clipress.errors import ArtifactError
from clipress.progress import Say
from clipress.recipe import RECIPE, Recipe, read_recipe, recipe_text
from clipress.storage import LOCK, leftovers, locked, sweep, write_text_whole

INPUTS = ("seed", "teacher", "student", "data", "runtime")


@contextmanager
def lock_run_folder(
    run: Path, plan: CompressPlan, say: Say, fresh: bool = False, wait: Say | None = None
) -> Iterator[None]:
    """Lock a run folder for this process and write the recipe into it.

    Raises ArtifactError if the folder is not a run folder, or holds finished stages that depend on a part of the recipe
    that has changed (unless `fresh`, which reruns them). If another process holds the lock, raises ArtifactError, or with
    `wait` passes a message to it and waits.
    """
    _refuse_others(run, plan, fresh)
    with locked(run, wait):
        kept = _refuse_others(run, plan, fresh)  # again, since another process may have written the folder meanwhile
        sweep(run)
        if kept != plan.recipe:
            if kept is not None:
                _report_changes(run, kept, plan, say)
            write_text_whole(run / RECIPE, recipe_text(plan.recipe))
        yield


def _refuse_others(run: Path, plan: CompressPlan, fresh: bool) -> Recipe | None:
    """Return the recipe in a run folder, or None for a new folder. Raises ArtifactError if the folder cannot be used."""
    path = run / RECIPE
    if run.exists() and not run.is_dir():
        raise ArtifactError(f"{run} is a file, not a run folder. Choose a folder with --out.")
    if not path.is_file():
        if run.is_dir() and {*run.iterdir()} - {run / LOCK, *leftovers(run)}:
            raise ArtifactError(
                f"{run}: expected an empty folder or a run folder, found files but no {RECIPE}. Choose another with --out."
            )
        return None
    kept = read_recipe(path)
    if kept == plan.recipe or fresh:
        return kept
    if depending := _depending(run, kept, plan):
        reasons = "; ".join(f"{stage} depends on {', '.join(changes)}" for stage, changes in depending.items())
        raise ArtifactError(
            f"Run folder {run} has finished stages of a different recipe: {reasons}. Nothing was changed. Choose another "
            f"folder with --out, rerun every stage with --fresh, or remove {', '.join(str(run / s) for s in depending)}."
        )
    return kept


def _depending(run: Path, kept: Recipe, plan: CompressPlan) -> dict[str, list[str]]:
    """Return the finished stages that depend on changed parts of the recipe, with those parts."""
    old = compress_plan_from(kept)
    changed = _changed_inputs(old, plan)
    depending = {}
    for number, stage in enumerate(old.stages):
        entries = [f"stages.{i}" for i in range(number + 1) if old.stages[i : i + 1] != plan.stages[i : i + 1]]
        if (run / stage.name / HEADER).is_file() and changed + entries:
            depending[stage.name] = changed + entries
    return depending


def _changed_inputs(old: CompressPlan, new: CompressPlan) -> list[str]:
    """Return the sections of `INPUTS` that differ, ignoring decoding workers and test data."""

    def inputs(plan: CompressPlan) -> dict[str, object]:
        data = plan.data.model_copy(update={"test": (), "workers": 0})
        values = {"teacher": plan.teachers, "data": data, "runtime": plan.runtime}
        return {name: values.get(name, getattr(plan.recipe, name)) for name in INPUTS}

    before, after = inputs(old), inputs(new)
    return [name for name in INPUTS if before[name] != after[name]]


def _report_changes(run: Path, kept: Recipe, plan: CompressPlan, say: Say) -> None:
    """Report what the new recipe changes, and remove the teacher's copy if it may be outdated."""
    sections = [name for name in type(kept).model_fields if getattr(kept, name) != getattr(plan.recipe, name)]
    say(f"{run / RECIPE}: replaced, since {', '.join(sections)} changed and no finished stage depends on it")
    if {"teacher", "data"} & {*_changed_inputs(compress_plan_from(kept), plan)}:
        shutil.rmtree(run / "teacher", ignore_errors=True)
