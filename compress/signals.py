"""Defer SIGTERM and SIGINT to the end of the current step, so that a run can be resumed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# Schedulers send SIGTERM before they preempt a machine; 75 is EX_TEMPFAIL, "try again".
EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}


@dataclass
class StopRequest:
    """The first signal received, or 0."""

    signal: int = 0


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Record the first SIGTERM or Ctrl-C instead of exiting; a second one acts as usual. Main thread only."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def record(number: int, _: Any) -> None:
        request.signal = request.signal or number
        restore_handlers()

    def restore_handlers() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in EXIT_CODES}
    try:
        for number in EXIT_CODES:
            signal.signal(number, record)
        yield request
    finally:
        restore_handlers()


def ignore_stop_signals(_: int) -> None:
    """Make a loader worker ignore signals sent to its process group; the training process shuts it down."""
    for number in EXIT_CODES:
        signal.signal(number, signal.SIG_IGN)
