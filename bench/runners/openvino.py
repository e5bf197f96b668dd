"""OpenVINO on the CPU, on the files and with the threads that ONNX Runtime has."""

from __future__ import annotations

from typing import Any

from clipress.bench.runners import RUNNERS
from clipress.bench.runners.onnxruntime import OnnxRuntimeRunner
from clipress.errors import ExportError
from clipress.runtime.openvino import open_openvino_session


@RUNNERS.register("openvino")
class OpenVinoRunner(OnnxRuntimeRunner):
    """The ONNX files of one export folder, for any batch.

    Where a convolutional INT8 graph has two forms and OpenVINO fails the self-test of the first, the second one runs, and the
    precision says so. OpenVINO has no exact mode: a file whose products overflow on this CPU is refused.
    """

    backend = "openvino"
    exact_mode = False

    def _open(self, graph: str) -> Any:
        try:
            return open_openvino_session(self.model.onnx(graph), self._threads)
        except ExportError:
            if graph not in self.model.explicit:
                raise
        files = {**self.model.files, graph: self.model.explicit[graph]}
        precision = f"{self.model.precision}, {files[graph].file}"
        self.model = self.model.model_copy(update={"files": files, "explicit": {}, "precision": precision})
        return open_openvino_session(self.model.onnx(graph), self._threads)
