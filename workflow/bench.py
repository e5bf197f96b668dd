"""Measure artifacts side by side, and the latency of narrower blocks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipress.bench.fail_if import broken, check, gate_from
from clipress.bench.latency_table import cost_table, cuttables
from clipress.bench.report import comparison, table, write_report
from clipress.bench.results import Results, write_results
from clipress.bench.run import Subject, bench, graph_names
from clipress.bench.runners import RUNNERS
from clipress.bench.settings import BenchSettings
from clipress.progress import Say, progress_bar
from clipress.recipe import overridden
from clipress.runtime.cpu import processor
from clipress.storage import locked_and_swept, write_text_whole
from clipress.tasks import model_from_artifact
from clipress.workflow.export import export_artifacts
from clipress.workflow.plan import Plan, read_plan


@dataclass(frozen=True)
class BenchRequest:
    """What a measurement changes in the first run's recipe."""

    stages: tuple[str, ...] = ()
    """Artifacts to compare; default: all of one run, the last one of several."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings that replace those of `bench`."""
    fail_if: tuple[str, ...] = ()
    """Conditions that must not hold, such as "p99_ms > 10"; see bench/fail_if.py."""
    accuracy: bool = True
    profile: bool = False
    out: Path | None = None
    """Where the results go; default: <run>/bench, or <run>/bench/compared for a comparison."""
    command: str = ""
    """Recorded in the results."""


@dataclass(frozen=True)
class Measured:
    """Results, and a message for each condition of `fail_if` that holds."""

    results: Results
    broken: list[str]


def bench_recipe(run: Path, plan: Plan, say: Say) -> Results:
    """Measure all artifacts of a run as its recipe says, and write results and report."""
    subjects = name_subjects([(run, stage) for stage in plan.artifacts], several_runs=False)
    about = {"recipe": plan.recipe.name, "command": f"clipress bench {run}"}
    results = bench(subjects, plan.test_sets(), plan.bench, run / "bench", about=about)
    _report(results, run / "bench", say)
    return results


def bench_runs(runs: Sequence[Path], request: BenchRequest, say: Say) -> Measured:
    """Measure the artifacts of one run, or compare artifacts of several; missing exports are made first.

    Settings and data are those of the first run. Everything in the request is validated before anything is measured.
    """
    gates = [gate_from(text) for text in request.fail_if]
    plans = [read_plan(run) for run in runs]
    for backend in request.settings.get("backends", ()):
        RUNNERS.find(backend, "--runner")
    settings = overridden(plans[0].bench, request.settings, "bench")
    compared = len(runs) > 1 or bool(request.stages)
    chosen = [_choose_stages(plan, request.stages, len(runs) > 1) for plan in plans]
    artifacts = [(run, stage) for run, stages in zip(runs, chosen, strict=True) for stage in stages]
    subjects = name_subjects(artifacts, several_runs=len(runs) > 1)
    sets = plans[0].test_sets() if request.accuracy else []
    graphs = graph_names(subjects) if any(key == "tower" for gate in gates for key, _ in gate.where) else None
    names = [subject.name for subject in subjects], settings.backends, settings.batch, [one.name for one in sets]
    check(gates, *names, graphs)
    out = request.out or runs[0] / "bench" / ("compared" if compared else "")
    about = {"recipe": plans[0].recipe.name, "command": request.command}
    with ExitStack() as locks:
        if _needs_exports(settings):
            for run in {run.resolve(): run for run in runs}.values():
                locks.enter_context(locked_and_swept(run))
            for run, plan, stages in zip(runs, plans, chosen, strict=True):
                export_artifacts(run, plan, stages, say)
        results = bench(subjects, sets, settings, out, about=about, profiled=request.profile)
        _report(results, out, say)
    if compared:
        say(comparison(results))
    return Measured(results, broken(gates, results))


def _choose_stages(plan: Plan, stages: Sequence[str], several_runs: bool) -> list[str]:
    if stages:
        return [plan.artifact(stage) for stage in stages]
    return [plan.artifact(None)] if several_runs else plan.artifacts


def _needs_exports(settings: BenchSettings) -> bool:
    return any(not backend.startswith("torch") for backend in settings.backends)


def _report(results: Results, folder: Path, say: Say) -> None:
    written, page = write_results(results, folder), write_report(results, folder)
    say(table(results))
    say(f"Results: {written}   Report to open in a browser: {page}")


def name_subjects(artifacts: Sequence[tuple[Path, str]], several_runs: bool) -> list[Subject]:
    """Name each subject by its stage, or by run and stage; repeated names get a number."""
    names: list[str] = []
    for run, stage in artifacts:
        name = f"{run.resolve().name}/{stage}" if several_runs else stage
        number = sum(known == name or known.startswith(f"{name} #") for known in names)
        names.append(f"{name} #{number + 1}" if number else name)
    return [
        Subject(name, run / stage, run / "export" / stage) for name, (run, stage) in zip(names, artifacts, strict=True)
    ]


@dataclass(frozen=True)
class LatencyTableRequest:
    """How a latency table is measured."""

    stage: str | None = None
    """Artifact whose blocks are measured; default: the first one."""
    batch: int = 8
    threads: int = 1
    duration: int = 200
    """Milliseconds per width."""


def measure_latency_table(run: Path, request: LatencyTableRequest, out: Path) -> None:
    """Measure blocks at smaller widths on this machine and write the table that a latency budget reads."""
    plan = read_plan(run)
    model = model_from_artifact(run / (plan.artifact(request.stage) if request.stage else plan.artifacts[0]))
    with progress_bar(len(cuttables(model.module)), "latency table", "kind") as bar:
        measured = cost_table(model, request.batch, request.threads, request.duration, lambda _: bar.update())
    write_text_whole(out, json.dumps(measured | {"conditions": processor().record()}, indent=1) + "\n")
