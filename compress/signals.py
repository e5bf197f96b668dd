"""A stop that is asked for from outside, noted until the work is at a place where it can go on later."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# SIGTERM is what schedulers send before they take a machine away; 75 is EX_TEMPFAIL: try again
EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}


@dataclass
class StopRequest:
    """The first signal that came, or 0."""

    signal: int = 0


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Note the first SIGTERM or Ctrl-C instead of dying of it; the next one works as ever. Main thread only."""
    asked = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, _: Any) -> None:
        asked.signal = asked.signal or number
        put_back()

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in EXIT_CODES}
    try:
        for number in EXIT_CODES:
            signal.signal(number, note)
        yield asked
    finally:
        put_back()


def leave_stops_to_the_parent(_: int) -> None:
    """Let a loader's process outlive signals to its whole group: it ends when the training process has ended it."""
    for number in EXIT_CODES:
        signal.signal(number, signal.SIG_IGN)
