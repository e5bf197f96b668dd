"""`clipress bench-server RUN`: every model of a server under every load -> load.json and a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from clipress.bench.conditions import time_and_machine
from clipress.bench.fail_if import Gate, nowhere, unknown_metric
from clipress.bench.server.load import Windows, measure, numbered, run
from clipress.bench.server.protocols import RequestTemplate, checked_sender, open_wire
from clipress.bench.server.results import Load, LoadFigures, LoadResults, LoadRow
from clipress.errors import RecipeError
from clipress.progress import track

PLACES = ("model", "concurrency", "request_rate")
FIGURES = tuple(name for name in LoadFigures.model_fields if name not in {*PLACES, "stable", "windows", "triton"})
MAX_MESSAGES = 5  # distinct errors that are recorded per load


def loads_from(concurrency: str | None, request_rate: str | None) -> list[Load]:
    """Parse sweeps: `1,8,32`; `1:32` doubles from 1 to 32; `10:50:10` has steps, as in perf_analyzer. Raises RecipeError."""
    if concurrency is None and request_rate is None:
        concurrency = "1,8,32"
    closed = [] if concurrency is None else _sweep("--concurrency", concurrency, int)
    open_ = [] if request_rate is None else _sweep("--request-rate", request_rate, float)
    return [Load(concurrency=int(value)) for value in closed] + [Load(request_rate=value) for value in open_]


def _sweep(option: str, text: str, kind: Callable[[str], float]) -> list[float]:
    try:
        values = _steps(*map(kind, text.split(":"))) if ":" in text else [kind(part) for part in text.split(",")]
    except (ValueError, TypeError):
        values = []
    if not values or min(values) <= 0 or not all(np.isfinite(values)):
        raise RecipeError(f"{option} {text}: expected numbers above 0, as 1,8,32 or START:END or START:END:STEP.")
    return values


def _steps(start: float, end: float, step: float | None = None) -> list[float]:
    values = [start]
    while values[-1] < (after := values[-1] + (values[-1] if step is None else step)) <= end:
        values.append(after)
    return values


def bench_server(
    server: tuple[str, str, bool],
    templates: Sequence[RequestTemplate],
    loads: Sequence[Load],
    windows: Windows,
    about: Mapping[str, Any],
) -> LoadResults:
    """Put every load on every model, one after the other. Raises ServerError for a model that does not answer.

    Args:
        server: protocol, `host:port`, and whether it uses TLS.
        about: added to the conditions.
    """
    rows = run(_measure_all(server, templates, loads, windows), any(load.request_rate for load in loads))
    return LoadResults(conditions={**about, **_conditions(server[0], windows)}, rows=rows)


async def _measure_all(
    server: tuple[str, str, bool], templates: Sequence[RequestTemplate], loads: Sequence[Load], windows: Windows
) -> list[LoadRow]:
    wire, numbers, rows = open_wire(*server), numbered(), []
    url = f"{server[0]}://{server[1]}"
    try:
        senders = {one.model: await checked_sender(wire, one, url) for one in templates}
        cases = [(model, load) for model in senders for load in loads]
        for model, load in track(cases, len(cases), "load", "case"):
            found = await measure(senders[model], load, windows, wire.statistics, numbers)
            messages = tuple(found.errors()[:MAX_MESSAGES])
            rows.append(LoadRow(model=model, error_messages=messages, **dict(found.figures()), **found.times()))
    finally:
        await wire.close()
    return rows


def _conditions(protocol: str, windows: Windows) -> dict[str, Any]:
    return {
        **time_and_machine(),
        "tritonclient": version("tritonclient"),
        "protocol": protocol,
        "window_ms": windows.window,
        "warm_up_ms": windows.warm_up,
        "stability_percent": windows.stability,
        "latency": "from when a request was due to its whole answer, at the client; server's times are means per request",
        "arrivals": "open loop: Poisson process; latency counts from when a request was due",
        "reported": "the last three windows; a request belongs to the window of its answer",
        "batch": "one item per request",
    }


def places_of(models: Sequence[str], loads: Sequence[Load]) -> list[LoadRow]:
    """Return rows without figures, to check gates against before anything is measured."""
    figures = dict.fromkeys(FIGURES, float("nan")) | {"requests": 0, "errors": 0}
    return [
        LoadRow(model=model, **vars(load), **figures, stable=False, windows=(), triton={})
        for model in models
        for load in loads
    ]


def broken_by_load(gates: Sequence[Gate], rows: Sequence[LoadRow]) -> list[str]:
    """Return a message for each load under which a gate's condition is true.

    Raises RecipeError for a metric, or a place, that the results do not have.
    """
    messages = []
    for gate in gates:
        found = [row for row in rows if all(_is_at(getattr(row, key), value) for key, value in gate.where)]
        if gate.metric not in FIGURES:
            raise RecipeError(unknown_metric(gate, FIGURES))
        if not found:
            raise RecipeError(nowhere(gate))
        values = ((row, getattr(row, gate.metric)) for row in found)
        messages += [
            gate.message(value, (row.model, str(row.load)))
            for row, value in values
            if value is not None and gate.fails(value)
        ]
    return messages


def _is_at(found: Any, value: str) -> bool:
    try:
        return found is not None and type(found)(value) == found
    except ValueError:
        return False
