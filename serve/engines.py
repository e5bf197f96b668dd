"""Choose the TensorRT engines of an export to serve: one TensorRT, one precision, one engine per compute capability."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from clipress.errors import ExportError
from clipress.runtime.export_folder import Exported
from clipress.runtime.tensorrt import Sidecar, numbers, read_plan
from clipress.serve.settings import ServeSettings


class Engines(BaseModel):
    """The engines of one graph, as its configuration describes them."""

    tensorrt: str
    version_compatible: bool
    smallest_batch: int
    best_batch: int
    largest_batch: int
    files: dict[str, str]
    """Compute capability, such as 9.0 -> file in the version's folder. The first is `model.plan`, the default on any GPU."""


def engines_from_export(exported: Exported, graph: str, settings: ServeSettings) -> tuple[Engines, dict[str, Path]]:
    """Choose a graph's engines; return their description and the files of the version's folder.

    Every engine needs a valid sidecar and must be built from this very export (ArtifactError, ExportError). Raises
    ExportError where there is no engine, or where the choice is ambiguous.
    """
    folder = exported.folder / "tensorrt"
    wanted = settings.precision
    found = {path: read_plan(path)[1] for path in sorted(folder.glob(f"{graph}.*.engine"))}
    fitting = {
        path: sidecar
        for path, sidecar in found.items()
        if sidecar.onnx_sha256 == exported.files[graph].sha256 and wanted in (None, sidecar.precision)
    }
    if not fitting:
        names = ", ".join(f"{path.name} ({sidecar.precision})" for path, sidecar in found.items()) or "none"
        raise ExportError(
            f"{folder}: expected an {f'{wanted} ' if wanted else ''}engine of {exported.stage}'s graph '{graph}', built from "
            f"the current {graph}.onnx; engines found: {names}. Build it on a machine with the GPU: "
            "clipress export RUN --tensorrt, or serve with --backend onnxruntime."
        )
    newest = max((sidecar.tensorrt for sidecar in fitting.values()), key=numbers)
    chosen = {path: sidecar for path, sidecar in fitting.items() if sidecar.tensorrt == newest}
    return _describe(chosen, graph)


def _describe(chosen: dict[Path, Sidecar], graph: str) -> tuple[Engines, dict[str, Path]]:
    files: dict[str, str] = {}
    sources: dict[str, Path] = {}
    for path, sidecar in chosen.items():
        major, minor = sidecar.compute_capability
        name = f"model_cc{major}{minor}.plan" if files else "model.plan"
        if f"{major}.{minor}" in files or len({sidecar.precision for sidecar in chosen.values()}) > 1:
            raise ExportError(
                f"Graph '{graph}': expected one engine per kind of GPU, found {', '.join(path.name for path in chosen)}. "
                "Set serve.precision, or move the others out of the folder."
            )
        files[f"{major}.{minor}"] = name
        sources |= {name: path, f"{name}.json": path.with_name(f"{path.name}.json")}
    profiles = [sidecar.profile for sidecar in chosen.values()]
    engines = Engines(
        tensorrt=next(iter(chosen.values())).tensorrt,
        version_compatible=all(sidecar.version_compatible for sidecar in chosen.values()),
        smallest_batch=max(profile.min[0] for profile in profiles),
        best_batch=profiles[0].opt[0],
        largest_batch=min(profile.max[0] for profile in profiles),
        files=files,
    )
    if engines.smallest_batch > 1:
        raise ExportError(
            f"Graph '{graph}': expected an engine that takes single rows, found one for batches of "
            f"{engines.smallest_batch} or more. Build it with export.tensorrt.batch.min=1."
        )
    return engines, sources
