"""ONNX -> TensorRT engines, one per graph, that agree with ONNX Runtime on the files they were built from.

    <export>/tensorrt/<graph>.<precision>.onnx                                     the file that TensorRT parses
    <export>/tensorrt/<graph>.<gpu>.trt<version>.<precision>.engine{,.json,.log}   see runtime/tensorrt.py

Networks are strongly typed, the only kind in TensorRT 11: the precision is in the parsed file, and INT8 is the Q/DQ of
the exported one. So no build needs precision flags, which changed most between TensorRT 10 and 11.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipress.data.eval_sets import EvalSet
from clipress.errors import ArtifactError
from clipress.export import parity
from clipress.export.engine_build import Built, build_plan
from clipress.export.settings import TensorRTSettings
from clipress.export.tensorrt_onnx import Prepared, prepare
from clipress.runtime.export_folder import read_export
from clipress.runtime.graph import Arrays
from clipress.runtime.onnx_session import run_from_onnx
from clipress.runtime.tensorrt import Engine, Machine, Sidecar, engine_path, numbers, read_sidecar
from clipress.storage import sha256, write_bytes_whole, write_text_whole
from clipress.version import __version__

__all__ = ["engine_from_onnx", "engines_from_export", "prepare", "prepare_export"]


def prepare_export(folder: Path, settings: TensorRTSettings) -> dict[str, Prepared]:
    """Prepare every graph of an export folder, in its `tensorrt` folder."""
    exported = read_export(folder).for_gpus()
    return {graph: prepare(exported.onnx(graph), folder / "tensorrt", settings) for graph in exported.graphs}


def engines_from_export(
    folder: Path,
    prepared: Mapping[str, Prepared],
    machine: Machine,
    settings: TensorRTSettings,
    sets: Sequence[EvalSet],
) -> dict[str, Path]:
    """Build the engines of an export's graphs, compare them with ONNX Runtime on real samples, and only then keep them.

    Engines that exist for the same files and settings are kept as they are. Raises ExportError when an engine cannot be
    built or does not agree.
    """
    exported = read_export(folder)
    paths = {name: engine_path(one.path.parent, name, one.precision, machine) for name, one in prepared.items()}
    if all(_is_built(paths[name], one, settings) for name, one in prepared.items()):
        return paths
    built = {name: build_plan(one, paths[name], machine, settings) for name, one in prepared.items()}
    figures = _compare(prepared, paths, built, machine, parity.samples_from_export(exported, sets))
    for name, one in prepared.items():
        _keep(paths[name], built[name], one, machine, settings, figures)
    return paths


def engine_from_onnx(one: Prepared, machine: Machine, settings: TensorRTSettings) -> Path:
    """Build the engine of one ONNX file beside it, and keep it if it agrees with ONNX Runtime on random inputs.

    For a file that was copied to the machine with the GPU. Raises like `engines_from_export`.
    """
    path = engine_path(one.path.parent, one.name, one.precision, machine)
    if _is_built(path, one, settings):
        return path
    built = build_plan(one, path, machine, settings)
    samples = one.graph.example(_largest_batch(one))
    figures = _compare({one.name: one}, {one.name: path}, {one.name: built}, machine, {one.name: samples})
    _keep(path, built, one, machine, settings, figures)
    return path


def _compare(
    prepared: Mapping[str, Prepared],
    paths: Mapping[str, Path],
    built: Mapping[str, Built],
    machine: Machine,
    samples: Mapping[str, Arrays],
) -> dict[str, float]:
    """Compare engines with ONNX Runtime on their source files. Raises ExportError when they do not agree."""
    reference = {name: run_from_onnx(one.source) for name, one in prepared.items()}
    engines = {name: Engine(one.plan, machine, paths[name].name, own_code=True) for name, one in built.items()}
    first = next(iter(prepared.values()))
    low, high = next(iter(first.profiles.values())).min[0], _largest_batch(first)
    what = parity.Comparison(
        graphs={name: one.graph for name, one in prepared.items()},
        samples=samples,
        precision=f"{first.precision.split('-')[0]} engine",
        names={name: path.name for name, path in paths.items()},
        batches=[batch for batch in (*parity.BATCHES, high) if low <= batch <= high],
    )
    return parity.compare(what, reference, engines)


def _largest_batch(one: Prepared) -> int:
    return next(iter(one.profiles.values())).max[0]


def _keep(
    path: Path,
    built: Built,
    one: Prepared,
    machine: Machine,
    settings: TensorRTSettings,
    figures: Mapping[str, float],
) -> None:
    """Write the plan, then its sidecar: a plan without one is not loaded."""
    sidecar = Sidecar(
        tower=one.name,
        precision=one.precision,
        tensorrt=machine.version,
        gpu=machine.cuda.gpu,
        compute_capability=machine.cuda.capability,
        version_compatible=settings.version_compatible,
        hardware_compatibility=settings.hardware_compatibility,
        onnx_sha256=sha256(one.source),
        plan_sha256=hashlib.sha256(built.plan).hexdigest(),
        profiles=one.profiles,
        settings=_settings(settings),
        sparse_layers=built.sparse_layers,
        model=one.model,
        parity=dict(figures),
        clipress=__version__,
    )
    write_bytes_whole(path, built.plan)
    write_text_whole(path.with_name(f"{path.name}.json"), sidecar.model_dump_json(indent=2) + "\n")


def _settings(settings: TensorRTSettings) -> dict[str, Any]:
    return settings.model_dump(mode="json", exclude={"timing_cache"})  # It does not change the results.


def _is_built(path: Path, one: Prepared, settings: TensorRTSettings) -> bool:
    """Return whether a whole engine of this file with these settings exists."""
    try:
        sidecar = read_sidecar(path)
    except ArtifactError:
        return False
    wanted = (sha256(one.source), sha256(path), _settings(settings), numbers(__version__))
    found = (sidecar.onnx_sha256, sidecar.plan_sha256, sidecar.settings, numbers(sidecar.clipress))
    return wanted == found
