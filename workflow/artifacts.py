"""Import third-party checkpoints as artifacts."""

from __future__ import annotations

from pathlib import Path

from clipress.artifact import HEADER, Artifact, save_artifact
from clipress.errors import ArtifactError
from clipress.models.importers import artifact_from_checkpoint
from clipress.models.weights_file import Which


def import_checkpoint(
    checkpoint: Path,
    out: Path,
    form: str = "auto",
    model: str | None = None,
    which: Which | None = None,
    base: Path | None = None,
) -> Artifact:
    """Convert a checkpoint to an artifact in the folder `out`; an artifact there is replaced.

    `model` is an open_clip model name, required where the file does not contain its architecture; `which` chooses raw or
    averaged weights; `base` is the folder or artifact that an adapter is merged into.
    """
    if out.exists() and not (out / HEADER).is_file():
        raise ArtifactError(f"{out} exists and is not an artifact. Nothing was changed. Choose another folder.")
    artifact = artifact_from_checkpoint(checkpoint, form, model, which, base)
    save_artifact(artifact, out)
    return artifact
