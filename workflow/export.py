"""Export a run's artifacts to ONNX and, optionally, to TensorRT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipress.data.eval_sets import evalsets
from clipress.errors import RecipeError
from clipress.export.exported import is_exported
from clipress.export.extra_models import extra_models_from_export
from clipress.export.layouts import LAYOUTS, LayoutJob, write_layout
from clipress.export.settings import OnnxSettings, TensorRTSettings
from clipress.export.to_onnx import onnx_from_artifact
from clipress.progress import Say
from clipress.recipe import overridden
from clipress.runtime.export_folder import Exported, read_export
from clipress.storage import locked_and_swept
from clipress.workflow.engines import make_target, make_targets_of_recipe
from clipress.workflow.kept import choose_exported
from clipress.workflow.plan import Plan, read_plan


@dataclass(frozen=True)
class ExportRequest:
    """What an export changes in the run's recipe."""

    stages: tuple[str, ...] = ()
    """Artifacts to export; default: the one that bench kept, or all before anything was measured."""
    everything: bool = False
    """Export all artifacts."""
    onnx: Mapping[str, Any] = field(default_factory=dict)
    """Settings that replace those of `export.onnx`."""
    tensorrt: Mapping[str, Any] | None = None
    """Build engines, with settings that replace those of `export.tensorrt`; None: only if the recipe has that section."""
    layout: str | None = None
    """Also write a folder in this layout, a name in export.layouts.LAYOUTS."""


def export_run(run: Path, request: ExportRequest, say: Say) -> None:
    """Export a run's artifacts, and build engines if the request or the recipe says so."""
    plan = read_plan(run)
    if request.layout is not None:
        LAYOUTS.find(request.layout, "--layout")
    with locked_and_swept(run):
        stages = choose_exported(run, plan, request.stages, request.everything, say)
        settings = overridden(plan.export.onnx, request.onnx, "export.onnx")
        if "templates" in request.onnx and settings.labels is None and settings.labels_file is None:
            raise RecipeError("--template sets the prompts of a classifier's labels: add --labels or --labels-file.")
        export_artifacts(run, plan, stages, say, settings)
        if request.layout is not None:
            for stage in stages:
                job = LayoutJob(read_export(run / "export" / stage), run / stage)
                say(f"{stage}: {request.layout} -> {write_layout(request.layout, job, run / request.layout / stage)}")
        if request.tensorrt is not None:
            engines = overridden(plan.export.tensorrt or TensorRTSettings(), request.tensorrt, "export.tensorrt")
            make_target("tensorrt", engines, run, stages, plan, say)
        else:
            make_targets_of_recipe(run, stages, plan, say)


def export_artifacts(
    run: Path, plan: Plan, stages: Sequence[str], say: Say, settings: OnnxSettings | None = None
) -> None:
    """Export artifacts to ONNX, by default as the recipe says; existing exports are kept."""
    settings = settings or plan.export.onnx
    for stage in stages:
        target = run / "export" / stage
        if is_exported(run / stage, target, settings):
            say(f"{stage}: already exported ({target})")
        else:
            made = onnx_from_artifact(
                run / stage, target, settings, plan.test_sets(), lambda: evalsets(plan.data.train)
            )
            say(f"{stage}: {_export_text(made)} -> {target}")
        if settings.wants_extra_models:  # Otherwise the test data are not opened.
            for name, path in extra_models_from_export(target, settings, plan.test_sets()).items():
                say(f"{stage}: {name}, matches the separate encoders -> {path}")


def _export_text(made: Exported) -> str:
    cosines = ", ".join(f"{graph} {cosine:.6f}" for graph, cosine in made.least_cosines.items())
    return f"{made.precision} ONNX, {made.bytes / 1e6:.1f} MB, matches torch (minimum cosine: {cosines})"
