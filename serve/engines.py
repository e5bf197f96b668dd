"""Which engines of an export Triton gets: those of one TensorRT and one precision, one per compute capability."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from clipress.errors import ExportError
from clipress.runtime.export_folder import Exported
from clipress.runtime.tensorrt import Sidecar, numbers, read_plan
from clipress.serve.settings import ServeSettings


class Plans(BaseModel):
    """What a configuration says of one tower's engines."""

    tensorrt: str
    version_compatible: bool
    smallest_batch: int
    best_batch: int
    largest_batch: int
    files: dict[str, str]
    """Compute capability, such as 9.0 -> file in the version's folder. Any GPU may run the first, `model.plan`."""


def plans_from_export(exported: Exported, tower: Any, settings: ServeSettings) -> tuple[Plans, dict[str, Path]]:
    """Choose a tower's engines: what to say of them, and the files of its version's folder.

    Every plan must be vouched for by its sidecar, and be built from this very export (ArtifactError, ExportError). Raises
    ExportError where no engine is there, or where it is not clear which one is meant.
    """
    folder = exported.folder / "tensorrt"
    build = "Build it on a machine with the GPU: clipress export RUN --tensorrt"
    wanted = settings.precision
    found = {path: read_plan(path)[1] for path in sorted(folder.glob(f"{tower}.*.engine"))}
    fitting = {
        path: sidecar
        for path, sidecar in found.items()
        if sidecar.onnx_sha256 == exported.files[tower].sha256 and wanted in (None, sidecar.precision)
    }
    if not fitting:
        there = ", ".join(f"{path.name} ({sidecar.precision})" for path, sidecar in found.items()) or "none"
        asked = f"An {wanted} engine" if wanted else "An engine"
        raise ExportError(
            f"{asked} of {exported.stage}'s {tower} tower was asked for in {folder}, built from its {tower}.onnx as it is "
            f"now; engines there: {there}. {build}, or serve with --backend onnxruntime."
        )
    newest = max((sidecar.tensorrt for sidecar in fitting.values()), key=numbers)
    chosen = {path: sidecar for path, sidecar in fitting.items() if sidecar.tensorrt == newest}
    return _described(chosen, tower)


def _described(chosen: dict[Path, Sidecar], tower: str) -> tuple[Plans, dict[str, Path]]:
    files: dict[str, str] = {}
    sources: dict[str, Path] = {}
    for path, sidecar in chosen.items():
        major, minor = sidecar.compute_capability
        name = f"model_cc{major}{minor}.plan" if files else "model.plan"
        if f"{major}.{minor}" in files or len({sidecar.precision for sidecar in chosen.values()}) > 1:
            raise ExportError(
                f"One engine per kind of GPU was asked for, found for the {tower} tower: "
                f"{', '.join(path.name for path in chosen)}. Say serve.precision, or take the others out of the folder."
            )
        files[f"{major}.{minor}"] = name
        sources |= {name: path, f"{name}.json": path.with_name(f"{path.name}.json")}
    profiles = [sidecar.profile for sidecar in chosen.values()]
    plans = Plans(
        tensorrt=next(iter(chosen.values())).tensorrt,
        version_compatible=all(sidecar.version_compatible for sidecar in chosen.values()),
        smallest_batch=max(profile.min[0] for profile in profiles),
        best_batch=profiles[0].opt[0],
        largest_batch=min(profile.max[0] for profile in profiles),
        files=files,
    )
    if plans.smallest_batch > 1:
        raise ExportError(
            f"An engine for batches from 1 on was asked for; the {tower} tower's takes {plans.smallest_batch} or more. "
            "Build it with export.tensorrt.batch.min=1."
        )
    return plans, sources
