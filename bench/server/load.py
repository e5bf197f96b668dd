"""Load on a server in perf_analyzer's terms: a closed loop (`concurrency` requests at any time) or an open loop
(`request_rate` requests per second, whether or not answers come).

Arrivals of an open loop are a Poisson process, as in MLPerf's server scenario, and latency counts from the moment a request
was due: a server that stalls also makes the requests behind it late, which a client that waits for answers would never
notice (coordinated omission; Tene, How NOT to Measure Latency, 2015).

Load is kept up while windows pass; a request belongs to the window in which its answer arrived. Once throughput and mean
latency of the last three windows differ by no more than the stability percentage, these three are reported. After the last
window allowed they are reported anyway, marked as not stable. All times are on the event loop's clock.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np

from clipress.bench.latency import percentile
from clipress.bench.server.results import Load, LoadFigures, Served

T = TypeVar("T")
Send = Callable[[int], Awaitable[Any]]
"""Sends request number n and waits for its answer; raises what went wrong."""
Statistics = dict[str, dict[str, float]]
"""Triton's counters since its start, by model; see `server_figures`."""
STEPS = ("queue", "compute_input", "compute_infer", "compute_output")
KEPT = 3  # windows
PAUSE = 0.01  # seconds after an error, so that a server that refuses at once is not flooded


@dataclass(frozen=True)
class Windows:
    """How long to measure; all times in ms."""

    window: float = 2000
    warm_up: float = 1000
    stability: float = 10
    """Percent."""
    trials: int = 10
    """Windows at most."""


class Request(NamedTuple):
    """One request and its outcome; seconds on the loop's clock."""

    due: float
    sent: float
    done: float
    error: str | None


class Mark(NamedTuple):
    """The state at the end of a window."""

    time: float
    requests: int
    cpu: float
    """Seconds of CPU time of this process."""
    server: Statistics


@dataclass(frozen=True)
class Measured:
    """The windows that are reported."""

    load: Load
    requests: Sequence[Request]
    marks: Sequence[Mark]
    windows: Sequence[float]
    """Answers per second of each."""
    stable: bool

    def figures(self) -> LoadFigures:
        """Return what the client and the server measured."""
        first, last = self.marks[0], self.marks[-1]
        good = [one for one in self.requests if one.error is None]
        seconds, used = last.time - first.time, last.cpu - first.cpu
        return LoadFigures(
            concurrency=self.load.concurrency,
            request_rate=self.load.request_rate,
            infer_per_s=round(len(good) / seconds, 2),
            **latency_figures(good),
            requests=len(self.requests),
            errors=len(self.requests) - len(good),
            stable=self.stable,
            windows=self.windows,
            client_us=round(1e6 * used / max(len(self.requests), 1), 1),
            client_cores=round(used / seconds, 3),
            triton=server_figures(first.server, last.server),
        )

    def errors(self) -> list[str]:
        """Return the distinct error messages."""
        return sorted({one.error for one in self.requests if one.error})

    def times(self) -> dict[str, list[float]]:
        """Return the times of every request in ms: when it was due, after the first window began, and its latency."""
        start = self.marks[0].time
        return {
            "due_ms": [round(1000 * (one.due - start), 2) for one in self.requests],
            "latency_ms": [round(1000 * (one.done - one.due), 3) for one in self.requests],
        }


def arrivals(rate: float, seed: int = 0) -> Iterator[float]:
    """Yield the seconds at which requests of an open loop are due: a Poisson process, the same for every run."""
    rng, due = np.random.default_rng(seed), 0.0
    while True:
        for gap in rng.exponential(1 / rate, 1000).tolist():
            due += gap
            yield due


def latency_figures(requests: Sequence[Request]) -> dict[str, float]:
    """Return mean and percentiles of latency in ms, and the 99th of the client's own lag; NaN if nothing was answered."""
    times = sorted(1000 * (one.done - one.due) for one in requests) or [float("nan")]
    lags = sorted(1000 * (one.sent - one.due) for one in requests) or [float("nan")]
    found = {
        "mean_ms": sum(times) / len(times),
        **{f"p{part}_ms": percentile(times, part) for part in (50, 90, 95, 99)},
    }
    return {name: round(value, 4) for name, value in (found | {"lag_p99_ms": percentile(lags, 99)}).items()}


def windows_of(requests: Sequence[Request], marks: Sequence[Mark]) -> list[tuple[Sequence[Request], float]]:
    """Return each window's requests and its seconds. `requests` are all since the load began."""
    return [(requests[start.requests : end.requests], end.time - start.time) for start, end in pairwise(marks)]


