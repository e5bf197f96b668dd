"""What a run of a recipe would need and do, before anything runs: `clipress plan`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from clipress.compress.checkpoint import KEEP_LAST
from clipress.compress.fabric import accelerator_of, precision_of
from clipress.compress.forecast import CompressForecast, StageForecast, TeacherForecast, forecast_stages
from clipress.data.spec import SourceSpec
from clipress.recipe import Recipe
from clipress.workflow.plan import Plan, plan_from


@dataclass(frozen=True)
class Disk:
    """Bytes that a run takes."""

    artifacts: int
    checkpoints: int
    """Of the stage with the largest, while it runs: those that are kept, and the one that is being written."""
    teacher_caches: int
    exports: int
    """About: ONNX files of all artifacts, without engines."""

    @property
    def total(self) -> int:
        return self.artifacts + self.checkpoints + self.teacher_caches + self.exports


@dataclass(frozen=True)
class Forecast:
    """The forecast of a run."""

    recipe: str
    device: str
    """cpu or cuda."""
    precision: str
    """In Fabric's words."""
    processes: int
    teachers: tuple[TeacherForecast, ...]
    stages: tuple[StageForecast, ...]
    disk: Disk
    artifacts: tuple[str, ...]
    """What is exported to ONNX and measured."""
    targets: tuple[str, ...]
    """Export targets besides ONNX."""
    measured: dict[str, Any]
    """Backends, batch sizes, and evaluation sets by name."""
    served: tuple[str, ...]
    """Backends of the Triton repositories."""

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        found = asdict(self)
        found["disk"]["total"] = self.disk.total
        return found


def forecast(recipe: Recipe, processes: int = 1) -> Forecast:
    """Forecast a run on so many processes. Raises RecipeError or DataError for what a run would refuse."""
    plan = plan_from(recipe)
    compress = forecast_stages(plan, processes)
    sets = plan.data.test or plan.data.val or plan.data.train
    return Forecast(
        recipe=recipe.name,
        device=accelerator_of(plan.runtime),
        precision=precision_of(plan.runtime),
        processes=processes,
        teachers=compress.teachers,
        stages=compress.stages,
        disk=_disk(plan, compress),
        artifacts=tuple(plan.artifacts),
        targets=tuple(plan.export.targets),
        measured={
            "backends": list(plan.bench.backends),
            "batch": list(plan.bench.batch),
            "sets": [_name(spec) for spec in sets],
        },
        served=plan.serve.backend,
    )


def _disk(plan: Plan, compress: CompressForecast) -> Disk:
    models = compress.models.values()
    writes = plan.runtime.checkpoint_every
    largest = max((stage.needs.checkpoint for stage in compress.stages if writes and stage.needs), default=0)
    with_half = 1.5 if plan.export.onnx.fp16 else 1  # every file in float16 too
    return Disk(
        artifacts=sum(model.artifact_bytes for model in models),
        checkpoints=(KEEP_LAST + 1) * largest,
        teacher_caches=sum(teacher.cache_bytes or 0 for teacher in compress.teachers),
        exports=round(with_half * sum(model.exported_bytes() for model in models)),
    )


def _name(spec: SourceSpec) -> str:
    return spec.name or spec.format
