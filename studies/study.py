"""The types of a study: its file, its runs, and the rows of its JSON."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from clipress.recipe import FolderName, Section

SCHEMA_VERSION = 1


class StepCost(Section):
    """What one training step costs: short trainings in turns, each in its own process."""

    reference: str
    """The case that the others are compared with."""
    cases: dict[FolderName, dict[str, Any]]
    """What each case changes in the base recipe; it has one stage."""
    rounds: int = Field(3, ge=1)


class Sized(Section):
    """A method that gets small by training another model instead of cutting the teacher."""

    students: dict[FolderName, dict[str, Any]]
    """Ratio -> the recipe's `student` section; ratios without one are left out."""
    stages: list[dict[str, Any]]


class Study(Section):
    """A study file."""

    name: FolderName
    recipe: str
    """The base, relative to the study file; its stages are replaced."""
    sections: dict[str, Any] = Field(default_factory=dict)
    """What all runs change in the base recipe, such as `student`."""
    methods: dict[FolderName, list[dict[str, Any]] | Sized]
    """Stages of each method; with ratios, the first one is `prune`, or the method is `Sized`."""
    reference: str
    """The method that the others are compared with."""
    ratios: dict[FolderName, float] = Field(default_factory=dict)
    """Name -> fraction to keep, the budget of the first stage."""
    unit: Literal["params", "macs", "upop"] = "params"
    """What the ratios are fractions of."""
    seeds: tuple[int, ...] = Field(min_length=1)
    bench: dict[str, Any] = Field(default_factory=dict)
    step_cost: StepCost | None = None


class Case(Section):
    """One run of a study."""

    method: str
    ratio: str | None
    seed: int
    recipe: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return "-".join(part for part in (self.method, self.ratio, f"s{self.seed}") if part)


class StudyRow(BaseModel):
    """What one finished run measured. Keys that were never set are not written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    ratio: str | None
    seed: int
    dense: dict[str, float]
    """Accuracy of the dense teacher: `<set>/<metric>` -> percent."""
    final: dict[str, float]
    """Accuracy of the last artifact, or of the last one before INT8."""
    macs: float
    dense_macs: float | None = None
    latency_ms: float | None = None
    """Sum of the medians of all graphs at the largest batch."""
    latency_of_dense: float
    """The same, relative to the dense teacher."""
    int8: dict[str, float] | None = None
    """Accuracy of the INT8 artifact, if that is the last one."""
    int8_latency_of_dense: float | None = None
    date: str | None = None
    peak_memory_mb: float
    """Of the first stage."""
    slimmed: dict[str, float] | None = None
    """Accuracy right after pruning."""
    block_params_kept: float | None = None
    search_seconds_per_step: float | None = None
    shapes: dict[str, Any] | None = None


class TimedSteps(BaseModel):
    """What a training step of one case costs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    case: str
    seconds: tuple[float, ...]
    """Median of each round."""
    ratios: tuple[float, ...]
    """Ratio to the reference in the same round."""
    peak_memory_mb: float
