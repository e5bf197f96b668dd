"""All steps of `clipress run`."""

from __future__ import annotations

from pathlib import Path

from clipress.progress import Say
from clipress.recipe import Recipe
from clipress.storage import is_first_process, locked_and_swept
from clipress.workflow.bench import bench_recipe
from clipress.workflow.compress import compress
from clipress.workflow.engines import make_targets_of_recipe
from clipress.workflow.export import export_artifacts
from clipress.workflow.outcome import Run
from clipress.workflow.serve import choose_served, write_repositories


def run_recipe(recipe: Recipe, out: Path | None, resume: bool, say: Say) -> Run:
    """Compress, export, bench and serve as a recipe says."""
    folder, plan = compress(recipe, out, resume, say)
    if not is_first_process():  # The other processes only train.
        return Run(folder, tuple(plan.artifacts))
    with locked_and_swept(folder):
        export_artifacts(folder, plan, plan.artifacts, say)
        make_targets_of_recipe(folder, plan.artifacts, plan, say)
        results = bench_recipe(folder, plan, say)
        served = choose_served(folder, plan, say)
        write_repositories(folder, served, plan.serve, say)
    return Run(folder, tuple(plan.artifacts), results, served)
