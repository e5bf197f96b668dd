"""ONNX Runtime on the CPU, with a stated number of threads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from clipress.bench.runners import input_shape, noise
from clipress.errors import ArtifactError
from clipress.runtime.export_folder import Exported, read_export
from clipress.runtime.onnx_session import open_session, runs_exactly

TYPES = {"image": "tensor(float)", "text": "tensor(int64)"}


class OnnxRuntimeRunner:
    """The two towers of one export folder.

    Args:
        folder: holds image.onnx, text.onnx and export.json.
        threads: inside one operator.
    """

    backend = "onnxruntime"

    def __init__(self, folder: Path, threads: int) -> None:
        self.exported = read_export(folder)
        self._threads = threads
        self._sessions = {tower: open_session(self.exported.onnx(tower), threads) for tower in self.exported.files}
        for tower, session in self._sessions.items():
            check_form(session, tower, self.exported)
        self.exact_mode = any(map(runs_exactly, self._sessions.values()))

    def encode(self, tower: str) -> Callable[[np.ndarray], np.ndarray]:
        """Return a function from one batch of inputs to embeddings [B, D]."""
        session = self._sessions[tower]
        name = session.get_inputs()[0].name
        return lambda batch: session.run(None, {name: batch})[0]

    def query(self, tower: str, batch: int) -> Callable[[], Any]:
        """Return one inference on a fixed batch of noise, ready to be timed."""
        return self._query(self._sessions[tower], tower, batch)

    def fresh_query(self, tower: str, batch: int) -> Callable[[], Any]:
        """Return the same inference in a session of its own, opened now."""
        return self._query(open_session(self.exported.onnx(tower), self._threads), tower, batch)

    def _query(self, session: Any, tower: str, batch: int) -> Callable[[], Any]:
        takes = session.get_inputs()[0]
        inputs = noise(tower, (batch, *takes.shape[1:]))
        return lambda: session.run(None, {takes.name: inputs})


def check_form(session: Any, tower: str, exported: Exported) -> None:
    """Raise ArtifactError for an ONNX file that takes and gives something else than a tower does."""
    rest = list(input_shape(exported, tower))
    takes = [(put.type, put.shape[1:]) for put in session.get_inputs()]
    gives = [(put.type, len(put.shape)) for put in session.get_outputs()]
    free = all(not isinstance(put.shape[0], int) for put in session.get_inputs() if put.shape)
    if takes != [(TYPES[tower], rest)] or gives != [("tensor(float)", 2)] or not free:
        told = ", ".join(f"{put.name} {put.type} {put.shape}" for put in session.get_inputs())
        given = ", ".join(f"{put.name} {put.type} {put.shape}" for put in session.get_outputs())
        raise ArtifactError(
            f"{exported.onnx(tower)} is no {tower} tower that clipress exported: {TYPES[tower]} [batch, "
            f"{', '.join(map(str, rest))}] -> tensor(float) [batch, {exported.embed_dim}] is asked for, found "
            f"{told or 'no input'} -> {given or 'no output'}. Make it again: clipress export RUN"
        )
