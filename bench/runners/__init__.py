"""What a model is measured on: one small file each, opened by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from clipress.bench.settings import BenchSettings
    from clipress.data.transforms import Preprocess
    from clipress.runtime.export_folder import Tokenizer


class Subject(Protocol):
    """What a runner runs, as far as measuring needs to know. An `Exported` is one."""

    precision: str
    preprocess: Preprocess
    tokenizer: Tokenizer
    parity: dict[str, Any]

    @property
    def bytes(self) -> int:
        """Size of what it was loaded from."""


@dataclass(frozen=True)
class Loaded:
    """A subject that was loaded from an artefact's weights."""

    precision: str
    preprocess: Preprocess
    tokenizer: Tokenizer
    bytes: int
    parity: dict[str, Any]


class Runner(Protocol):
    """Both towers of one model, ready to answer.

    Two more are used where a runner has them: `device`, a name, and `fresh_query(tower, batch)`, a query like `query`'s in a
    session that is opened for it.
    """

    backend: str
    exported: Subject

    def encode(self, tower: str) -> Callable[[np.ndarray], np.ndarray]:
        """Return a function from one batch of inputs to embeddings [B, D]."""

    def query(self, tower: str, batch: int) -> Callable[[], Any]:
        """Return one inference on a fixed batch of noise, ready to be timed; `latency.Enqueued` on a device."""


def input_shape(subject: Subject, tower: str) -> tuple[int, ...]:
    """Return the shape of one input of a tower."""
    size = subject.preprocess.size
    return (3, size, size) if tower == "image" else (subject.tokenizer.context_length,)


def noise(tower: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return inputs of a tower that mean nothing, the same every time."""
    rng = np.random.default_rng(0)
    return rng.standard_normal(shape, dtype=np.float32) if tower == "image" else rng.integers(1, 400, shape)


def open_runner(backend: str, artifact: Path, export: Path, settings: BenchSettings) -> Runner:
    """Open a model on a backend. Raises ClipressError where the machine or the files do not allow it."""
    if backend == "onnxruntime":
        from clipress.bench.runners.onnxruntime import OnnxRuntimeRunner

        return OnnxRuntimeRunner(export, settings.threads)
    if backend == "onnxruntime-cuda":
        from clipress.bench.runners.onnxruntime_cuda import OnnxRuntimeCudaRunner

        return OnnxRuntimeCudaRunner(export)
    if backend == "torch":
        from clipress.bench.runners.torch import TorchRunner

        return TorchRunner(artifact, settings.threads, settings.dtype, settings.two_four)
    if backend == "torch-compiled":
        from clipress.bench.runners.torch_compiled import TorchCompiledRunner

        return TorchCompiledRunner(artifact, settings.threads, settings.dtype, settings.two_four)
    if backend == "tensorrt":
        from clipress.bench.runners.tensorrt import TensorRTRunner

        return TensorRTRunner(export)
    raise ValueError(f"no runner is called {backend}")
