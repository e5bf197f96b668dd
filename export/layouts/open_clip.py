"""open_clip's folder, as on the hub: open_clip_config.json, open_clip_model.safetensors. `local-dir:FOLDER` loads it."""

from __future__ import annotations

from pathlib import Path

from clipress.errors import ExportError
from clipress.export.layouts import LAYOUTS, LayoutJob
from clipress.models.load import save_for_open_clip
from clipress.tasks import model_from_artifact


@LAYOUTS.register("open_clip")
def write(job: LayoutJob, folder: Path) -> None:
    """Write the artifact under open_clip's names, if nothing was cut."""
    job.clip("open_clip")
    if not save_for_open_clip(model_from_artifact(job.artifact), folder):
        raise ExportError(
            f"--layout open_clip: {job.artifact.name} is cut, INT8, resized or has a reduced vocabulary, which open_clip's own "
            "modules cannot hold. Export it as ONNX: --layout transformers.js or immich."
        )
