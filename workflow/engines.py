"""Make export targets, such as TensorRT engines, from a run's exports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipress.errors import ClipressError
from clipress.export.settings import TensorRTSettings
from clipress.export.targets import TARGETS, TargetJob
from clipress.export.tensorrt_target import report_engines
from clipress.export.to_tensorrt import engine_from_onnx, prepare
from clipress.progress import Say
from clipress.recipe import Section, overridden
from clipress.runtime.tensorrt import find_machine
from clipress.workflow.plan import Plan


def make_target(name: str, settings: Section, run: Path, stages: Sequence[str], plan: Plan, say: Say) -> None:
    """Make one target of a run's exports. Raises ClipressError if that is not possible."""
    home = run / "export"
    job = TargetJob({stage: home / stage for stage in stages}, home, plan.test_sets, say)
    TARGETS[name].make(job, settings)


def make_targets_of_recipe(run: Path, stages: Sequence[str], plan: Plan, say: Say) -> None:
    """Make every target of the recipe; report targets that are not possible here and continue."""
    for name, settings in plan.export.targets.items():
        try:
            make_target(name, settings, run, stages, plan, say)
        except ClipressError as error:
            say(f"Skipping export target {name}: {error}")


def build_engine(source: Path, settings: Mapping[str, Any], foreign: bool, say: Say) -> None:
    """Build the engine of one ONNX file beside it; `foreign` allows files that clipress did not export."""
    wanted = overridden(TensorRTSettings(), settings, "export.tensorrt")
    prepared = prepare(source, source.parent, wanted, foreign)
    report_engines(source.stem, [engine_from_onnx(prepared, find_machine(), wanted)], say)
