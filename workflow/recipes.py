"""Find a recipe: a file, or the name of a shipped one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipress.errors import RecipeError, nearest
from clipress.recipe import Recipe, read_recipe

SHIPPED = Path(__file__).parents[1] / "configs"


def open_recipe(name: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe, given as a file or as the name of a shipped one. Raises RecipeError."""
    return read_recipe(find_recipe(name), overrides)


def find_recipe(name: str | Path) -> Path:
    """Return the file of a recipe. Raises RecipeError, with the nearest shipped name, if there is none."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.exists():
        return path
    shipped = {file.stem: file for file in SHIPPED.glob("*.yaml")}
    if str(name) not in shipped:
        raise RecipeError(f"Recipe {name}: expected a YAML file or a shipped recipe.{nearest(str(name), shipped)}")
    return shipped[str(name)]
