"""How work in progress is shown: lines for the user, and bars with frequent updates on a terminal, few in a log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

Say = Callable[[str], None]
"""Receives lines for the user; the commands print them."""
T = TypeVar("T")


def progress_bar(total: int | None, title: str, unit: str, **options: Any) -> tqdm:
    """Return a bar on stderr over `total` units, or None if their number is unknown. `options` are tqdm's."""
    return tqdm(total=total, desc=title, unit=unit, mininterval=0.2 if sys.stderr.isatty() else 15.0, **options)


def track(items: Iterable[T], total: int, title: str, unit: str) -> Iterator[T]:
    """Yield items with a progress bar."""
    return iter(progress_bar(total, title, unit, iterable=items))
