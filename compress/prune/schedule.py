"""Schedules: how much of the final pruning is asked for at a moment of the search, from 0 to 1."""

from __future__ import annotations

import math

SCHEDULES = {
    # UPop's: the mask value of cut units sinks with it, so the effective removal follows a half cosine
    "sine": lambda t: math.sin(math.pi / 2 * t),
    # Zhu and Gupta 2017: fast at first, gently at the end
    "cubic": lambda t: 1 - (1 - t) ** 3,
    "one-shot": lambda t: 1.0,
}


def progress(schedule: str, step: int, steps: int, frozen: float) -> float:
    """Return the part of the final pruning due after `step` (0-based); complete before the last `frozen` part."""
    moving = max(round(steps * (1 - frozen)), 1)
    return SCHEDULES[schedule](min((step + 1) / moving, 1.0))
