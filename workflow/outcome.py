"""What `clipress.run` returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Run:
    """A finished run. Every artifact has an export, see `clipress.load`."""

    folder: Path
    artifacts: tuple[str, ...]
    """Names of the artifacts, in order; each is a folder in `folder`."""
    results: dict[str, Any] = field(default_factory=dict)
    """Content of bench/results.json. Empty in all but the first process of several."""
    served: str | None = None
    """The artifact in the Triton repositories."""
