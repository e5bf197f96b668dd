"""Find the export of an artifact."""

from __future__ import annotations

from pathlib import Path

from clipress.artifact import HEADER
from clipress.errors import ArtifactError

DESCRIPTION = "export.json"


def export_of(run: Path, stage: str) -> Path:
    """Return the export folder of a run's artifact. Raises ArtifactError if it has not been exported."""
    folder = run / "export" / stage
    if not (folder / DESCRIPTION).is_file():
        raise ArtifactError(f"{run / stage} has not been exported: no {folder}. Run: clipress export {run}")
    return folder


def find_export(path: Path) -> Path:
    """Return the export folder at `path`, which may also be an artifact of a run. Raises ArtifactError."""
    if (path / DESCRIPTION).is_file():
        return path
    if (path / HEADER).is_file() or (path.parent / "export" / path.name / DESCRIPTION).is_file():
        return export_of(path.parent, path.name)
    if (path / "recipe.yaml").is_file():
        exported = sorted(file.parent.name for file in path.glob(f"export/*/{DESCRIPTION}"))
        found = (
            f"Choose one of its exports: {path}/{{{','.join(exported)}}}"
            if exported
            else f"Run: clipress export {path}"
        )
        raise ArtifactError(f"{path}: expected an export folder or an artifact, found a run folder. {found}")
    raise ArtifactError(
        f"{path}: expected an export folder or an artifact, found no {DESCRIPTION} and no {HEADER}. "
        "Run: clipress export RUN"
    )
