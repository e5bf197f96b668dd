"""The result of `clipress.run`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clipress.runtime.export_folder import read_export

if TYPE_CHECKING:
    from clipress.bench.results import Results


@dataclass(frozen=True)
class Run:
    """A finished run. Every artifact has an export, see `clipress.load`."""

    folder: Path
    artifacts: tuple[str, ...]
    """Names of the artifacts, in order; each is a folder in `folder`."""
    results: Results | None = None
    """Content of bench/results.json; None in all processes but the first."""
    served: str | None = None
    """The artifact in the Triton repositories."""

    @property
    def predict_command(self) -> str:
        """A command that classifies an image with the served artifact; a classifier has its own labels."""
        labels = "" if read_export(self.folder / "export" / self.served).labels else " --labels NAME,NAME"
        other = "" if self.served == self.artifacts[-1] else f" --stage {self.served}"
        return f"clipress predict {self.folder} IMAGE{labels}{other}"
