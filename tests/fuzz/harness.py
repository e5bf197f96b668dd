"""Run a target under atheris: each distinct finding is reported, its input is kept, and the search continues."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import atheris


def fuzz(target: Callable[[bytes], None]) -> None:
    """Fuzz until -max_total_time; write inputs of findings to fuzz-findings/<target>-<number> in the working folder."""
    seen: set[tuple[str, ...]] = set()

    def one(data: bytes) -> None:
        try:
            target(data)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            place = (type(error).__name__, *(f"{Path(f.filename).name}:{f.name}" for f in frames[-3:]))
            if place not in seen:
                seen.add(place)
                kept = Path("fuzz-findings") / f"{target.__name__}-{len(seen)}"
                kept.parent.mkdir(exist_ok=True)
                kept.write_bytes(data)
                kept.with_suffix(".txt").write_text(traceback.format_exc(), encoding="utf-8", errors="replace")
                sys.stderr.write(f"FINDING {kept}: {place} {str(error)[:200]!r}\n")

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
