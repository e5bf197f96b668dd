"""Names of a run's artifacts, which its recipe gives away without torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from clipress.errors import RecipeError
from clipress.recipe import Recipe

TEACHER = "teacher"
MAKES = {"distill": "distilled", "prune": "pruned", "sparsify": "sparse", "quantize": "int8"}
"""The artifact that a stage of each kind makes, where the recipe does not name it. A plugin's stage says so itself."""


def artifact_names(recipe: Recipe, makes: Callable[[str], str]) -> list[str]:
    """Return the names of all artifacts of a recipe, in order; `makes` gives a kind's default. Raises RecipeError."""
    kinds: list[str] = []
    names: list[str] = []
    for number, entry in enumerate(recipe.stages):
        kind, settings = only_stage(entry, f"stages.{number}")
        given = (settings or {}).get("name")
        names.append(artifact_name(kind, makes(kind), given, kinds, names))
        kinds.append(kind)
    return ([] if recipe.teacher is None else [TEACHER]) + names


def only_stage(entry: dict[str, Any], where: str) -> tuple[str, Any]:
    """Return the kind and the settings of one entry of a recipe's stages. Raises RecipeError unless it has one kind."""
    if len(entry) != 1:
        raise RecipeError(f"{where}: expected one stage kind with its settings, found {sorted(entry)}.")
    return next(iter(entry.items()))


def artifact_name(kind: str, makes: str, given: str | None, kinds: Sequence[str], taken: Sequence[str]) -> str:
    """Return the name of a stage's artifact, after stages of `kinds` that made `taken`. Raises RecipeError.

    A stage may be `given` a name; else it is what its kind `makes`, numbered where that is taken, and `recovered` for
    distillation after pruning.
    """
    name = given or ("recovered" if kind == "distill" and "prune" in kinds else makes)
    if given and name in taken:
        raise RecipeError(f"stages: expected unique names, found two stages named '{name}'. Rename one.")
    if not str(name).replace("-", "").replace("_", "").isalnum():
        raise RecipeError(
            f"stages: expected a name of letters, digits, '-' and '_', found '{name}'. It names a folder."
        )
    if name not in taken:
        return name
    return next(f"{name}-{n}" for n in range(2, 99) if f"{name}-{n}" not in taken)
