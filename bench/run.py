"""`clipress bench`: models measured side by side -> rows of one table."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from clipress.artifact import read_header
from clipress.bench.accuracy import accuracy, write_items
from clipress.bench.compare import Ratio, speed_up
from clipress.bench.conditions import conditions
from clipress.bench.cost import cost
from clipress.bench.cpu_pinning import pinned
from clipress.bench.latency import RENEWING, Timings, measure_in_turns, summary, turn_ms
from clipress.bench.profile import profile
from clipress.bench.results import SCHEMA_VERSION, Case, Latency, Profile, Results, Row
from clipress.bench.runners import Runner, open_runner
from clipress.bench.selection import choose_kept, choose_runtime, interval, verdicts
from clipress.bench.settings import BenchSettings
from clipress.data.eval_sets import EvalSet
from clipress.errors import ArtifactError
from clipress.metrics.outcomes import Outcomes, percents, standard_errors
from clipress.progress import track
from clipress.runtime.cpu import processor, usable_cores
from clipress.storage import write_whole
from clipress.tasks import graphs_of, model_from_artifact

PROFILED = 20  # queries
Measured = Mapping[Case, Mapping[str, Timings]]
"""Case -> label -> timings."""


@dataclass(frozen=True)
class Subject:
    """One model to measure: its name in the results, its artifact and its export."""

    name: str
    artifact: Path
    export: Path
    has_accuracy: bool = True
    """Whether its accuracy is measured too."""


@dataclass(frozen=True)
class Opened:
    """One row of the table to be: a subject on a runner."""

    label: str
    subject: Subject
    runner: Runner


def bench(
    subjects: Sequence[Subject],
    sets: Sequence[EvalSet],
    settings: BenchSettings,
    folder: Path,
    *,
    about: Mapping[str, Any],
    profiled: bool = False,
) -> Results:
    """Measure accuracy, cost and latency of every subject on every backend, with the first one as the reference.

    What is too long for a table is written into `folder`: each row's outcome on every item, so that models can be
    compared item by item (`items/<name>.npz`), and the time of every query (`samples/<name>.json`).

    Args:
        sets: what accuracy is measured on; if empty, it is not measured.
        about: added to the conditions.
        profiled: also record where ONNX Runtime spends its time.
    """
    outcomes = _outcomes(subjects, sets, settings) if sets else {}
    with pinned(settings.cpus, settings.threads) as cpus:
        opened = [_opened(*one, settings) for one in _labelled(subjects, settings)]
        costs = {artifact: vars(cost(artifact)) for artifact in dict.fromkeys(one.artifact for one in subjects)}
        rows = [_row(one, outcomes.get(one.label, {}), costs[one.subject.artifact]) for one in opened]
        cases = _cases(opened, settings)
        timings = {case: _timed(case, opened, settings) for case in track(cases, len(cases), "latency", "case")}
        if profiled:
            rows = [_with_profiles(row, one, settings) for row, one in zip(rows, opened, strict=True)]
    rows = [_with_ratios(row, rows[0], timings, settings) for row in rows]
    _write_details(outcomes, timings, [one.label for one in opened], folder)

    def ratio(origin: str, other: str, case: Case) -> Ratio | None:
        measured = timings[case]
        return speed_up(measured[origin], measured[other]) if {origin, other} <= measured.keys() else None

    found = verdicts(rows, cases, ratio, settings.max_accuracy_drop, processor())
    across, kept = choose_runtime(rows, choose_kept(rows, found), cases, ratio, settings.max_accuracy_drop)
    return Results(
        schema_version=SCHEMA_VERSION,
        conditions=conditions(settings, sets, cpus, [row.device for row in rows], about),
        rows=rows,
        verdicts=[*found, *across],
        kept=kept,
    )


def graph_names(subjects: Sequence[Subject]) -> list[str]:
    """Return the names of all graphs that will be timed, from the artifacts alone; one of each task is loaded."""
    of_task = {read_header(one.artifact).get("task"): one.artifact for one in subjects}
    return list(dict.fromkeys(name for one in of_task.values() for name in graphs_of(model_from_artifact(one))))


def _labelled(subjects: Sequence[Subject], settings: BenchSettings) -> list[tuple[str, Subject, str]]:
    """Return every row to be: its label, its subject and its backend."""
    return [
        (subject.name if len(settings.backends) == 1 else f"{subject.name} ({backend})", subject, backend)
        for backend in settings.backends
        for subject in subjects
    ]


def _opened(label: str, subject: Subject, backend: str, settings: BenchSettings) -> Opened:
    runner = open_runner(backend, subject.artifact, subject.export, settings)
    check_answers(label, runner)
    return Opened(label, subject, runner)


def _outcomes(
    subjects: Sequence[Subject], sets: Sequence[EvalSet], settings: BenchSettings
) -> dict[str, dict[str, Outcomes]]:
    """Measure every row's accuracy, by label. On all CPUs allowed, since their number changes only how long it takes."""
    rows = _labelled([one for one in subjects if one.has_accuracy], settings)
    with pinned(settings.cpus or (), settings.threads):
        wide = settings.model_copy(update={"threads": usable_cores()})
        shown = track(rows, len(rows), "accuracy", "model")
        return {row[0]: accuracy(_opened(*row, wide).runner, sets) for row in shown}


