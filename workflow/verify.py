"""Verify exported files on this machine; torch is not imported."""

from __future__ import annotations

from pathlib import Path

from clipress.export.verify import verify
from clipress.progress import Say
from clipress.runtime.cpu import processor


def verify_export(source: Path, say: Say) -> None:
    """Run the self-tests of a file, of an export folder or of all exports of a run. Raises ExportError."""
    say(str(processor()))
    for one in verify(source):
        mode = ", in exact mode" if one.exact_mode else ""
        say(
            f"{one.path}: {one.precision}, matches exact arithmetic (minimum cosine {one.least_cosine:.6f}{mode}; "
            f"{one.milliseconds:.0f} ms)"
        )
