"""Pruning schedules: the fraction of the final pruning that is due at a point of the search."""

from __future__ import annotations

import math
from collections.abc import Callable

from clipress.registry import Registry

SCHEDULES: Registry[Callable[[float], float]] = Registry("schedule", "clipress.compress.prune.schedule")


@SCHEDULES.register("sine")
def sine(t: float) -> float:
    """UPop's schedule. Masks of cut units decrease along with it, so the effective removal follows a half cosine."""
    return math.sin(math.pi / 2 * t)


@SCHEDULES.register("cubic")
def cubic(t: float) -> float:
    """Zhu and Gupta 2017: fast at the start, slow at the end."""
    return 1 - (1 - t) ** 3


@SCHEDULES.register("one-shot")
def one_shot(t: float) -> float:
    """Prune everything at the first update."""
    return 1.0


def progress(schedule: str, step: int, steps: int, final_fraction: float) -> float:
    """Return the fraction due after `step` (0-based). It reaches 1 before the last `final_fraction` of the steps."""
    moving = max(round(steps * (1 - final_fraction)), 1)
    return SCHEDULES[schedule](min((step + 1) / moving, 1.0))
