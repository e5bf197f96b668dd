"""Build a TensorRT plan from a prepared ONNX file, and keep the builder's log and timings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipress.errors import ExportError
from clipress.export.settings import TensorRTSettings
from clipress.export.tensorrt_onnx import Prepared
from clipress.runtime.tensorrt import Machine, create, engine_path, new_log
from clipress.storage import cache_folder, write_bytes_whole, write_text_whole

SPARSITY = {
    "eligible": "(Sparsity) Layers eligible for sparse math: ",
    "picked": "(Sparsity) TRT inference plan picked sparse implementation for ",
}


@dataclass(frozen=True)
class Built:
    """A plan, and the numbers of layers in the builder's log that may and that do run sparse."""

    plan: bytes
    sparse_layers: dict[str, int]


def build_plan(one: Prepared, path: Path, machine: Machine, settings: TensorRTSettings) -> Built:
    """Build the plan that belongs at `path`; the builder's whole log is written beside it. Raises ExportError."""
    log = new_log(machine.trt)
    try:
        plan = _plan(one, machine, settings, log)
    finally:
        write_text_whole(path.with_name(f"{path.name}.log"), "\n".join(log.lines) + "\n")
    if plan is None:
        errors = [line for line in log.lines if "ERROR" in line][-3:]
        raise ExportError(
            f"TensorRT {machine.version} could not build {one.path}: {'; '.join(errors) or 'it gives no reason'}. "
            f"The whole log: {path}.log"
        )
    return Built(plan, _sparse_layers(log.lines))


def _plan(one: Prepared, machine: Machine, settings: TensorRTSettings, log: Any) -> bytes | None:
    """Parse, configure, build, with calls that TensorRT 10.12 and 11 both have."""
    trt = machine.trt
    builder = create(trt.Builder, log)
    # 10 needs this flag; 11 has only such networks and accepts it. EXPLICIT_BATCH, which 10 ignores, is gone in 11.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(one.path)):
        log.lines += [f"[ERROR] {parser.get_error(i).desc()}" for i in range(parser.num_errors)]
        return None
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for name, shapes in one.profiles.items():
        profile.set_shape(name, shapes.min, shapes.opt, shapes.max)
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
    """Return the file of kernel timings of this GPU and release; others cannot use them."""
    return engine_path(cache_folder() / "tensorrt", "timings", "all", machine).with_suffix(".cache")


def _read_timing_cache(config: Any, path: Path, log: Any) -> Any:
    """Attach the timings of earlier builds, or an empty cache where these are missing or another machine's."""
    kept = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(kept)
    if cache is None or not config.set_timing_cache(cache, False):
        log.lines.append(f"[WARNING] {path} is damaged or of another GPU or release: its timings are not used")
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _sparse_layers(lines: Sequence[str]) -> dict[str, int]:
    """Count the layers that the builder lists as eligible for sparse kernels and as run by them."""
    counts = {}
    for key, start in SPARSITY.items():
        for line in lines:
            if start in line:
                layers = line.partition(start)[2].removeprefix("layers:")
                counts[key] = len([layer for layer in layers.split(",") if layer.strip()])
    return counts
