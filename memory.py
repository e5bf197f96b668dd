"""Memory that was freed goes back to the system."""

from __future__ import annotations

import ctypes
import gc


def release_memory() -> None:
    """Give freed memory back, where the C library is glibc, which keeps it: gigabytes after a large model's session."""
    gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl, macOS and Windows have none
        return
    trim(0)
