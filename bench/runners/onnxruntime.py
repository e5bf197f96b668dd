"""ONNX Runtime on the CPU, with a stated number of threads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from clipress.errors import ExportError


class OnnxRuntimeRunner:
    """The two towers of one export folder.

    Args:
        folder: holds image.onnx, text.onnx and export.json.
        threads: inside one operator.
    """

    backend = "onnxruntime"

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime

        try:
            self.description = json.loads((folder / "export.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ExportError(
                f"{folder} holds no readable export.json ({error}). Run `clipress export` first."
            ) from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if threads > 1:  # threads that spin starve their neighbours on small machines
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._sessions: dict[str, Any] = {}
        for tower in ("image", "text"):
            path = folder / f"{tower}.onnx"
            try:
                self._sessions[tower] = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
            except Exception as error:  # onnxruntime's own errors have no common type
                raise ExportError(
                    f"{path} cannot be opened by ONNX Runtime: {error}. Run `clipress export` again."
                ) from None

    def encode(self, tower: str) -> Callable[[np.ndarray], np.ndarray]:
        """Return a function from one batch of inputs to embeddings [B, D]."""
        session = self._sessions[tower]
        name = session.get_inputs()[0].name
        return lambda batch: session.run(None, {name: batch})[0]

    def query(self, tower: str, batch: int) -> Callable[[], Any]:
        """Return one inference on a fixed batch, ready to be timed."""
        takes = self._sessions[tower].get_inputs()[0]
        shape = [batch, *takes.shape[1:]]
        rng = np.random.default_rng(0)
        if tower == "image":
            values = rng.standard_normal(shape, dtype=np.float32)
        else:
            values = rng.integers(1, 400, shape, dtype=np.int64)
            values[:, -1] = 49407  # an end of text somewhere; pooling looks for the largest id
        session, feed = self._sessions[tower], {takes.name: values}
        return lambda: session.run(None, feed)
