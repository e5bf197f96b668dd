"""`clipress bench`: models measured side by side -> rows of one table."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from clipress import __version__
from clipress.artifact import read_header
from clipress.bench.accuracy import accuracy, write_items
from clipress.bench.compare import Ratio, speed_up
from clipress.bench.cost import cost
from clipress.bench.cpu_pinning import pinned
from clipress.bench.latency import ROUNDS, TURN_MS, Timings, measure_in_turns, summary
from clipress.bench.profile import profile
from clipress.bench.runners import Runner, input_shape, noise, open_runner
from clipress.bench.selection import interval, kept, verdicts
from clipress.bench.settings import BenchSettings
from clipress.data.eval_sets import EvalSet
from clipress.errors import ArtifactError
from clipress.metrics.outcomes import percents, standard_errors
from clipress.progress import track
from clipress.runtime.cpu import processor
from clipress.storage import write_text_whole, write_whole

SCHEMA_VERSION = 1
PROFILED = 20  # queries
RENEWING = 5  # turns that opening a model may take to be done every round
Case = tuple[str, int]  # a tower and a batch


@dataclass(frozen=True)
class Subject:
    """One model to measure: what it is called in the results, its artefact and its export."""

    name: str
    artifact: Path
    export: Path


def bench(
    subjects: Sequence[Subject],
    sets: Sequence[EvalSet],
    settings: BenchSettings,
    folder: Path,
    *,
    about: dict[str, Any],
    profiled: bool = False,
) -> dict[str, Any]:
    """Measure accuracy, cost and latency of every subject on every backend, the first one the reference.

    Writes into `folder` what is too long for a table: `items/<name>.npz`, what each model made of each item, so that
    models can be compared item by item; `samples/<name>.json`, the time of every query. Without `sets` accuracy is not
    measured. `about` goes into the conditions. Returns results.json's content.
    """
    with pinned(settings.cpus, settings.threads) as cpus:
        named = {
            _label(subject, backend, settings): (
                subject,
                open_runner(backend, subject.artifact, subject.export, settings),
            )
            for backend in settings.backends
            for subject in subjects
        }
        runners = {label: runner for label, (_, runner) in named.items()}
        for label, runner in runners.items():
            check_answers(label, runner)
        rows, outcomes = [], {}
        for label, (subject, runner) in track(named.items(), len(named), "accuracy", "model"):
            found = outcomes[label] = accuracy(runner, sets) if sets else {}
            rows.append(_row(label, subject, runner) | _told(found))
        for row in rows:
            row["block_params_kept"] = round(row["block_params"] / rows[0]["block_params"], 4)
        cases = [(tower, batch) for tower in ("image", "text") for batch in settings.batch]
        timings = {case: _timed(case, runners, settings) for case in track(cases, len(cases), "latency", "case")}
        if profiled:
            for row, (subject, runner) in zip(rows, named.values(), strict=True):
                row["profiles"] = _profiles(row, subject, runner, settings)
    for row in rows:
        row["latency"] = [_latency(row["stage"], rows[0]["stage"], case, timings[case], settings) for case in cases]
    files = _file_names(list(named))
    if sets:
        write_items({files[label]: found for label, found in outcomes.items()}, folder / "items")
    write_samples({files[label]: _samples(label, timings) for label in named}, folder / "samples")

    def ratio(origin: str, other: str, case: Case) -> Ratio:
        return speed_up(timings[case][origin], timings[case][other])

    told = verdicts(rows, cases, ratio, settings.max_loss, processor())
    return {
        "schema_version": SCHEMA_VERSION,
        "conditions": about | conditions(settings, sets, cpus, [row["device"] for row in rows]),
        "rows": rows,
        "verdicts": told,
        "kept": kept(rows, told),
    }


def check_answers(label: str, runner: Runner) -> None:
    """Raise ArtifactError for a model whose embeddings of noise are not finite, or of another shape than [B, D]."""
    for tower in ("image", "text"):
        found = np.asarray(runner.encode(tower)(noise(tower, (2, *input_shape(runner.exported, tower)))))
        if found.ndim != 2 or len(found) != 2:
            raise ArtifactError(f"{label}, {tower} tower: embeddings [2, D] are asked for, found {list(found.shape)}.")
        broken = int((~np.isfinite(found)).sum())
        if broken:
            raise ArtifactError(
                f"{label}, {tower} tower: {broken} of {found.size} numbers in its embeddings are NaN or infinite. "
                "Its speed would mean nothing; make the artefact again and look at the stage's log."
            )


def _label(subject: Subject, backend: str, settings: BenchSettings) -> str:
    return subject.name if len(settings.backends) == 1 else f"{subject.name} ({backend})"


def _row(label: str, subject: Subject, runner: Runner) -> dict[str, Any]:
    return {
        "stage": label,
        "artifact": subject.artifact.name,
        "backend": runner.backend,
        "device": getattr(runner, "device", "cpu"),
        "precision": runner.exported.precision,
        **cost(subject.artifact),
        "bytes": runner.exported.bytes,
        "exact_mode": getattr(runner, "exact_mode", False),
        "parity": runner.exported.parity,
        "lineage": read_header(subject.artifact)["lineage"],
    }


def _told(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "accuracy": {key: round(value, 3) for key, value in percents(found).items()},
        "accuracy_se": {key: round(value, 3) for key, value in standard_errors(found).items()},
    }


def _timed(case: Case, runners: dict[str, Runner], settings: BenchSettings) -> dict[str, Timings]:
    """Time all models in turns, on one tower and batch."""
    return measure_in_turns(
        {label: runner.query(*case) for label, runner in runners.items()},
        warm_up_ms=settings.warm_up,
        duration_ms=settings.duration,
        iterations=settings.iterations,
        renew=_renewable(case, runners, settings),
    )


def _renewable(case: Case, runners: dict[str, Runner], settings: BenchSettings) -> dict[str, Callable[[], Any]]:
    """Return what opens each model anew, if all can, and none takes more than a few turns for it.

    All or none: a model that is opened anew has colder caches than one that stays.
    """
    if not all(hasattr(runner, "fresh_query") for runner in runners.values()):
        return {}
    opening = {label: partial(runner.fresh_query, *case) for label, runner in runners.items()}
    for fresh in opening.values():
        start = time.perf_counter()
        fresh()
        if (time.perf_counter() - start) * 1000 > RENEWING * _turn_ms(settings):
            return {}
    return opening


def _turn_ms(settings: BenchSettings) -> float:
    return min(TURN_MS, settings.duration / ROUNDS)


def _latency(
    label: str, reference: str, case: Case, timings: dict[str, Timings], settings: BenchSettings
) -> dict[str, Any]:
    ratio = speed_up(timings[reference], timings[label])
    where = {"tower": case[0], "batch": case[1], "threads": settings.threads}
    return where | summary(timings[label], case[1]) | {"speed_up": round(ratio.value, 4), **interval(ratio)}


def _profiles(row: dict[str, Any], subject: Subject, runner: Runner, settings: BenchSettings) -> list[dict[str, Any]]:
    """Profile both towers at the largest batch; only ONNX Runtime on the CPU can tell."""
    if runner.backend != "onnxruntime":
        return []
    batch = max(settings.batch)
    found = []
    for tower in ("image", "text"):
        layers = [layer["name"] for layer in row["layers"] if layer["tower"] == tower]
        path = runner.exported.onnx(tower)
        found.append(profile(path, tower, batch, settings.threads, PROFILED, layers))
    return found


def _samples(label: str, timings: dict[Case, dict[str, Timings]]) -> dict[str, Any]:
    cases = []
    for (tower, batch), measured in timings.items():
        own = measured[label]
        case = {
            "tower": tower,
            "batch": batch,
            "rounds": own.rounds.tolist(),
            "starts_ms": own.starts.round(3).tolist(),
            "latency_ms": own.latency.round(5).tolist(),
        }
        if own.enqueue is not None:
            case["enqueue_ms"] = own.enqueue.round(5).tolist()
        cases.append(case)
    return {"schema_version": SCHEMA_VERSION, "stage": label, "cases": cases}


def write_samples(samples: dict[str, dict[str, Any]], folder: Path) -> None:
    """Write every query's time as `<folder>/<name>.json`; what the folder held is replaced."""

    def fill(aside: Path) -> None:
        for name, content in samples.items():
            (aside / f"{name}.json").write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")

    write_whole(folder, fill)


