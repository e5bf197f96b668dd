"""The types of load.json, which is written here alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from clipress.bench.results import Strict
from clipress.storage import write_text_whole

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Load:
    """One of the two is set: requests at any time (closed loop), or requests per second (open loop)."""

    concurrency: int | None = None
    request_rate: float | None = None

    def __str__(self) -> str:
        return f"concurrency {self.concurrency}" if self.concurrency else f"{self.request_rate:g} requests/s"


class Served(Strict):
    """Triton's own figures of one model: means per request in ms, and counts."""

    queue_ms: float
    compute_input_ms: float
    compute_infer_ms: float
    compute_output_ms: float
    mean_batch: float | None
    """Rows per execution; None if the model did not run."""
    requests: int
    executions: int
    cache_hits: int


class LoadFigures(Strict):
    """Client-side figures under one load, in ms and requests per second; None (NaN in memory) without any answer."""

    concurrency: int | None
    request_rate: float | None
    infer_per_s: float | None
    mean_ms: float | None
    p50_ms: float | None
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    lag_p99_ms: float | None
    """Delay of the client in sending."""
    requests: int
    errors: int
    stable: bool
    windows: tuple[float, ...]
    """Answers per second in each window."""
    client_us: float | None
    """CPU time of the client, per request."""
    client_cores: float | None
    triton: dict[str, Served]
    """By model."""

    @property
    def load(self) -> Load:
        return Load(self.concurrency, self.request_rate)


class LoadRow(LoadFigures):
    """One model under one load, with the times of every request."""

    model: str
    error_messages: tuple[str, ...] = ()
    due_ms: tuple[float, ...] = ()
    """When each request was due, after the first window began."""
    latency_ms: tuple[float, ...] = ()


class LoadResults(Strict):
    """The content of load.json."""

    schema_version: Literal[1] = SCHEMA_VERSION
    conditions: dict[str, Any]
    rows: tuple[LoadRow, ...]


def write_load(results: LoadResults, folder: Path) -> Path:
    """Write load.json; latencies are null if nothing was answered."""
    path = folder / "load.json"
    write_text_whole(path, results.model_dump_json() + "\n")  # pydantic writes NaN as null.
    return path


def load_table(results: LoadResults) -> str:
    """Return figures as text: what a client sees, and below it Triton's own figures of each model that took part."""
    head = f"{'model':<18}{'load':>16}{'infer/s':>10}" + "".join(f"{f'p{part} ms':>9}" for part in (50, 90, 95, 99))
    lines = [f"{head}{'errors':>8}  client"]
    for row in results.rows:
        shown = [_number(value, ".2f") for value in (row.p50_ms, row.p90_ms, row.p95_ms, row.p99_ms)]
        times = "".join(text.rjust(9) for text in shown)
        lines.append(
            f"{row.model:<18}{row.load!s:>16}{_number(row.infer_per_s, '.1f'):>10}{times}{row.errors:>8}  "
            f"{_number(row.client_us, '.0f')} us/request, {_number(row.client_cores, '.2f')} cores"
            + ("" if row.stable else ", not stable")
        )
        for model, served in row.triton.items():
            batch = "" if served.mean_batch is None else f", mean batch {served.mean_batch:.1f}"
            hits = f", {served.cache_hits} from its cache" if served.cache_hits else ""
            lines.append(
                f"  {model:<16} queue {served.queue_ms:.2f} ms, compute input {served.compute_input_ms:.2f}, "
                f"infer {served.compute_infer_ms:.2f}, output {served.compute_output_ms:.2f}{batch}{hits}"
            )
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)
