"""`clipress bench`: every stage's export measured side by side -> rows of one table."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clipress import __version__
from clipress.artifact import read_header, write_text_whole
from clipress.bench.accuracy import accuracy, write_items
from clipress.bench.cost import cost
from clipress.bench.latency import measure_in_turns, summary
from clipress.bench.runners.onnxruntime import OnnxRuntimeRunner
from clipress.bench.settings import BenchSettings
from clipress.data.evalsets import EvalSet
from clipress.metrics.outcomes import percents, standard_errors

SCHEMA_VERSION = 1


def bench(
    artifacts: Sequence[Path],
    exports: Sequence[Path],
    sets: Sequence[EvalSet],
    settings: BenchSettings,
    title: str,
    items: Path,
) -> dict[str, Any]:
    """Measure accuracy, cost and latency of exported artefacts, first one the reference. Returns results.json's content.

    What each model made of each item goes to `<items>/<stage>.npz`, so that models can be compared item by item.
    """
    runners = {folder.name: OnnxRuntimeRunner(folder, settings.threads) for folder in exports}
    rows, outcomes = [], {}
    for artifact, runner in zip(tqdm(artifacts, desc="accuracy", unit="model"), runners.values(), strict=True):
        found = outcomes[artifact.name] = accuracy(runner, sets)
        header = read_header(artifact)
        rows.append(
            {
                "stage": artifact.name,
                "backend": runner.backend,
                "precision": runner.exported.precision,
                **cost(artifact),
                "bytes": runner.exported.bytes,
                "accuracy": {key: round(value, 3) for key, value in percents(found).items()},
                "accuracy_se": {key: round(value, 3) for key, value in standard_errors(found).items()},
                "latency": [],
                "parity": runner.exported.parity,
                "lineage": header["lineage"],
            }
        )
    write_items(outcomes, items)
    for row in rows:
        row["block_params_kept"] = round(row["block_params"] / rows[0]["block_params"], 4)
    _measure(rows, runners, settings)
    return {
        "schema_version": SCHEMA_VERSION,
        "conditions": conditions(settings, sets, title),
        "rows": rows,
    }


def _measure(rows: list[dict[str, Any]], runners: dict[str, OnnxRuntimeRunner], settings: BenchSettings) -> None:
    """Time all models in turns, one tower and batch at a time."""
    cases = [(tower, batch) for tower in ("image", "text") for batch in settings.batch]
    for tower, batch in tqdm(cases, desc="latency", unit="case"):
        queries: dict[str, Callable[[], Any]] = {name: runner.query(tower, batch) for name, runner in runners.items()}
        measured = measure_in_turns(
            queries, warm_up_ms=settings.warm_up, duration_ms=settings.duration, iterations=settings.iterations
        )
        for row in rows:
            times, wall = measured[row["stage"]]
            figures = summary(times.tolist(), batch, wall)
            row["latency"].append({"tower": tower, "batch": batch, "threads": settings.threads} | figures)


def conditions(settings: BenchSettings, sets: Sequence[EvalSet], title: str) -> dict[str, Any]:
    """Return everything a number needs to be believed."""
    return {
        "recipe": title,
        "command": f"clipress bench runs/{title}",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "clipress": __version__,
        **{name: version(name) for name in ("onnxruntime", "torch", "numpy")},
        "python": platform.python_version(),
        **processor(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "threads": settings.threads,
        "warm_up_ms": settings.warm_up,
        "duration_ms": settings.duration,
        "iterations_at_least": settings.iterations,
        "interleaved": True,
        "transfers": "none (CPU)",
        "data": {s.name: {"items": len(s.source), "fingerprint": s.source.fingerprint} for s in sets},
        "protocol": "text_rK: text for an image, any own caption counts; image_rK: image for a text; ties count as wrong; "
        "standard errors count an image and its captions as one",
    }


def processor() -> dict[str, Any]:
    """Return the processor's name, core count and the instruction sets that matter to INT8."""
    name, flags = platform.processor() or platform.machine(), set()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
    known = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")
    return {"processor": name, "cores": os.cpu_count(), "isa": [flag for flag in known if flag in flags]}


def write_results(results: dict[str, Any], folder: Path) -> Path:
    """Write results.json."""
    path = folder / "results.json"
    write_text_whole(path, json.dumps(results, indent=1) + "\n")
    return path
