"""What ends a server: Ctrl-C and SIGTERM, neither of which is an error."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end what is inside, quietly; in background jobs too, which a shell starts without Ctrl-C.

    Must be called from the main thread.
    """
    known = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        for number, handler in known.items():
            signal.signal(number, handler)
