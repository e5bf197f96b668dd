"""TensorRT on the GPU: the engines that `clipress export --tensorrt` built for this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from clipress.runtime.export_folder import read_export
from clipress.runtime.tensorrt import Engine, Machine, Query, engine_path, find_machine, load_engine


class TensorRTRunner:
    """The two towers of one export folder, as engines.

    Args:
        folder: holds export.json and, in `tensorrt`, the engines.
        precision: of what is not INT8: fp32, fp16 or bf16.
        cuda_graph: launch the computing part of a query as one.
    """

    backend = "tensorrt"

    def __init__(
        self, folder: Path, precision: str = "fp16", cuda_graph: bool = False, machine: Machine | None = None
    ) -> None:
        self.exported = read_export(folder)
        self.machine = machine or find_machine()
        self.cuda_graph = cuda_graph
        self.precision = f"int8-{precision}" if self.exported.precision == "int8" else precision
        self._engines: dict[str, Engine] = {}
        for tower in self.exported.files:
            plan = engine_path(folder / "tensorrt", tower, self.precision, self.machine)
            self._engines[tower] = load_engine(plan, self.machine)

    def encode(self, tower: str) -> Callable[[np.ndarray], np.ndarray]:
        """Return a function from inputs, any number of rows, to embeddings [B, D]."""
        graph, engine = self.exported.graphs[tower], self._engines[tower]
        return lambda rows: engine({graph.inputs[0].name: rows})[graph.outputs[0].name]

    def query(self, tower: str, batch: int) -> Callable[[], Any]:
        """Return one inference on a fixed batch of noise, copies in and out included, ready to be timed.

        Raises ExportError when the engine's profile has no such batch.
        """
        return self._query(tower, batch)

    def phases(self, tower: str, batch: int, iterations: int) -> dict[str, np.ndarray]:
        """Return h2d_ms, compute_ms, d2h_ms and latency_ms of each of `iterations` queries, by CUDA events."""
        query = self._query(tower, batch)
        query()  # first launches load kernels
        samples = []
        for _ in range(iterations):
            query()
            samples.append(query.phases())
        return {key: np.asarray([sample[key] for sample in samples]) for key in samples[0]}

    def _query(self, tower: str, batch: int) -> Query:
        return self._engines[tower].query(self.exported.graphs[tower].example(batch), self.cuda_graph)
