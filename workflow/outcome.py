"""The result of `clipress.run`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clipress.runtime.export_folder import read_export
from clipress.runtime.served import JUDGE, use_of
from clipress.workflow.predict_blip import OPTIONS

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
        """A command that asks the served artifact about an image; a classifier has its own labels."""
        exported = read_export(self.folder / "export" / self.served)
        use, asks = use_of(exported.graphs), "" if exported.labels else " --labels NAME,NAME"
        if use is not None:
            asks = f" {OPTIONS[use]} TEXT" if use in OPTIONS else ""
        images = "IMAGE IMAGE" if use == JUDGE else "IMAGE"
        other = "" if self.served == self.artifacts[-1] else f" --stage {self.served}"
        return f"clipress predict {self.folder} {images}{asks}{other}"
