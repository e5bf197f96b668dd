"""A recipe with every section typed: parsed once, here, and passed on as objects."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from clipress.bench.settings import BenchSettings
from clipress.compress.plan import CompressPlan, compress_plan_from
from clipress.data.eval_sets import EvalSet, evalsets
from clipress.export.settings import ExportSettings
from clipress.recipe import Recipe, checked
from clipress.serve.settings import ServeSettings
from clipress.workflow.outline import choose_artifact, recipe_of


@dataclass(frozen=True)
class Plan(CompressPlan):
    """A recipe with every section validated."""

    export: ExportSettings
    bench: BenchSettings
    serve: ServeSettings

    def artifact(self, name: str | None, option: str = "--stage") -> str:
        """Return the name of an artifact, by default the last one. Raises RecipeError for an unknown name."""
        return choose_artifact(self.artifacts, name, option)

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
    return plan_from(recipe_of(run))
