"""A recipe with every section typed: parsed once, here, and passed on as objects."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from clipress.bench.settings import BenchSettings
from clipress.compress.plan import CompressPlan, compress_plan_from
from clipress.compress.run_folder import RECIPE
from clipress.data.eval_sets import EvalSet, evalsets
from clipress.errors import ArtifactError, RecipeError, nearest
from clipress.export.settings import ExportSettings
from clipress.recipe import Recipe, checked, read_recipe
from clipress.serve.settings import ServeSettings


@dataclass(frozen=True)
class Plan(CompressPlan):
    """A recipe with every section validated."""

    export: ExportSettings
    bench: BenchSettings
    serve: ServeSettings

    def artifact(self, name: str | None, option: str = "--stage") -> str:
        """Return the name of an artifact, by default the last one. Raises RecipeError for an unknown name."""
        if name is not None and name not in self.artifacts:
            raise RecipeError(f"{option} {name}: the run has no such artifact.{nearest(name, self.artifacts)}")
        return name or self.artifacts[-1]

    def test_sets(self) -> list[EvalSet]:
        """Open the test data; where the recipe has none, the validation or training data."""
        return evalsets(self.data.test or self.data.val or self.data.train)


def plan_from(recipe: Recipe) -> Plan:
    """Validate every section of a recipe before any work starts. Raises RecipeError."""
    sections = {
        "export": checked(ExportSettings, recipe.export, "export"),
        "bench": checked(BenchSettings, recipe.bench, "bench"),
        "serve": checked(ServeSettings, recipe.serve, "serve"),
    }
    compress = compress_plan_from(recipe)
    return Plan(**{field.name: getattr(compress, field.name) for field in fields(compress)}, **sections)


def read_plan(run: Path) -> Plan:
    """Read the recipe of a run folder. Raises ArtifactError if the folder has none."""
    path = run / RECIPE
    if not path.is_file():
        found = f"it has no {RECIPE}" if run.is_dir() else "it is a file" if run.exists() else "no such folder"
        raise ArtifactError(f"{run} is not a run folder: {found}. Make one with: clipress compress RECIPE")
    return plan_from(read_recipe(path))
