"""ONNX Runtime on a GPU. Inputs and outputs stay on the device: no transfers are timed, as in trtexec 11."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from clipress.bench.runners import noise
from clipress.bench.runners.onnxruntime import check_form
from clipress.errors import RecipeError
from clipress.runtime.export_folder import read_export
from clipress.runtime.onnx_session import open_session


class OnnxRuntimeCudaRunner:
    """The two towers of one export folder, on the first GPU.

    Args:
        folder: holds image.onnx, text.onnx and export.json.
    """

    backend = "onnxruntime-cuda"
    provider, place = "CUDAExecutionProvider", "cuda"

    def __init__(self, folder: Path) -> None:
        self.exported = read_export(folder)
        self.device = self.place
        self._sessions = {tower: self._open(self.exported.onnx(tower)) for tower in self.exported.files}
        for tower, session in self._sessions.items():
            check_form(session, tower, self.exported)

    def _open(self, path: Path) -> Any:
        import onnxruntime

        offered = onnxruntime.get_available_providers()
        if self.provider not in offered:
            raise RecipeError(
                f"Runner {self.backend} was asked for; this onnxruntime {onnxruntime.__version__} offers "
                f"{', '.join(offered)}. Install onnxruntime-gpu in its place, or choose another --runner."
            )
        session = open_session(path, provider=self.provider)
        if session.get_providers()[0] != self.provider:  # it falls back to the CPU without a word
            raise RecipeError(f"Runner {self.backend} was asked for; ONNX Runtime found no GPU that it can use.")
        return session

    def encode(self, tower: str) -> Callable[[np.ndarray], np.ndarray]:
        """Return a function from one batch of inputs to embeddings [B, D]."""
        session = self._sessions[tower]
        name = session.get_inputs()[0].name
        return lambda batch: session.run(None, {name: batch})[0]

    def query(self, tower: str, batch: int) -> Callable[[], Any]:
        """Return one inference on a fixed batch of noise that is on the device already; it returns with the answer."""
        import onnxruntime

        session = self._sessions[tower]
        takes, gives = session.get_inputs()[0], session.get_outputs()[0]
        inputs = onnxruntime.OrtValue.ortvalue_from_numpy(noise(tower, (batch, *takes.shape[1:])), self.place, 0)
        binding = session.io_binding()
        binding.bind_ortvalue_input(takes.name, inputs)
        binding.bind_output(gives.name, self.place)

        def answer(_held: Any = inputs) -> None:  # a binding does not keep alive what it reads
            session.run_with_iobinding(binding)

        return answer
