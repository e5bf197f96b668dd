"""Keeping a measurement on the same CPUs: threads that wander between cores lose their caches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from clipress.errors import RecipeError


@contextmanager
def pinned(cpus: Sequence[int] | None, threads: int) -> Iterator[list[int] | None]:
    """Keep this thread, and those it starts, on `cpus`; None: the last `threads` of those allowed, none: no pinning.

    Yields the CPUs in force, or None where the system cannot tell. Threads that run already stay where they are.
    """
    if not hasattr(os, "sched_setaffinity"):  # macOS, Windows
        yield None
        return
    before = sorted(os.sched_getaffinity(0))
    wanted = before[-threads:] if cpus is None else sorted(set(cpus)) or before
    if absent := set(wanted) - set(before):
        raise RecipeError(
            f"bench.cpus: CPU {', '.join(map(str, sorted(absent)))} was asked for; this process may use "
            f"{', '.join(map(str, before))}."
        )
    os.sched_setaffinity(0, wanted)
    try:
        yield wanted
    finally:
        os.sched_setaffinity(0, before)
