"""Keep a measurement on the same CPUs: threads that move between cores lose their caches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from clipress.errors import RecipeError


@contextmanager
def pinned(cpus: Sequence[int] | None, threads: int) -> Iterator[list[int] | None]:
    """Pin this thread, and those it starts, to `cpus`; None: the last `threads` of those allowed; empty: no pinning.

    Yields the CPUs in force, or None where the system cannot tell. Threads that already run stay where they are.
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
    os.sched_setaffinity(0, wanted)
    try:
        yield wanted
    finally:
        os.sched_setaffinity(0, before)
