"""Open exported ONNX files in OpenVINO, on the CPU: computed as exactly as in ONNX Runtime, each file self-tested once.

A session has the methods of ONNX Runtime's that clipress calls, so that a runner, the self-test and `run_of` take either.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from clipress.errors import BackendMissing, ExportError, first_line
from clipress.runtime.onnx_session import METADATA, check, file_identity, metadata_of

INSTALL = "pip install 'clipress[openvino]'"
TYPES = {"f32": "tensor(float)", "i64": "tensor(int64)"}
SETTINGS = {
    "INFERENCE_PRECISION_HINT": "f32",  # By default everything is bfloat16 on CPUs that have it.
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # By default activations become int8 where weights are stored as int8.
    "NUM_STREAMS": 1,  # One query at a time, on all threads.
    "ENABLE_CPU_PINNING": False,  # It would move the calling thread, and leave it where the caller did not pin it.
}
_passed: set[tuple[Any, ...]] = set()  # Files that passed their self-test in this process.


@dataclass(frozen=True)
class Put:
    """An input or output, in ONNX Runtime's terms; a side of any length is None."""

    name: str
    type: str
    shape: list[int | None]


class OpenVinoSession:
    """One compiled file of any batch.

    Args:
        path: the ONNX file.
        threads: inside one operator; 0 lets OpenVINO choose.

    Raises BackendMissing without OpenVINO, and ExportError for a file that it cannot open.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        core = find_openvino().Core()
        try:
            model = core.read_model(str(path))
            with _signal_stack_kept():
                self._compiled = core.compile_model(model, "CPU", {**SETTINGS, "INFERENCE_NUM_THREADS": threads})
        except RuntimeError as error:
            raise ExportError(
                f"{path} cannot be opened by OpenVINO {version()}: {first_line(error)} Leave --runner openvino out, or "
                "export it again: clipress export RUN"
            ) from None
        about = dict(dict(model.get_rt_info()).get("framework", {}))  # the file's metadata
        self._metadata = {METADATA: about[METADATA].value} if METADATA in about else {}
        self._request = self._compiled.create_infer_request()
        self._lock = threading.Lock()  # A request computes for one thread at a time.

    def get_inputs(self) -> list[Put]:
        return list(map(_put, self._compiled.inputs))

    def get_outputs(self) -> list[Put]:
        return list(map(_put, self._compiled.outputs))

    def get_modelmeta(self) -> SimpleNamespace:
        return SimpleNamespace(custom_metadata_map=self._metadata)

    def run(self, names: Sequence[str] | None, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return outputs by their names; None means all."""
        with self._lock:
            found = self._request.infer(dict(inputs), share_inputs=True)
        return list(found.values()) if names is None else [found[name] for name in names]


class _SignalStack(ctypes.Structure):
    _fields_ = (("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def _signal_stack_kept() -> Iterator[None]:
    """Leave the thread with the stack that its signal handlers had before.

    With every model OpenVINO gives the thread another one, and takes it back with the model, so that models that end in another
    order than they began leave one that has been freed: the next signal, such as Ctrl-C, is then a segmentation fault.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    before, system = _SignalStack(), ctypes.CDLL(None)
    system.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        system.sigaltstack(ctypes.byref(before), None)


def _put(put: Any) -> Put:
    name = put.element_type.get_type_name()
    sides = [side.get_length() if side.is_static else None for side in put.partial_shape]
    return Put(put.any_name, TYPES.get(name, name), sides)


def open_openvino_session(path: Path, threads: int = 0) -> OpenVinoSession:
    """Open an ONNX file; its self-test runs the first time a process opens it.

    Raises BackendMissing without OpenVINO, and ExportError for a file that cannot be opened, that has no self-test, or that
    OpenVINO computes wrongly on this CPU.
    """
    session, file = OpenVinoSession(path, threads), file_identity(path)
    if file not in _passed:
        if check(session, path, metadata_of(session), f"openvino {version()}") is None:
            raise ExportError(
                f"{path} has no self-test, so nothing tells whether OpenVINO computes it correctly. Export it again: "
                "clipress export RUN"
            )
        _passed.add(file)
    return session


def find_openvino() -> Any:
    """Import OpenVINO. Raises BackendMissing."""
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise BackendMissing(
            f"OpenVINO cannot be imported ({error}). Install it: {INSTALL}. Or choose onnxruntime."
        ) from None


def version() -> str:
    """Return OpenVINO's version, such as 2026.4.1."""
    return str(find_openvino().__version__).partition("-")[0]
