"""ONNX Runtime on the CPU, with a fixed number of threads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipress.bench.runners import RUNNERS, Options, Runner
from clipress.errors import ArtifactError
from clipress.runtime.export_folder import Exported, read_export
from clipress.runtime.graph import Graph, Run
from clipress.runtime.onnx_session import open_session, run_of, runs_exactly

TYPES = {"float32": "tensor(float)", "int64": "tensor(int64)"}
ANY = "any length"


@RUNNERS.register("onnxruntime")
class OnnxRuntimeRunner(Runner):
    """The ONNX files of one export folder.

    Args:
        folder: holds export.json and the files it names.
        threads: inside one operator.
    """

    backend = "onnxruntime"

    def __init__(self, folder: Path, threads: int) -> None:
        self.model: Exported = read_export(folder)
        self._threads = threads
        self._sessions = {graph: self._open(graph) for graph in self.model.graphs}
        for graph, session in self._sessions.items():
            check_form(session, graph, self.model)

    @classmethod
    def open(cls, artifact: Path, export: Path, options: Options) -> OnnxRuntimeRunner:
        return cls(export, options.threads)

    @property
    def exact_mode(self) -> bool:
        """Whether 8-bit weights overflow on this CPU, so that ONNX Runtime runs in exact mode."""
        return any(map(runs_exactly, self._sessions.values()))

    def _open(self, graph: str) -> Any:
        return open_session(self.model.onnx(graph), self._threads)

    def run(self, graph: str) -> Run:
        return run_of(self._sessions[graph])

    def query(self, graph: str, batch: int, ids: int = 0) -> Callable[[], Any]:
        return self._query(self._sessions[graph], graph, batch, ids)

    def fresh_query(self, graph: str, batch: int, ids: int = 0) -> Callable[[], Any]:
        """Return the same inference in a session of its own, opened now."""
        return self._query(self._open(graph), graph, batch, ids)

    def _query(self, session: Any, graph: str, batch: int, ids: int) -> Callable[[], Any]:
        inputs = self.model.graphs[graph].example(batch, ids)
        return lambda: session.run(None, inputs)


def check_form(session: Any, name: str, exported: Exported) -> None:
    """Raise ArtifactError for an ONNX file whose inputs and outputs are not those that export.json describes."""
    graph = exported.graphs[name]
    expected = {put.name: (TYPES[put.dtype], [*put.shape] if put.end is None else [ANY]) for put in graph.inputs}
    found = {put.name: (put.type, [_side(side) for side in put.shape[1:]]) for put in session.get_inputs()}
    outputs = {put.name: ("tensor(float)", 1 + len(put.shape)) for put in graph.outputs}
    found_outputs = {put.name: (put.type, len(put.shape)) for put in session.get_outputs()}
    any_batch = all(put.shape and not isinstance(put.shape[0], int) for put in session.get_inputs())
    if found != expected or found_outputs != outputs or not any_batch:
        raise ArtifactError(
            f"{exported.onnx(name)} does not have the inputs and outputs of graph '{name}': expected "
            f"{_form_of(graph)}, found {_puts(session.get_inputs())} -> {_puts(session.get_outputs())}. "
            "Export it again: clipress export RUN"
        )


def _side(side: Any) -> Any:
    return side if isinstance(side, int) else ANY


def _form_of(graph: Graph) -> str:
    def shape(put: Any) -> str:
        return f"[{', '.join(map(str, ('batch', *put.shape)))}]"

    inputs = ", ".join(f"{put.name} {TYPES[put.dtype]} {shape(put)}" for put in graph.inputs)
    return f"{inputs} -> {', '.join(f'{put.name} tensor(float) {shape(put)}' for put in graph.outputs)}"


def _puts(puts: Any) -> str:
    return ", ".join(f"{put.name} {put.type} {put.shape}" for put in puts) or "nothing"
