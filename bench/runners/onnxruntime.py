"""ONNX Runtime on the CPU, with a stated number of threads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from clipress.models.exported import cpu_session, read_export


class OnnxRuntimeRunner:
    """The two towers of one export folder.

    Args:
        folder: holds image.onnx, text.onnx and export.json.
        threads: inside one operator.
    """

    backend = "onnxruntime"

    def __init__(self, folder: Path, threads: int) -> None:
        self.exported = read_export(folder)
        self._sessions = {tower: cpu_session(self.exported.onnx(tower), threads) for tower in self.exported.files}

    def encode(self, tower: str) -> Callable[[np.ndarray], np.ndarray]:
        """Return a function from one batch of inputs to embeddings [B, D]."""
        session = self._sessions[tower]
        name = session.get_inputs()[0].name
        return lambda batch: session.run(None, {name: batch})[0]

    def query(self, tower: str, batch: int) -> Callable[[], Any]:
        """Return one inference on a fixed batch of noise, ready to be timed."""
        session = self._sessions[tower]
        takes = session.get_inputs()[0]
        shape = [batch, *takes.shape[1:]]
        rng = np.random.default_rng(0)
        noise = rng.standard_normal(shape, dtype=np.float32) if tower == "image" else rng.integers(1, 400, shape)
        return lambda: session.run(None, {takes.name: noise})