def rate_and_latency(requests: Sequence[Request], seconds: float) -> tuple[float, float]:
    """Return a window's answers per second and their mean latency in seconds."""
    latencies = [one.done - one.due for one in requests if one.error is None]
    return len(latencies) / seconds, sum(latencies) / len(latencies) if latencies else float("inf")


def are_stable(windows: Sequence[tuple[float, float]], percent: float) -> bool:
    """Return whether the last three windows agree in rate and latency: largest over smallest, as in perf_analyzer."""
    if len(windows) < KEPT:
        return False
    limit = 1 + percent / 100
    return all(min(values) > 0 and max(values) <= limit * min(values) for values in zip(*windows[-KEPT:], strict=True))


def server_figures(before: Statistics, after: Statistics) -> dict[str, Served]:
    """Return Triton's own figures between two moments, of each model that had requests."""
    found = {}
    for model, counted in after.items():
        new = {key: value - before.get(model, {}).get(key, 0) for key, value in counted.items()}
        if new["requests"] > 0:
            found[model] = Served(
                **{f"{step}_ms": round(new[step] / new["requests"] / 1e6, 4) for step in STEPS},
                mean_batch=round(new["rows"] / new["executions"], 3) if new["executions"] else None,
                **{key: int(new[key]) for key in ("requests", "executions", "cache_hits")},
            )
    return found


async def measure(
    send: Send, load: Load, windows: Windows, statistics: Callable[[], Awaitable[Statistics]], numbers: Iterator[int]
) -> Measured:
    """Keep up a load until it is stable, or for as many windows as are allowed. `numbers` tell requests apart."""
    clock, requests = asyncio.get_running_loop().time, list[Request]()

    async def mark() -> Mark:
        server = await statistics()
        return Mark(clock(), len(requests), time.process_time(), server)

    driver = asyncio.create_task(_drive(send, load, numbers, requests))
    try:
        await asyncio.sleep(windows.warm_up / 1000)
        marks, stable = [await mark()], False
        while len(marks) <= max(windows.trials, KEPT) and not stable:
            await asyncio.sleep(windows.window / 1000)
            marks.append(await mark())
            recent = marks[-KEPT - 1 :]
            found = [rate_and_latency(*one) for one in windows_of(requests, recent)]
            stable = are_stable(found, windows.stability)
    finally:
        driver.cancel()
        await asyncio.gather(driver, return_exceptions=True)
    kept = requests[recent[0].requests : recent[-1].requests]
    return Measured(load, kept, recent, [round(rate, 2) for rate, _ in found], stable)


async def _drive(send: Send, load: Load, numbers: Iterator[int], requests: list[Request]) -> None:
    """Send requests until cancelled, then cancel those under way."""
    clock, under_way = asyncio.get_running_loop().time, set[asyncio.Task]()

    async def one(due: float) -> None:
        sent, error = clock(), None
        try:
            await send(next(numbers))
        except Exception as problem:
            error = str(problem) or type(problem).__name__
        requests.append(Request(due, sent, clock(), error))
        if error:
            await asyncio.sleep(PAUSE)

    async def worker() -> None:
        while True:
            await one(clock())

    try:
        if load.concurrency:
            under_way |= {asyncio.create_task(worker()) for _ in range(load.concurrency)}
            await asyncio.gather(*under_way)
        start = clock()
        for offset in arrivals(load.request_rate):
            await asyncio.sleep(start + offset - clock())  # a late one still lets others run
            under_way.add(task := asyncio.create_task(one(start + offset)))
            task.add_done_callback(under_way.discard)
    finally:
        left = [task.cancel() and task for task in list(under_way)]
        await asyncio.gather(*filter(None, left), return_exceptions=True)


def run(work: Coroutine[Any, Any, T], precise: bool) -> T:
    """Run a coroutine to the end; if `precise`, on an event loop that wakes up to the microsecond, as open loops require.

    The usual loop rounds up to milliseconds, and takes less time per request.
    """
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector() if precise else None)
    try:
        return loop.run_until_complete(work)
    finally:
        loop.run_until_complete(_end_tasks())
        loop.close()


async def _end_tasks() -> None:
    """Cancel what Ctrl-C has left running."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


def numbered() -> Iterator[int]:
    """Return numbers that earlier runs did not use: the server answers a repeated text from its cache."""
    return count(time.time_ns() // 1_000_000)
