"""ONNX -> TensorRT engines, one per tower, that agree with ONNX Runtime on the file they were built from.

    <export>/tensorrt/<tower>.<precision>.onnx                              what TensorRT parses: the precision is in it
    <export>/tensorrt/<tower>.<gpu>.trt<version>.<precision>.engine{,.json,.log}    see runtime/tensorrt.py

Networks are strongly typed, as TensorRT 11 has them only; INT8 is the Q/DQ of the exported file. Nothing here needs a
precision flag, which is what changed most between 10 and 11.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from clipress import __version__
from clipress.data.eval_sets import EvalSet
from clipress.data.tokens import tokenizer_from_spec
from clipress.errors import ArtifactError, ExportError
from clipress.export import metadata, parity
from clipress.export.precision import engine_precision, lower
from clipress.export.settings import TensorRTSettings
from clipress.runtime.export_folder import read_export
from clipress.runtime.tensorrt import (
    Engine,
    Machine,
    Profile,
    Sidecar,
    create,
    engine_path,
    new_log,
    numbers,
    read_sidecar,
)
from clipress.storage import cache_folder, sha256, write_bytes_whole, write_text_whole

SAID = (
    "(Sparsity) Layers eligible for sparse math: ",
    "(Sparsity) TRT inference plan picked sparse implementation for ",
)


@dataclass(frozen=True)
class Prepared:
    """An ONNX file that TensorRT may parse."""

    source: Path
    path: Path
    """In the asked precision."""
    tower: str
    precision: str
    model: dict[str, Any]
    """The source's clipress metadata; empty for a foreign file."""
    takes: str
    floats: bool
    """Whether the input is float32; else it is int64."""
    profile: Profile


def prepare(source: Path, folder: Path, settings: TensorRTSettings, foreign: bool = False) -> Prepared:
    """Check an ONNX file and write it into `folder` in the asked precision. Needs neither TensorRT nor a GPU.

    Raises ExportError for a file clipress did not make (unless `foreign`), NaN weights, or dynamic shapes other than
    the batch.
    """
    try:
        model = onnx.load(source)
    except FileNotFoundError:
        raise ArtifactError(f"{source} was asked for, and there is no such file.") from None
    except Exception as error:  # protobuf's own errors have no common type
        raise ArtifactError(f"{source} is not a readable ONNX file: {error}.") from None
    described = _metadata(model, source, foreign)
    _check_numbers(model, source)
    takes, profile = _profile(model, source, settings)
    floats = takes.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    tower = described.get("tower", source.stem)
    precision = engine_precision(model, settings.precision)
    path = folder / f"{tower}.{precision}.onnx"
    lowered = lower(model, settings.precision)
    if described:  # its self-test was for the source; an engine has a parity gate of its own
        about = {key: value for key, value in described.items() if key != "self_test"}
        metadata.stamp(lowered, about | {"precision": precision})
    write_bytes_whole(path, lowered.SerializeToString())
    return Prepared(source, path, tower, precision, described, takes.name, floats, profile)


def prepare_export(folder: Path, settings: TensorRTSettings) -> dict[str, Prepared]:
    """Prepare both towers of an export folder, in its `tensorrt` folder."""
    exported = read_export(folder).for_gpus()
    return {tower: prepare(exported.onnx(tower), folder / "tensorrt", settings) for tower in exported.files}


def engines_from_export(
    folder: Path,
    prepared: Mapping[str, Prepared],
    machine: Machine,
    settings: TensorRTSettings,
    sets: Sequence[EvalSet],
) -> dict[str, Path]:
    """Build both towers' engines, hold them against ONNX Runtime on real samples, and only then keep them.

    Engines that are there already, of the same file and settings, are taken as they are. Raises ExportError when an
    engine cannot be built or does not agree.
    """
    exported = read_export(folder)
    paths = {t: engine_path(one.path.parent, t, one.precision, machine) for t, one in prepared.items()}
    if all(_is_built(paths[tower], one, settings) for tower, one in prepared.items()):
        return paths
    built = {tower: _build(one, paths[tower], machine, settings) for tower, one in prepared.items()}
    tokenize = tokenizer_from_spec(exported.tokenizer.model_dump())
    inputs = parity.samples(exported.preprocess, tokenize, sets)
    figures = _agree(prepared, paths, built, machine, inputs)
    for tower, one in prepared.items():
        _keep(paths[tower], built[tower], one, machine, settings, figures)
    return paths


