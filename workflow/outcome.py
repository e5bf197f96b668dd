"""What `clipress.run` returns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clipress.bench.results import Results


@dataclass(frozen=True)
class Run:
    """A finished run. Every artifact has an export, see `clipress.load`."""

    folder: Path
    artifacts: tuple[str, ...]
    """Names of the artifacts, in order; each is a folder in `folder`."""
    results: Results | None = None
    """Content of bench/results.json. None in all but the first process of several."""
    served: str | None = None
    """The artifact in the Triton repositories."""
