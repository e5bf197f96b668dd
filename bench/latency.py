"""Latency in trtexec's terms. Models are measured in turns, so that a noisy moment of the machine hits all of them.

A round is one turn of every model. Every other round runs backwards, so that a machine that slows down steadily favours
no model. Samples stay grouped by round: `compare.speed_up` pairs models round by round.

Where a program's memory happens to lie can change the speed of a small model by a percent, for as long as the model stays
loaded (Mytkowicz et al., Producing Wrong Data Without Doing Anything Obviously Wrong!, 2009). Two sessions of one file
then differ, and no number of queries reveals it. Sessions are therefore opened anew each round where that is cheap: luck
becomes noise, and the interval of a ratio covers it. (A small ViT against itself, batch 1, 20 rounds: the 95 % interval
contained 1 in 23 of 25 trials, and in 15 of 25 when both sessions were kept.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

TURN_MS = 50.0  # how long one model runs at most before the next one has its turn
ROUNDS = 20  # at least, unless fewer iterations are required
RENEWING = 5  # a session is opened anew each round if that takes no longer than so many turns

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Enqueued:
    """A query to a device: `enqueue` returns once the work is submitted, `wait` when it is done."""

    enqueue: Callable[[], Any]
    wait: Callable[[], Any]

    def __call__(self) -> None:
        """Run the query to completion."""
        self.enqueue()
        self.wait()


@dataclass(frozen=True)
class Timings:
    """Every counted query of one model, in the order they ran; all times in ms."""

    latency: np.ndarray
    """[queries] From the call to the result."""
    rounds: np.ndarray
    """[rounds] How many queries ran in each round."""
    starts: np.ndarray
    """[rounds] When each turn began, counted from the first turn of any model."""
    enqueue: np.ndarray | None = None
    """[queries] The part until the call returned; None where the call returns with the result."""

    def medians(self) -> np.ndarray:
        """Return the median latency of each round."""
        return np.asarray([np.median(turn) for turn in np.split(self.latency, np.cumsum(self.rounds)[:-1])])


def percentile(times: Sequence[float], percent: float) -> float:
    """Return trtexec's percentile of sorted times: sorted[max(n - 1 - int((1 - p / 100) n), 0)]."""
    n = len(times)
    return times[max(n - 1 - int((100 - percent) * n / 100), 0)]


def summary(timings: Timings, batch: int) -> dict[str, float]:
    """Return trtexec's figures, by their names in results.json: latency in ms, throughput, number of queries.

    `cv_percent` is the coefficient of variation, population standard deviation over mean; trtexec calls a measurement
    unstable above 2.5. Enqueue times are included for runners on devices.
    """
    times = sorted(timings.latency.tolist())
    n, total = len(times), sum(times)
    middle = (times[(n - 1) // 2] + times[n // 2]) / 2
    rate = n / total * 1000 if total else 0.0
    values = {
        "min_ms": times[0],
        "max_ms": times[-1],
        "mean_ms": total / n,
        "median_ms": middle,
        **{f"p{percent}_ms": percentile(times, percent) for percent in (50, 90, 95, 99)},
        "cv_percent": float(100 * np.std(times) / (total / n)) if total else 0.0,
        "throughput_qps": rate,
        "items_per_s": rate * batch,
    }
    if timings.enqueue is not None:
        enqueue = sorted(timings.enqueue.tolist())
        values |= {
            "enqueue_mean_ms": sum(enqueue) / n,
            "enqueue_median_ms": (enqueue[(n - 1) // 2] + enqueue[n // 2]) / 2,
            "enqueue_p99_ms": percentile(enqueue, 99),
        }
    return {name: round(value, 5) for name, value in values.items()} | {"iterations": n, "rounds": len(timings.rounds)}


def turn_ms(duration_ms: float) -> float:
    """Return how long one turn of one model lasts, for a duration per model."""
    return min(TURN_MS, duration_ms / ROUNDS)


def measure_in_turns(
    queries: Mapping[Name, Callable[[], Any]],
    *,
    warm_up_ms: float,
    duration_ms: float,
    iterations: int,
    renew: Mapping[Name, Callable[[], Callable[[], Any]]] | None = None,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[Name, Timings]:
    """Run queries in turns until each has had its duration and its iterations; warm-up is not counted.

    Every model takes part in every round, so that rounds can be paired. There are at least `iterations` rounds, or 20 if
    that is less. `renew` holds, by name, a function that opens a model anew and returns its query; it is called every
    round, and the new query is warmed up briefly. `clock` returns nanoseconds.
    """
    queries, renew = dict(queries), renew or {}
    for query in queries.values():
        _turn(query, warm_up_ms, clock)
    turns: dict[Name, list[np.ndarray]] = {name: [] for name in queries}
    starts: dict[Name, list[int]] = {name: [] for name in queries}
    spent, answered = dict.fromkeys(queries, 0.0), dict.fromkeys(queries, 0)
    order = list(queries)
    rounds = min(iterations, ROUNDS)  # one busy moment can use up the whole duration, and leave no rounds to pair
    while len(starts[order[0]]) < rounds or any(
        spent[name] < duration_ms or answered[name] < iterations for name in queries
    ):
        queries |= {name: renew[name]() for name in order if name in renew}
        for name in order:
            if name in renew:
                _turn(queries[name], warm_up_ms / ROUNDS, clock)
            starts[name].append(clock())
            turn = _turn(queries[name], turn_ms(duration_ms), clock)
            turns[name].append(turn)
            spent[name] += float(turn[:, 0].sum())
            answered[name] += len(turn)
        order.reverse()
    began = min(times[0] for times in starts.values())
    return {
        name: Timings(
            latency=np.concatenate(turns[name])[:, 0],
            rounds=np.asarray([len(turn) for turn in turns[name]]),
            starts=(np.asarray(starts[name]) - began) / 1e6,
            enqueue=np.concatenate(turns[name])[:, 1] if isinstance(query, Enqueued) else None,
        )
        for name, query in queries.items()
    }


def _turn(query: Callable[[], Any], duration_ms: float, clock: Callable[[], int]) -> np.ndarray:
    """Run a query for a while, at least once. Returns ms [queries, 2]: latency, and enqueue time where there is one."""
    taken: list[tuple[float, float]] = []
    total = 0.0
    while total < duration_ms or not taken:
        start = back = clock()
        if isinstance(query, Enqueued):
            query.enqueue()
            back = clock()
            query.wait()
        else:
            query()
        latency = (clock() - start) / 1e6
        taken.append((latency, (back - start) / 1e6))
        total += latency
    return np.asarray(taken)
