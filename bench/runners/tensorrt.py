"""TensorRT on the GPU: the engines that `clipress export --tensorrt` built for this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from clipress.bench.runners import RUNNERS, Options, Runner
from clipress.runtime.export_folder import Exported, read_export
from clipress.runtime.graph import Run
from clipress.runtime.tensorrt import Engine, Machine, Query, engine_path, find_machine, load_engine


@RUNNERS.register("tensorrt")
class TensorRTRunner(Runner):
    """The engines of one export folder.

    Args:
        folder: holds export.json and, in `tensorrt`, the engines.
        precision: of what is not INT8: fp32, fp16 or bf16.
        cuda_graph: launch the compute part of a query as one CUDA graph.
    """

    backend = "tensorrt"

    def __init__(
        self, folder: Path, precision: str = "fp16", cuda_graph: bool = False, machine: Machine | None = None
    ) -> None:
        self.model: Exported = read_export(folder)
        self.machine = machine or find_machine()
        self.cuda_graph = cuda_graph
        self.precision = f"int8-{precision}" if self.model.precision == "int8" else precision
        self._engines: dict[str, Engine] = {}
        for graph in self.model.graphs:
            plan = engine_path(folder / "tensorrt", graph, self.precision, self.machine)
            self._engines[graph] = load_engine(plan, self.machine)

    @classmethod
    def open(cls, artifact: Path, export: Path, options: Options) -> TensorRTRunner:
        return cls(export)

    def run(self, graph: str) -> Run:
        """Return a graph as a function of any number of rows."""
        engine, needed = self._engines[graph], self.model.graphs[graph].needed
        return lambda inputs: engine(needed(inputs))

    def query(self, graph: str, batch: int, ids: int = 0) -> Callable[[], Any]:
        """Return one inference on a fixed random batch, copies in and out included, ready to be timed.

        Raises ExportError if the engine's profile does not include the batch.
        """
        return self._query(graph, batch, ids)

    def phases(self, graph: str, batch: int, iterations: int) -> dict[str, np.ndarray]:
        """Return h2d_ms, compute_ms, d2h_ms and latency_ms of each of `iterations` queries, by CUDA events."""
        query = self._query(graph, batch)
        query()  # the first launch loads kernels
        samples = []
        for _ in range(iterations):
            query()
            samples.append(query.phases())
        return {key: np.asarray([sample[key] for sample in samples]) for key in samples[0]}

    def _query(self, graph: str, batch: int, ids: int = 0) -> Query:
        return self._engines[graph].query(self.model.graphs[graph].example(batch, ids), self.cuda_graph)
