"""Compress a model by a recipe, and embed its training data with its teachers ahead of time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clipress.compress import pipeline
from clipress.compress.fabric import shut_down_distributed, start_fabric
from clipress.compress.teacher_cache import caches_of
from clipress.data.cache_files import CacheSettings, Dtype
from clipress.errors import RecipeError
from clipress.models.load import TeacherSpec
from clipress.progress import Say
from clipress.recipe import Recipe
from clipress.workflow.plan import Plan, plan_from


def compress(recipe: Recipe, out: Path | None, resume: bool, say: Say) -> tuple[Path, Plan]:
    """Run a recipe's stages; return the run folder and the plan. With several processes, all of them return."""
    plan = plan_from(recipe)
    folder = out or Path("runs") / recipe.name
    pipeline.compress(plan, folder, say, fresh=not resume)
    shut_down_distributed()
    return folder, plan


@dataclass(frozen=True)
class EmbedOptions:
    """What embedding the training data changes in the recipe."""

    home: Path | None = None
    """Where the caches go; default: the user's cache folder."""
    views: int | None = None
    dtype: Dtype | None = None
    teachers: tuple[Path, ...] = ()
    """Artifacts to embed with instead of the recipe's teachers."""


def embed(recipe: Recipe, options: EmbedOptions, say: Say) -> list[Path]:
    """Embed a recipe's training sources with its teachers; return the caches' folders."""
    plan = plan_from(recipe)
    specs = [TeacherSpec(artifact=path) for path in options.teachers] or plan.teachers
    if not specs:
        raise RecipeError("The recipe has no 'teacher' to embed with. Name an artifact with --teacher.")
    default = next((spec.cache for spec in plan.teachers if spec.cache), CacheSettings())
    fabric = start_fabric(plan.runtime)
    say = say if fabric.is_global_zero else (lambda _: None)
    folders = []
    for spec in specs:
        known = spec.cache or default
        changes = {"views": options.views, "dtype": options.dtype}
        settings = known.model_copy(update={name: value for name, value in changes.items() if value is not None})
        caches = caches_of(pipeline.load_teacher(spec, recipe.task, say), settings, plan, fabric, say, options.home)
        folders += [cache.folder for cache in caches]
    return folders
