"""Folders as other programs have them, made from an export or its artifact: their registry; one file each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from clipress.errors import ExportError
from clipress.registry import Registry
from clipress.runtime.export_folder import Exported
from clipress.runtime.served import IMAGE, TEXT
from clipress.storage import write_whole


@dataclass(frozen=True)
class LayoutJob:
    """The inputs of a layout."""

    exported: Exported
    artifact: Path
    """The folder of the artifact that was exported."""

    def clip(self, layout: str) -> Exported:
        """Return the export, for a layout that holds a CLIP. Raises ExportError for another model."""
        if self.exported.graphs.keys() != {IMAGE, TEXT}:
            raise ExportError(f"--layout {layout}: expected a CLIP, found a model for '{self.exported.task}'.")
        return self.exported


LAYOUTS: Registry[Callable[[LayoutJob, Path], None]] = Registry("layout", "clipress.export.layouts")
"""Functions that fill an empty folder."""


def write_layout(name: str, job: LayoutJob, target: Path) -> Path:
    """Write an export in the layout of another program, whole or not at all.

    Raises ExportError for a model that the layout cannot hold.
    """
    fill = LAYOUTS.find(name, "--layout")
    write_whole(target, lambda aside: fill(job, aside))
    return target
