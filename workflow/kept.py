"""Which artifact of a run a command uses, and in which runtime: what bench kept, unless the user names another.

Every command that takes a run and uses one of its artifacts asks here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from clipress.bench.results import read_kept
from clipress.progress import Say
from clipress.runtime.sessions import ONNX_RUNTIME


class Artifacts(Protocol):
    """What is asked of a run: its plan, or its outline."""

    artifacts: list[str]

    def artifact(self, name: str | None) -> str:
        """Return an artifact's name, by default the last one. Raises RecipeError for an unknown name."""


@dataclass(frozen=True)
class Choice:
    """An artifact of a run, and the runtime for its export."""

    stage: str
    runtime: str = ONNX_RUNTIME


def results_of(run: Path) -> Path:
    """Return where a run's measurements are."""
    return run / "bench" / "results.json"


def choose_artifact(
    run: Path, plan: Artifacts, stage: str | None, say: Say, doing: str, runtime: str | None = None
) -> Choice:
    """Return the named artifact; by default the one that bench kept, else the last one.

    Where bench kept another artifact than the last one, or another runtime than ONNX Runtime, that is said in a line.

    Args:
        stage: an artifact's name, as the user gave it.
        doing: what the command does, such as "Serving".
        runtime: the only one that the command can use, or that the user named; None: the one that bench preferred, or ONNX Runtime
            for an artifact that the user named.

    Raises RecipeError for an unknown name.
    """
    if stage is not None:
        return Choice(plan.artifact(stage), runtime or ONNX_RUNTIME)
    last, results = plan.artifact(None), results_of(run)
    kept = read_kept(results, run, last, runtime)
    if kept is None:
        return Choice(last, runtime or ONNX_RUNTIME)
    chosen = Choice(kept.artifact, kept.backend)
    instead = f" instead of {last}" if chosen.stage != last else ""
    where = f" in {chosen.runtime}" if chosen.runtime != runtime and chosen.runtime != ONNX_RUNTIME else ""
    if instead or where:
        say(f"{doing} {chosen.stage}{where}{instead}, as {results} recommends. Override: --stage {last}")
    return chosen


def choose_exported(run: Path, plan: Artifacts, stages: tuple[str, ...], everything: bool, say: Say) -> list[str]:
    """Return the artifacts to export: those named, else the one that bench kept, or all where it kept none."""
    if stages:
        return [plan.artifact(stage) for stage in stages]
    kept = None if everything else read_kept(results_of(run), run, plan.artifact(None))
    if kept is None:
        return plan.artifacts
    say(f"Exporting {kept.artifact}, which {results_of(run)} recommends. Override: --all, or --stage NAME")
    return [kept.artifact]
