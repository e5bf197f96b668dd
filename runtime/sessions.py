"""The runtimes that run an export on the CPU, each with what opens a file in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipress.runtime.onnx_session import open_session
from clipress.runtime.openvino import open_openvino_session

ONNX_RUNTIME = "onnxruntime"
RUNTIMES: dict[str, Callable[[Path, int], Any]] = {ONNX_RUNTIME: open_session, "openvino": open_openvino_session}
"""By the name of the runner; a function of a file and a number of threads, see `open_session`."""