def _file_names(labels: Sequence[str]) -> dict[str, str]:
    """Return a file name per label that is its own on every system."""
    names: dict[str, str] = {}
    for label in labels:
        plain = re.sub(r"[^\w.+-]+", "-", label).strip("-.") or "model"
        taken = {name.lower() for name in names.values()}
        tries = (plain if number == 1 else f"{plain}-{number}" for number in range(1, len(labels) + 1))
        names[label] = next(name for name in tries if name.lower() not in taken)
    return names


def conditions(
    settings: BenchSettings, sets: Sequence[EvalSet], cpus: list[int] | None, devices: Sequence[str]
) -> dict[str, Any]:
    """Return everything a number needs to be believed."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "clipress": __version__,
        **{name: known for name in ("onnxruntime", "torch", "numpy") if (known := _version(name))},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        **processor().record(),
        "devices": list(dict.fromkeys(devices)),
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "threads": settings.threads,
        "cpu_affinity": "not known" if cpus is None else cpus,
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "backends": list(settings.backends),
        "dtype_of_torch": settings.dtype,
        "warm_up_ms": settings.warm_up,
        "duration_ms": settings.duration,
        "iterations_at_least": settings.iterations,
        "interleaved": True,
        "turn_ms": _turn_ms(settings),
        "sessions": f"opened anew each round where that takes no more than {RENEWING} turns",
        "order": "rounds of one turn each, every other round backwards",
        "clock": "host, from the call to the answer (perf_counter)",
        "transfers": "none: inputs and outputs stay where the model runs",
        "ratios": "Hodges-Lehmann over rounds of the log ratio of medians, 95 % interval of Wilcoxon's signed ranks",
        "data": {s.name: {"items": len(s.source), "fingerprint": s.source.fingerprint} for s in sets},
        "protocol": "text_rK: text for an image, any own caption counts; image_rK: image for a text; ties count as wrong; "
        "standard errors count an image and its captions as one",
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # onnxruntime-gpu goes by another name
        return None


def write_results(results: dict[str, Any], folder: Path) -> Path:
    """Write results.json."""
    path = folder / "results.json"
    write_text_whole(path, json.dumps(results, indent=1) + "\n")
    return path
