"""Latency in trtexec's terms. Models are measured in turns, so that a noisy moment of the machine hits all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

TURN_MS = 50.0  # how long one model runs before it is the next one's turn


def percentile(times: Sequence[float], percent: float) -> float:
    """Return trtexec's percentile of sorted times: sorted[max(n - 1 - int((1 - p / 100) n), 0)]."""
    n = len(times)
    return times[max(n - 1 - int((100 - percent) * n / 100), 0)]


def summary(times_ms: Sequence[float], batch: int, wall_ms: float) -> dict[str, float]:
    """Return min, max, mean, median, p90, p95, p99 in ms; queries per second over the wall time, and items per second."""
    times = sorted(times_ms)
    n = len(times)
    middle = (times[(n - 1) // 2] + times[n // 2]) / 2
    rate = n / wall_ms * 1000
    values = {
        "min_ms": times[0],
        "max_ms": times[-1],
        "mean_ms": sum(times) / n,
        "median_ms": middle,
        "p90_ms": percentile(times, 90),
        "p95_ms": percentile(times, 95),
        "p99_ms": percentile(times, 99),
        "throughput_qps": rate,
        "items_per_s": rate * batch,
    }
    return {name: round(value, 5) for name, value in values.items()} | {"iterations": n}


def measure_in_turns(
    queries: dict[str, Callable[[], Any]], *, warm_up_ms: float, duration_ms: float, iterations: int
) -> dict[str, tuple[np.ndarray, float]]:
    """Run each query in turns until each has had its duration and its iterations.

    Returns every sample in ms and the wall time in ms, by name. Warm-up is not counted.
    """
    for query in queries.values():
        _run_for(query, warm_up_ms, 1)
    times: dict[str, list[float]] = {name: [] for name in queries}
    spent = dict.fromkeys(queries, 0.0)
    while unfinished := [n for n in queries if spent[n] < duration_ms or len(times[n]) < iterations]:
        for name in unfinished:
            taken = _run_for(queries[name], min(TURN_MS, duration_ms), 1)
            times[name] += taken
            spent[name] += sum(taken)
    return {name: (np.asarray(taken), spent[name]) for name, taken in times.items()}


def _run_for(query: Callable[[], Any], duration_ms: float, least: int) -> list[float]:
    taken: list[float] = []
    total = 0.0
    while total < duration_ms or len(taken) < least:
        start = time.perf_counter_ns()
        query()
        taken.append((time.perf_counter_ns() - start) / 1e6)
        total += taken[-1]
    return taken
