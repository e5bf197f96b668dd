"""Keep a measurement on the same CPUs: threads that move between cores lose their caches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from clipress.errors import RecipeError

THREADS = Path("/proc/self/task")


@contextmanager
def pinned(cpus: Sequence[int] | None, threads: int) -> Iterator[list[int] | None]:
    """Pin this process to `cpus`; None: the last `threads` of those allowed; empty: no pinning.

    Yields the CPUs in force, or None where the system cannot tell. On Linux, threads that already run are moved too: OpenVINO
    computes with those that it started before.
    """
    if not hasattr(os, "sched_setaffinity"):  # macOS, Windows
        yield None
        return
    before = sorted(os.sched_getaffinity(0))
    wanted = before[-threads:] if cpus is None else sorted(set(cpus)) or before
    if absent := set(wanted) - set(before):
        raise RecipeError(
            f"bench.cpus: expected CPUs that this process may use ({', '.join(map(str, before))}), found CPU "
            f"{', '.join(map(str, sorted(absent)))}. Choose others with --cpus."
        )
    _move(wanted)
    try:
        yield wanted
    finally:
        _move(before)


def _move(cpus: Sequence[int]) -> None:
    os.sched_setaffinity(0, cpus)
    for thread in [int(path.name) for path in THREADS.iterdir()] if THREADS.is_dir() else []:
        with suppress(ProcessLookupError):  # It has ended since.
            os.sched_setaffinity(thread, cpus)
