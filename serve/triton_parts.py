"""The parts that configurations of Triton's models are made of, and what they all depend on."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clipress.runtime.export_folder import Exported
from clipress.runtime.graph import Graph, Input, Output
from clipress.serve.engines import Engines
from clipress.serve.graphs import inputs_for, own_graphs
from clipress.serve.settings import ServeSettings
from clipress.serve.sizing import Sizing

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

INT32, UINT16, BOOL, STRING = "TYPE_INT32", "TYPE_UINT16", "TYPE_BOOL", "TYPE_STRING"
TYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64"}
FP32 = TYPES["float32"]
STAND_BY = 1000  # the rate limiter treats an instance of this priority as if each run were a thousand


@dataclass(frozen=True)
class Served:
    """Everything that the configurations of one version depend on."""

    exported: Exported
    backend: str
    settings: ServeSettings
    sizes: Mapping[str, Sizing]
    """Per graph."""
    engines: Mapping[str, Engines]
    """Per graph; empty unless the backend is tensorrt."""
    fused: Set[str] = frozenset()
    """Graphs that run in the process that prepares their input."""

    @property
    def graphs(self) -> Collection[Graph]:
        """The graphs that have models of their own."""
        return own_graphs(self.exported).values()

    @property
    def needs_exact_mode(self) -> bool:
        """Whether a session opened by Triton itself would overflow on x86 CPUs without VNNI instructions."""
        is_session_of_triton = self.backend == "onnxruntime" and bool(self.graphs)
        return is_session_of_triton and self.exported.precision == "int8" and not self.exported.portable

    def largest_batch(self, graph: str) -> int:
        """Return how many rows a graph takes at once."""
        limit = self.settings.max_batch
        return min(limit, self.engines[graph].largest_batch) if graph in self.engines else limit

    def largest_batch_of(self, sent: str) -> int:
        """Return how many images, or texts, are prepared at once."""
        return max(self.largest_batch(graph) for graph in inputs_for(self.exported, sent))


def begin(name: str, backend: str, max_batch: int) -> ModelConfig:
    """Begin a configuration. It has no response cache by default, since Triton caches errors too."""
    from tritonclient.grpc import model_config_pb2 as triton

    config = triton.ModelConfig(name=name, backend=backend, max_batch_size=max_batch)
    config.version_policy.latest.num_versions = 1
    return config


def dims_of(one: Input) -> Sequence[int]:
    """Return an input's dims. Triton batches requests of the same length, of which there are few (data/padding.py)."""
    return one.shape if one.end is None else [-1]


def add_outputs(config: ModelConfig, outputs: Iterable[Output]) -> None:
    """Add outputs of a graph."""
    for one in outputs:
        config.output.add(name=one.name, data_type=FP32, dims=one.shape)


def add_instances(config: ModelConfig, count: int) -> None:
    """Add instances on CPUs. The first one runs whenever it is idle: instances that take turns find their caches cold."""
    first = config.instance_group.add(count=1)
    first.kind = first.KIND_CPU
    if count > 1:
        others = config.instance_group.add(count=count - 1)
        others.kind = others.KIND_CPU
        first.rate_limiter.priority, others.rate_limiter.priority = 1, STAND_BY


def limit_rate(config: ModelConfig, settings: ServeSettings) -> None:
    """Let all instances take what the settings say from the rate limiter."""
    if settings.rate_limit is not None:
        for group in config.instance_group:
            limiter = group.rate_limiter
            limiter.priority = settings.rate_limit.priority * max(1, limiter.priority)
            for name, count in settings.rate_limit.resources.items():
                limiter.resources.add(name=name, count=count)


def batch_requests(config: ModelConfig, settings: ServeSettings) -> None:
    """Form batches of requests that wait."""
    config.dynamic_batching.SetInParent()  # present, even if empty, means switched on
    config.dynamic_batching.max_queue_delay_microseconds = settings.queue_delay_us
    if settings.queue_size or settings.queue_timeout_ms:
        queue = config.dynamic_batching.default_queue_policy
        queue.max_queue_size = settings.queue_size
        queue.default_timeout_microseconds = 1000 * settings.queue_timeout_ms
        queue.allow_timeout_override = True  # clients may set a shorter one


def add_warm_up(config: ModelConfig, name: str, batch: int, samples: Mapping[str, Mapping[str, Any]]) -> None:
    """Add a request that is sent before the first client's; `samples` say, by input, what it has."""
    from tritonclient.grpc import model_config_pb2 as triton

    warm_up = config.model_warmup.add(name=name, batch_size=batch)
    for one in config.input:
        filled = triton.ModelWarmup.Input(**{"data_type": one.data_type, "dims": one.dims, **samples[one.name]})
        warm_up.inputs[one.name].CopyFrom(filled)


def set_parameters(config: ModelConfig, **parameters: str | None) -> None:
    """Set those parameters that are not None."""
    for key, value in parameters.items():
        if value is not None:
            config.parameters[key].string_value = value
