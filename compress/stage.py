"""Stage kinds, and the order in which they can work. To add one: a file with its settings and `run`, a line in `KINDS`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clipress.errors import RecipeError, nearest
from clipress.recipe import Section, checked

# kind: (module, settings type); the module has `run(settings, clip, context) -> (Model, details)`.
KINDS = {
    "distill": ("clipress.compress.distill", "Distill"),
    "prune": ("clipress.compress.prune.search", "Prune"),
    "sparsify": ("clipress.compress.sparsify", "Sparsify"),
    "quantize": ("clipress.compress.quantize", "Quantize"),
}
MAKES = {"distill": "distilled", "prune": "pruned", "sparsify": "sparse", "quantize": "int8"}
# What must not come before a kind, and why.
NEVER_AFTER = {
    "prune": {
        "sparsify": "cutting units would break the 2:4 pattern",
        "quantize": "INT8 scales belong to uncut layers",
    },
    "sparsify": {
        "quantize": "INT8 scales belong to the weights as they are",
        "sparsify": "the pattern is there already",
    },
    "distill": {"quantize": "training would leave the INT8 scales behind; quantize trains itself"},
    "quantize": {"quantize": "the model is INT8 already"},
}
RIGHT_ORDER = "distill -> prune -> distill -> sparsify -> quantize"


@dataclass(frozen=True)
class Stage:
    """One entry of a recipe's stages: its kind, the name of the artefact it makes, its settings."""

    kind: str
    name: str
    settings: Section

    def run(self, model: Any, context: Any) -> tuple[Any, dict[str, Any]]:
        """Run the stage on a student; returns the new student and details for the lineage."""
        return importlib.import_module(KINDS[self.kind][0]).run(self.settings, model, context)


def stages_from(raw: Sequence[Mapping[str, Any]]) -> list[Stage]:
    """Check a recipe's stages: kinds, settings, order, names."""
    stages: list[Stage] = []
    for number, entry in enumerate(raw):
        where = f"stages.{number}"
        if len(entry) != 1:
            raise RecipeError(f"{where}: one stage kind with its settings is asked for, found {sorted(entry)}.")
        kind, settings = next(iter(entry.items()))
        if kind not in KINDS:
            raise RecipeError(f"{where}: there is no stage '{kind}'.{nearest(kind, KINDS)}")
        for earlier in stages:
            if reason := NEVER_AFTER[kind].get(earlier.kind):
                raise RecipeError(
                    f"{where}: {kind} cannot come after {earlier.kind}: {reason}. The order that works: {RIGHT_ORDER}."
                )
        module, type_name = KINDS[kind]
        config = checked(getattr(importlib.import_module(module), type_name), settings, f"{where}.{kind}")
        stages.append(Stage(kind, _name(kind, config, stages), config))
    return stages


def _name(kind: str, config: Section, earlier: Sequence[Stage]) -> str:
    after_pruning = kind == "distill" and any(stage.kind == "prune" for stage in earlier)
    name = getattr(config, "name", None) or ("recovered" if after_pruning else MAKES[kind])
    taken = {stage.name for stage in earlier}
    if getattr(config, "name", None) and name in taken:
        raise RecipeError(f"stages: two stages are named '{name}'.")
    if not name.replace("-", "").replace("_", "").isalnum():
        raise RecipeError(f"stages: '{name}' names a folder; letters, digits, '-' and '_' are asked for.")
    if name not in taken:
        return name
    return next(f"{name}-{n}" for n in range(2, 99) if f"{name}-{n}" not in taken)
