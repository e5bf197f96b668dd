"""The export target `tensorrt`: engines of a run's exports, and the trtexec commands that build the same."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from clipress.export.settings import TensorRTSettings
from clipress.export.targets import TargetJob, target
from clipress.export.to_tensorrt import engines_from_export, prepare_export
from clipress.export.trtexec import write_script
from clipress.progress import Say
from clipress.runtime.tensorrt import find_machine, read_sidecar


@target("tensorrt", TensorRTSettings)
def build_engines(job: TargetJob, settings: TensorRTSettings) -> None:
    """Build an engine of every graph of every export. Raises BackendMissing without TensorRT and a GPU."""
    prepared = {stage: prepare_export(folder, settings) for stage, folder in job.exports.items()}
    every = [one for graphs in prepared.values() for one in graphs.values()]
    script = write_script(job.home / "trtexec.sh", every, settings)
    job.say(f"The same builds with NVIDIA's trtexec: {script}")
    machine = find_machine()
    for stage, graphs in prepared.items():
        built = engines_from_export(job.exports[stage], graphs, machine, settings, job.open_sets())
        report_engines(stage, built.values(), job.say)


def report_engines(name: str, engines: Iterable[Path], say: Say) -> None:
    """Report the paths of engines and how well they match ONNX Runtime."""
    for path in engines:
        sidecar = read_sidecar(path)
        cosine = sidecar.parity[f"{sidecar.tower}_min_cosine"]
        say(f"{name}: {sidecar.precision} engine, matches ONNX Runtime (minimum cosine {cosine:.6f}) -> {path}")