def check_answers(label: str, runner: Runner) -> None:
    """Raise ArtifactError for a model whose outputs of random inputs are not finite, or have another shape."""
    for graph in runner.model.graphs.values():
        found = runner.run(graph.name)(graph.example(2))
        for output in graph.outputs:
            values, expected = np.asarray(found[output.name]), [2, *output.shape]
            if list(values.shape) != expected:
                raise ArtifactError(
                    f"{label}, graph '{graph.name}': expected {output.name} of shape {expected}, found "
                    f"{list(values.shape)}. Export it again: clipress export RUN"
                )
            if broken := int((~np.isfinite(values)).sum()):
                raise ArtifactError(
                    f"{label}, graph '{graph.name}': {broken} of {values.size} values of {output.name} are NaN or "
                    "infinite, so its speed is meaningless. Check the stage's log, and make the artifact again."
                )


def _row(one: Opened, outcomes: Mapping[str, Outcomes], costs: Mapping[str, Any]) -> Row:
    """Return a row with everything but what depends on other rows."""
    model = one.runner.model
    return Row(
        stage=one.label,
        artifact=one.subject.artifact.name,
        task=model.task,
        backend=one.runner.backend,
        device=one.runner.device,
        precision=model.precision,
        **costs,
        bytes=model.bytes,
        text_ids=next(
            (put.shape[0] for one in model.graphs.values() for put in one.inputs if put.dtype == "int64"), None
        ),
        exact_mode=one.runner.exact_mode,
        parity=dict(model.parity),
        lineage=read_header(one.subject.artifact)["lineage"],
        accuracy={key: round(value, 3) for key, value in percents(outcomes).items()},
        accuracy_se={key: round(value, 3) for key, value in standard_errors(outcomes).items()},
    )


def _cases(opened: Sequence[Opened], settings: BenchSettings) -> list[Case]:
    graphs = dict.fromkeys(graph for one in opened for graph in one.runner.model.graphs)
    return [
        Case(graph, batch, ids)
        for graph in graphs
        for batch in settings.batch
        for ids in (0, *settings.ids)
        if any(_has(one.runner, Case(graph, batch, ids)) for one in opened)
    ]


def _has(runner: Runner, case: Case) -> bool:
    """Return whether a runner's model has a case: its graph, and texts of that length where they are short."""
    graph = runner.model.graphs.get(case.graph)
    return graph is not None and (not case.ids or any(case.ids < (put.longest or 0) for put in graph.inputs))


def _timed(case: Case, opened: Sequence[Opened], settings: BenchSettings) -> dict[str, Timings]:
    """Time all models that have the case, in turns."""
    runners = {one.label: one.runner for one in opened if _has(one.runner, case)}
    return measure_in_turns(
        {label: runner.query(*case) for label, runner in runners.items()},
        warm_up_ms=settings.warm_up,
        duration_ms=settings.duration,
        iterations=settings.iterations,
        renew=renewable(case, runners, settings),
    )