def engine_from_onnx(one: Prepared, machine: Machine, settings: TensorRTSettings) -> Path:
    """Build one ONNX file's engine beside it, held against ONNX Runtime on noise, and keep it when it agrees.

    For a file that was taken to the machine with the GPU on its own. Raises like `engines_from_export`.
    """
    path = engine_path(one.path.parent, one.tower, one.precision, machine)
    if _is_built(path, one, settings):
        return path
    plan = _build(one, path, machine, settings)
    figures = _agree({one.tower: one}, {one.tower: path}, {one.tower: plan}, machine, {one.tower: _noise(one)})
    _keep(path, plan, one, machine, settings, figures)
    return path


def _metadata(model: onnx.ModelProto, source: Path, foreign: bool) -> dict[str, Any]:
    """Return what clipress wrote into the file."""
    try:
        about = metadata.told(model)
    except ValueError as error:
        raise ExportError(f"{source}: its 'clipress' metadata is damaged ({error}). Make it again.") from None
    if about is None and not foreign:
        raise ExportError(
            f"{source} was not made by clipress: it has no 'clipress' metadata, so nothing tells what it takes and "
            "gives. Make one with: clipress export RUN; or build it all the same with --foreign."
        )
    return about or {}


def _check_numbers(model: onnx.ModelProto, source: Path) -> None:
    for item in model.graph.initializer:
        try:
            values = numpy_helper.to_array(item)
        except Exception as error:  # a tensor's shape, type and bytes are whatever the file says
            raise ArtifactError(f"{source} is not a readable ONNX file: {item.name}: {error!s:.200}.") from None
        if item.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16):
            count = int(np.isnan(values).sum())
            if count:
                raise ExportError(
                    f"{source}: {count} of the {np.prod(item.dims, dtype=int)} values of {item.name} are not numbers "
                    "(NaN). The training that made it went wrong: look at its log, make it again."
                )


def _profile(model: onnx.ModelProto, source: Path, settings: TensorRTSettings) -> tuple[onnx.ValueInfoProto, Profile]:
    """Return the input and its shapes: the batch from the settings, the rest from the file."""
    if len(model.graph.input) != 1:
        raise ExportError(f"{source}: one input is asked for, found {', '.join(i.name for i in model.graph.input)}.")
    takes = model.graph.input[0]
    dims = [d.dim_value if d.HasField("dim_value") else None for d in takes.type.tensor_type.shape.dim]
    if None in dims[1:]:
        raise ExportError(
            f"{source}: {takes.name} is dynamic in more than its first dimension, the batch. Fix the others as you export."
        )
    batches = {"min": dims[0], "opt": dims[0], "max": dims[0]} if dims[0] else settings.batch.model_dump()
    return takes, Profile(**{key: (batch, *dims[1:]) for key, batch in batches.items()})


def _build(one: Prepared, path: Path, machine: Machine, settings: TensorRTSettings) -> tuple[bytes, dict[str, int]]:
    """Return a plan and what the builder said about sparsity. Its whole log is left beside the plan's place."""
    log = new_log(machine.trt)
    try:
        plan = _plan(one, machine, settings, log)
    finally:
        write_text_whole(path.with_name(f"{path.name}.log"), "\n".join(log.lines) + "\n")
    if plan is None:
        errors = [line for line in log.lines if "ERROR" in line][-3:]
        raise ExportError(
            f"TensorRT {machine.version} could not build {one.path}: {'; '.join(errors) or 'it does not say why'}. "
            f"The whole log: {path}.log"
        )
    return plan, _sparse_layers(log.lines)


def _plan(one: Prepared, machine: Machine, settings: TensorRTSettings, log: Any) -> bytes | None:
    """Parse, configure, build. Only calls that TensorRT 10.12 and 11 both have."""
    trt = machine.trt
    builder = create(trt.Builder, log)
    # 10 needs the flag, 11 has nothing else and takes it; 11 has no EXPLICIT_BATCH, which 10 ignores
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(one.path)):
        log.lines += [f"[ERROR] {parser.get_error(i).desc()}" for i in range(parser.num_errors)]
        return None
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape(one.takes, one.profile.min, one.profile.opt, one.profile.max)
    config.add_optimization_profile(profile)
    _configure(config, trt, settings)
    cache_file = settings.timing_cache or _timing_cache(machine)
    cache = _read_timing_cache(config, cache_file, log)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return None
    write_bytes_whole(cache_file, bytes(cache.serialize()))
    return bytes(plan)


