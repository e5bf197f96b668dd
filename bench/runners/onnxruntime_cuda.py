"""ONNX Runtime on a GPU. Inputs and outputs stay on the device: transfers are not timed, as in trtexec 11."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipress.bench.runners import RUNNERS, Options, Runner
from clipress.bench.runners.onnxruntime import check_form
from clipress.errors import RecipeError
from clipress.runtime.export_folder import Exported, read_export
from clipress.runtime.graph import Run
from clipress.runtime.onnx_session import open_session, run_of


@RUNNERS.register("onnxruntime-cuda")
class OnnxRuntimeCudaRunner(Runner):
    """The ONNX files of one export folder, on the first GPU.

    Args:
        folder: holds export.json and the files it names.
    """

    backend = "onnxruntime-cuda"
    provider, place = "CUDAExecutionProvider", "cuda"

    def __init__(self, folder: Path) -> None:
        self.model: Exported = read_export(folder)
        self.device = self.place
        self._sessions = {graph: self._open(self.model.onnx(graph)) for graph in self.model.graphs}
        for graph, session in self._sessions.items():
            check_form(session, graph, self.model)

    @classmethod
    def open(cls, artifact: Path, export: Path, options: Options) -> OnnxRuntimeCudaRunner:
        return cls(export)

    def _open(self, path: Path) -> Any:
        import onnxruntime

        offered = onnxruntime.get_available_providers()
        if self.provider not in offered:
            raise RecipeError(
                f"Runner {self.backend} needs {self.provider}; onnxruntime {onnxruntime.__version__} here offers "
                f"{', '.join(offered)}. Install onnxruntime-gpu in its place, or choose another --runner."
            )
        session = open_session(path, provider=self.provider)
        if session.get_providers()[0] != self.provider:  # ONNX Runtime falls back to the CPU silently
            raise RecipeError(
                f"Runner {self.backend}: ONNX Runtime found no GPU that it can use. Choose another --runner."
            )
        return session

    def run(self, graph: str) -> Run:
        return run_of(self._sessions[graph])

    def query(self, graph: str, batch: int, ids: int = 0) -> Callable[[], Any]:
        """Return one inference on a random batch that is on the device already; it returns with the result."""
        _, run = self.bound(graph, batch, ids)
        return run

    def bound(self, graph: str, batch: int, ids: int = 0) -> tuple[Any, Callable[[], None]]:
        """Bind a graph's inputs and outputs to the device. Returns the binding, and what runs it."""
        import onnxruntime

        session, form = self._sessions[graph], self.model.graphs[graph]
        inputs = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(rows, self.place, 0)
            for name, rows in form.example(batch, ids).items()
        }
        binding = session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for output in form.outputs:
            binding.bind_output(output.name, self.place)

        def run(_held: Any = inputs) -> None:  # a binding does not keep alive what it reads
            session.run_with_iobinding(binding)

        return binding, run
