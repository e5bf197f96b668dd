"""A run folder as far as its recipe tells without torch: what prediction and serving need to know. `plan.py` has all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clipress.compress.names import MAKES, artifact_names
from clipress.errors import ArtifactError, RecipeError, nearest
from clipress.recipe import RECIPE, Recipe, read_recipe


@dataclass(frozen=True)
class Outline:
    """A run's recipe, whose sections are not validated yet, and its artifacts."""

    recipe: Recipe
    artifacts: list[str]
    """Their names, in order."""

    def artifact(self, name: str | None) -> str:
        """Return the name of an artifact, by default the last one. Raises RecipeError for an unknown name."""
        return choose_artifact(self.artifacts, name)


def read_outline(run: Path) -> Outline:
    """Read the outline of a run folder. Raises ArtifactError if the folder has no recipe."""
    recipe = recipe_of(run)
    return Outline(recipe, artifact_names(recipe, _makes))


def recipe_of(run: Path) -> Recipe:
    """Read the recipe of a run folder. Raises ArtifactError if the folder has none."""
    path = run / RECIPE
    if not path.is_file():
        found = f"it has no {RECIPE}" if run.is_dir() else "it is a file" if run.exists() else "no such folder"
        raise ArtifactError(f"{run} is not a run folder: {found}. Make one with: clipress compress RECIPE")
    return read_recipe(path)


def choose_artifact(artifacts: Sequence[str], name: str | None, option: str = "--stage") -> str:
    """Return the name of one of a run's artifacts, by default the last one. Raises RecipeError for an unknown name."""
    if not artifacts:
        raise RecipeError("The run has no artifacts: its recipe has neither a teacher nor stages.")
    if name is not None and name not in artifacts:
        raise RecipeError(f"{option} {name}: the run has no such artifact.{nearest(name, artifacts)}")
    return name or artifacts[-1]


def _makes(kind: str) -> str:
    if kind in MAKES:
        return MAKES[kind]
    from clipress.compress.stage import (
        STAGES,  # A plugin's stage, or a mistake: only the registry knows, and it needs torch.
    )

    return STAGES.find(kind, "stages").makes