def _configure(config: Any, trt: Any, settings: TensorRTSettings) -> None:
    config.builder_optimization_level = settings.optimization_level
    if settings.sparse_weights:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if settings.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if settings.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_mib << 20)
    level = getattr(trt.HardwareCompatibilityLevel, settings.hardware_compatibility.upper())
    config.hardware_compatibility_level = level


def _timing_cache(machine: Machine) -> Path:
    """Return where timings of this GPU and release are kept; they are of no use to others."""
    return engine_path(cache_folder() / "tensorrt", "timings", "all", machine).with_suffix(".cache")


def _read_timing_cache(config: Any, path: Path, log: Any) -> Any:
    """Attach the timings of earlier builds, or new ones when there are none or they are another machine's."""
    kept = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(kept)
    if cache is None or not config.set_timing_cache(cache, False):
        log.lines.append(f"[WARNING] {path} is of another GPU or release, or damaged: its timings are not used")
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _sparse_layers(lines: Sequence[str]) -> dict[str, int]:
    """Count the layers the builder names: eligible for sparse kernels, and run by them."""
    counts = {}
    for key, said in zip(("eligible", "picked"), SAID, strict=True):
        for line in lines:
            if said in line:
                layers = line.partition(said)[2].removeprefix("layers:")
                counts[key] = len([layer for layer in layers.split(",") if layer.strip()])
    return counts


def _agree(
    prepared: Mapping[str, Prepared],
    paths: Mapping[str, Path],
    built: Mapping[str, tuple[bytes, dict[str, int]]],
    machine: Machine,
    inputs: Mapping[str, np.ndarray],
) -> dict[str, float]:
    """Hold engines against ONNX Runtime on their source files. Raises ExportError when they do not agree."""
    reference = {tower: parity.runner(one.source) for tower, one in prepared.items()}
    engines = {t: Engine(plan, machine, paths[t].name, own_code=True) for t, (plan, _) in built.items()}
    first = next(iter(prepared.values()))
    low, high = first.profile.min[0], first.profile.max[0]
    batches = [batch for batch in (*parity.BATCHES, high) if low <= batch <= high]
    names = {tower: path.name for tower, path in paths.items()}
    return parity.compare(reference, engines, inputs, f"{first.precision.split('-')[0]} engine", names, batches)


def _noise(one: Prepared) -> np.ndarray:
    """Return one largest batch of the right type: noise, or ids that any vocabulary has."""
    rng, shape = np.random.default_rng(0), one.profile.max
    return rng.standard_normal(shape, np.float32) if one.floats else rng.integers(1, 400, shape)


def _keep(
    path: Path,
    built: tuple[bytes, dict[str, int]],
    one: Prepared,
    machine: Machine,
    settings: TensorRTSettings,
    figures: Mapping[str, float],
) -> None:
    """Write the plan, then what vouches for it: until the sidecar is there, nobody loads the plan."""
    plan, sparse_layers = built
    sidecar = Sidecar(
        tower=one.tower,
        precision=one.precision,
        tensorrt=machine.version,
        gpu=machine.cuda.gpu,
        compute_capability=machine.cuda.capability,
        version_compatible=settings.version_compatible,
        hardware_compatibility=settings.hardware_compatibility,
        onnx_sha256=sha256(one.source),
        plan_sha256=hashlib.sha256(plan).hexdigest(),
        profile=one.profile,
        settings=_settings(settings),
        sparse_layers=sparse_layers,
        model=one.model,
        parity=dict(figures),
        clipress=__version__,
    )
    write_bytes_whole(path, plan)
    write_text_whole(path.with_name(f"{path.name}.json"), sidecar.model_dump_json(indent=2) + "\n")


def _settings(settings: TensorRTSettings) -> dict[str, Any]:
    return settings.model_dump(mode="json", exclude={"timing_cache"})  # does not change what is computed


def _is_built(path: Path, one: Prepared, settings: TensorRTSettings) -> bool:
    """Tell whether an engine of this very file with these settings is there, whole."""
    try:
        sidecar = read_sidecar(path)
    except ArtifactError:
        return False
    asked = (sha256(one.source), sha256(path), _settings(settings), numbers(__version__))
    found = (sidecar.onnx_sha256, sidecar.plan_sha256, sidecar.settings, numbers(sidecar.clipress))
    return asked == found
