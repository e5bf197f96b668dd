"""The interface of runners, which run a model on one backend, and their registry; one file each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from clipress.registry import Registry

if TYPE_CHECKING:
    from clipress.data.tokens import Tokenize
    from clipress.data.transforms import Preprocess
    from clipress.runtime.graph import Graph, Run


class ModelInfo(Protocol):
    """What measuring needs to know about a model. An `Exported` has these attributes."""

    task: str
    graphs: Mapping[str, Graph]
    precision: str
    preprocess: Preprocess
    parity: Mapping[str, Any]

    @property
    def bytes(self) -> int:
        """Size of the files the model was loaded from."""

    def tokenize(self) -> Tokenize | None:
        """Return the tokenizer; None for a model that reads no texts."""


@dataclass(frozen=True)
class Loaded:
    """The same for a model that was loaded from an artifact's weights."""

    task: str
    graphs: Mapping[str, Graph]
    precision: str
    preprocess: Preprocess
    tokenize: Callable[[], Tokenize | None]
    bytes: int
    parity: Mapping[str, Any]


class Options(Protocol):
    """The settings that runners read. `BenchSettings` has them."""

    threads: int
    dtype: str
    use_sparse_kernels: bool


class Runner(ABC):
    """All graphs of one model, loaded and ready to run."""

    backend: ClassVar[str]
    model: ModelInfo
    device: str = "cpu"
    exact_mode: bool = False
    """Whether ONNX Runtime runs in exact mode, since 8-bit weights overflow on this CPU."""
    fresh_query: Callable[[str, int, int], Callable[[], Any]] | None = None
    """A method like `query` that opens a session of its own; None where a runner cannot do that."""

    @classmethod
    @abstractmethod
    def open(cls, artifact: Path, export: Path, options: Options) -> Runner:
        """Load a model. Raises ClipressError where the machine or the files do not allow it."""

    @abstractmethod
    def run(self, graph: str) -> Run:
        """Return a graph as a function from inputs by name to outputs by name."""

    @abstractmethod
    def query(self, graph: str, batch: int, ids: int = 0) -> Callable[[], Any]:
        """Return one inference on a fixed random batch, ready to be timed; a `latency.Enqueued` on a device.

        Texts have `ids` ids, where the graph takes any number; 0: they are whole.
        """


RUNNERS: Registry[type[Runner]] = Registry("runner", "clipress.bench.runners")


def open_runner(backend: str, artifact: Path, export: Path, options: Options) -> Runner:
    """Open a model on a backend. Raises ClipressError where the machine or the files do not allow it."""
    return RUNNERS.find(backend, "bench.backends").open(artifact, export, options)
