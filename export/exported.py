"""Whether an artifact has been exported, which is known without torch."""

from __future__ import annotations

from pathlib import Path

from clipress.artifact import read_header
from clipress.errors import ArtifactError
from clipress.export.settings import OnnxSettings
from clipress.runtime.export_folder import read_export


def is_exported(folder: Path, target: Path, settings: OnnxSettings) -> bool:
    """Return whether `target` holds a whole export of this artifact with these settings."""
    try:
        exported, wanted = read_export(target), read_header(folder)["lineage"][-1]["hash"]
    except (OSError, ValueError, LookupError, TypeError, ArtifactError):
        return False
    found = (exported.lineage_hash, exported.settings)
    return found == (wanted, settings.of_graphs()) and exported.self_test is not None