def renewable(case: Case, runners: Mapping[str, Runner], settings: BenchSettings) -> dict[str, Callable[[], Any]]:
    """Return what opens each model anew, if all of them can do so within a few turns, else nothing.

    All or none: a model that is opened anew has colder caches than one that stays open.
    """
    if not all(runner.fresh_query for runner in runners.values()):
        return {}
    opening = {label: partial(runner.fresh_query, *case) for label, runner in runners.items()}
    for fresh in opening.values():
        start = time.perf_counter()
        fresh()
        if (time.perf_counter() - start) * 1000 > RENEWING * turn_ms(settings.duration):
            return {}
    return opening


def _with_profiles(row: Row, one: Opened, settings: BenchSettings) -> Row:
    """Profile every graph at the largest batch; only ONNX Runtime on the CPU reports where its time goes."""
    profiles: list[Profile] = []
    if row.backend == "onnxruntime":
        for graph in one.runner.model.graphs.values():
            own = [layer.name for layer in row.layers if layer.tower == graph.name]
            layers = own or [layer.name for layer in row.layers]
            path = one.runner.model.onnx(graph.name)
            profiles.append(profile(path, graph, max(settings.batch), settings.threads, PROFILED, layers))
    return row.model_copy(update={"profiles": tuple(profiles)})


def _with_ratios(row: Row, first: Row, timings: Measured, settings: BenchSettings) -> Row:
    """Add what is relative to the first row: the part of the parameters that is kept, and latencies with ratios."""
    latency = tuple(
        _latency(case, found[row.stage], found.get(first.stage), settings)
        for case, found in timings.items()
        if row.stage in found
    )
    kept = round(row.block_params / first.block_params, 4) if first.block_params else None
    return row.model_copy(update={"block_params_kept": kept, "latency": latency})


def _latency(case: Case, own: Timings, reference: Timings | None, settings: BenchSettings) -> Latency:
    ratio = None if reference is None else speed_up(reference, own)
    compared = {} if ratio is None else {"speed_up": round(ratio.value, 4), **interval(ratio)}
    place = {"tower": case.graph, "batch": case.batch, "ids": case.ids, "threads": settings.threads}
    return Latency(**place, **summary(own, case.batch), **compared)


def _write_details(
    outcomes: Mapping[str, Mapping[str, Outcomes]], timings: Measured, labels: Sequence[str], folder: Path
) -> None:
    files = _file_names(labels)
    if outcomes:
        write_items({files[label]: found for label, found in outcomes.items()}, folder / "items")
    write_samples({files[label]: _samples(label, timings) for label in labels}, folder / "samples")


def _samples(label: str, timings: Measured) -> dict[str, Any]:
    cases = []
    for place, measured in timings.items():
        if (own := measured.get(label)) is None:
            continue
        case = {
            "tower": place.graph,
            "batch": place.batch,
            "ids": place.ids,
            "rounds": own.rounds.tolist(),
            "starts_ms": own.starts.round(3).tolist(),
            "latency_ms": own.latency.round(5).tolist(),
        }
        if own.enqueue is not None:
            case["enqueue_ms"] = own.enqueue.round(5).tolist()
        cases.append(case)
    return {"schema_version": SCHEMA_VERSION, "stage": label, "cases": cases}


def write_samples(samples: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Write every query's time as `<folder>/<name>.json`; older contents of the folder are replaced."""

    def fill(aside: Path) -> None:
        for name, content in samples.items():
            (aside / f"{name}.json").write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")

    write_whole(folder, fill)


def _file_names(labels: Sequence[str]) -> dict[str, str]:
    """Return a distinct file name per label, on file systems that ignore case too."""
    names: dict[str, str] = {}
    for label in labels:
        plain = re.sub(r"[^\w.+-]+", "-", label).strip("-.") or "model"
        taken = {name.lower() for name in names.values()}
        tries = (plain if number == 1 else f"{plain}-{number}" for number in range(1, len(labels) + 1))
        names[label] = next(name for name in tries if name.lower() not in taken)
    return names
