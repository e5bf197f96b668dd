"""The registry of stage kinds, and validation of a recipe's stages and their order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clipress.compress.context import Context
from clipress.compress.names import artifact_name, only_stage
from clipress.errors import RecipeError
from clipress.models.load import Model
from clipress.recipe import Section, checked
from clipress.registry import Registry

Details = dict[str, Any]
"""What a stage records in the lineage."""
Run = Callable[[Any, Model, Context], tuple[Model, Details]]
"""(settings, student, context) -> the new student and details."""
RIGHT_ORDER = "distill -> prune -> distill -> sparsify -> quantize"


@dataclass(frozen=True)
class StageKind:
    """A kind of stage."""

    name: str
    settings: type[Section]
    run: Run
    makes: str
    """Default name of the artifact."""
    never_after: Mapping[str, str]
    """Kinds that must not come before this one, each with the reason."""


STAGES: Registry[StageKind] = Registry("stage", "clipress.compress", "clipress.compress.prune")


def stage(
    name: str, settings: type[Section], makes: str, never_after: Mapping[str, str] | None = None
) -> Callable[[Run], Run]:
    """Register a function as a kind of stage."""

    def add(run: Run) -> Run:
        STAGES.register(name)(StageKind(name, settings, run, makes, never_after or {}))
        return run

    return add


@dataclass(frozen=True)
class Stage:
    """One entry of a recipe's stages: kind, name of the artifact, settings."""

    kind: str
    name: str
    settings: Section

    def run(self, model: Model, context: Context) -> tuple[Model, Details]:
        """Run the stage on a student. Returns the new student and details for the lineage."""
        return STAGES[self.kind].run(self.settings, model, context)


def stages_from(
    raw: Sequence[Mapping[str, Any]], defaults: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Stage]:
    """Validate the kinds, settings, order and names of a recipe's stages. `defaults` are the task's settings by kind."""
    stages: list[Stage] = []
    for number, entry in enumerate(raw):
        where = f"stages.{number}"
        name, settings = only_stage(entry, where)
        kind = STAGES.find(name, where)
        for earlier in stages:
            if reason := kind.never_after.get(earlier.kind):
                raise RecipeError(
                    f"{where}: {name} cannot come after {earlier.kind}: {reason}. Use the order {RIGHT_ORDER}."
                )
        own = (defaults or {}).get(name, {})
        given = {**own, **settings} if isinstance(settings, Mapping) else settings or own
        config = checked(kind.settings, given, f"{where}.{name}")
        kinds, taken = [stage.kind for stage in stages], [stage.name for stage in stages]
        made = artifact_name(name, kind.makes, getattr(config, "name", None), kinds, taken)
        stages.append(Stage(name, made, config))
    return stages
