"""Write a script that builds and measures the same engines with NVIDIA's trtexec, so that our figures can be checked.

trtexec 11 changed its defaults: CUDA graphs and spinning on, transfers off. The script sets the same options for both.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from clipress.export.settings import TensorRTSettings
from clipress.export.tensorrt_onnx import Prepared
from clipress.storage import write_text_whole

HEAD = """\
#!/bin/sh
# Build and measure each graph with trtexec as clipress does: strongly typed, including transfers, with a CUDA graph.
# Usage: sh trtexec.sh    Optional variables: TRTEXEC=/path/to/trtexec, TRT_MAJOR=10 or 11.
set -eu
cd "$(dirname "$0")"
TRTEXEC=${TRTEXEC:-trtexec}
if [ -z "${TRT_MAJOR:-}" ]; then  # read from its first line, such as [TensorRT v101200]
  release=$("$TRTEXEC" --help | sed -n 's/.*\\[TensorRT v\\([0-9]*\\)\\].*/\\1/p' | head -n 1)
  TRT_MAJOR=$((${release:-0} / 10000))
fi
case $TRT_MAJOR in
  10) release_options="--stronglyTyped --useCudaGraph --useSpinWait" ;;
  11) release_options="--includeDataTransfers" ;;
  *) echo "Expected trtexec of TensorRT 10 or 11, found release $TRT_MAJOR. Set TRTEXEC or TRT_MAJOR." >&2; exit 2 ;;
esac
run() { echo "+ $*"; "$@"; }
"""
COMPATIBILITY = {"ampere_plus": "ampere+", "same_compute_capability": "sameComputeCapability"}


def write_script(path: Path, prepared: Sequence[Prepared], settings: TensorRTSettings) -> Path:
    """Write one script with the commands of all prepared files; its paths are relative to it."""
    commands = [
        f"\n# {one.path.parent.parent.name}, {one.name}, {one.precision}\n{_command(one, path.parent, settings)}"
        for one in prepared
    ]
    write_text_whole(path, "\n".join([HEAD.rstrip("\n"), *commands]) + "\n")
    path.chmod(0o755)
    return path


def _command(one: Prepared, base: Path, settings: TensorRTSettings) -> str:
    onnx = os.path.relpath(one.path, base)
    shapes = {
        key: ",".join(f"{name}:{'x'.join(map(str, getattr(p, key)))}" for name, p in one.profiles.items())
        for key in ("min", "opt", "max")
    }
    options = [
        f"--onnx={onnx}",
        f"--saveEngine={onnx.removesuffix('.onnx')}.trtexec.engine",
        *(f"--{key}Shapes={shape}" for key, shape in shapes.items()),
        f"--shapes={shapes['opt']}",
        f"--builderOptimizationLevel={settings.optimization_level}",
    ]
    if settings.sparse_weights:
        options.append("--sparsity=enable")
    if settings.version_compatible:
        options.append("--versionCompatible")
    if settings.hardware_compatibility != "none":
        options.append(f"--hardwareCompatibilityLevel={COMPATIBILITY[settings.hardware_compatibility]}")
    if settings.workspace_mib is not None:
        options.append(f"--memPoolSize=workspace:{settings.workspace_mib}M")
    return " \\\n  ".join(['run "$TRTEXEC" $release_options', *map(shlex.quote, options)])
