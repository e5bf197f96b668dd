"""Build TensorRT engines from exported files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clipress.data.eval_sets import EvalSet
from clipress.errors import ClipressError
from clipress.export.settings import TensorRTSettings
from clipress.export.to_tensorrt import engine_from_onnx, engines_from_export, prepare, prepare_export
from clipress.export.trtexec import write_script
from clipress.recipe import overridden
from clipress.runtime.tensorrt import find_machine, read_sidecar

Say = Callable[[str], None]


def build_engines(
    run: Path, stages: Sequence[str], settings: TensorRTSettings, open_sets: Callable[[], list[EvalSet]], say: Say
) -> None:
    """Build the engines of a run's exports, and write the trtexec commands that do the same."""
    prepared = {stage: prepare_export(run / "export" / stage, settings) for stage in stages}
    every = [one for towers in prepared.values() for one in towers.values()]
    script = write_script(run / "export" / "trtexec.sh", every, settings)
    say(f"The same builds with NVIDIA's trtexec: {script}")
    machine = find_machine()
    for stage, towers in prepared.items():
        built = engines_from_export(run / "export" / stage, towers, machine, settings, open_sets())
        _report(stage, built.values(), say)


def try_engines(
    run: Path, stages: Sequence[str], settings: TensorRTSettings, open_sets: Callable[[], list[EvalSet]], say: Say
) -> None:
    """Build the engines of a run's exports where that is possible; otherwise report why it is not."""
    try:
        build_engines(run, stages, settings, open_sets, say)
    except ClipressError as error:
        say(f"Skipping TensorRT engines: {error}")


def build_engine(source: Path, settings: Mapping[str, Any], foreign: bool, say: Say) -> None:
    """Build the engine of one ONNX file beside it; `foreign` allows files that clipress did not export."""
    wanted = overridden(TensorRTSettings(), settings, "export.tensorrt")
    prepared = prepare(source, source.parent, wanted, foreign)
    _report(source.stem, [engine_from_onnx(prepared, find_machine(), wanted)], say)


def _report(name: str, engines: Iterable[Path], say: Say) -> None:
    for path in engines:
        sidecar = read_sidecar(path)
        cosine = sidecar.parity[f"{sidecar.tower}_min_cosine"]
        say(f"{name}: {sidecar.precision} engine, matches ONNX Runtime (minimum cosine {cosine:.6f}) -> {path}")
