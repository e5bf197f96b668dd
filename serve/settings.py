"""The `serve` section of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, field_validator

from clipress.recipe import Section

Count = Literal["auto"] | Annotated[int, Field(ge=1, le=1024)]


class RateLimit(Section):
    """What Triton's rate limiter asks of the encoders. It works where the server gets --rate-limit=execution_count, as
    `clipress triton` and the repository's page have it."""

    resources: dict[str, PositiveInt] = Field(default_factory=dict)
    """How much of which resource one run takes. Models that name the same resource share it."""
    priority: int = Field(1, ge=1)
    """An encoder of priority 2 is let run half as often as one of priority 1."""


class ServeSettings(Section):
    """What the Triton model repositories ask of the server."""

    backend: tuple[Literal["onnxruntime", "python", "tensorrt"], ...] = Field(("onnxruntime", "python"), min_length=1)
    """Of the encoders, one or several; each becomes a repository of its own."""
    container: str = Field("24.10", pattern=r"^\d\d\.\d\d$")
    """Release of NVIDIA's container; engines need the one that has their TensorRT."""
    precision: str | None = None
    """Of the engines, such as fp16 or int8-fp16; absent: there is one only."""
    max_batch: int = Field(64, ge=1, le=1024)
    """Largest batch the server makes of waiting requests, and takes in one request; of engines, no more than they take."""
    queue_delay_us: int = Field(0, ge=0, le=1_000_000)
    """Microseconds a request may wait for company. A lone client pays them in full; at 0, busy servers batch all the same."""
    queue_size: int = Field(0, ge=0, le=1_000_000)
    """Requests that may wait for a model; more are refused at once. 0: any number.

    With this or `queue_timeout_ms` Triton keeps its dynamic batcher from working ahead, and 2.51 then loses wake-ups:
    requests wait half a second for nothing, the fewer instances the more often, and throughput may decay until the model
    is loaded again (triton-inference-server/server#8870)."""
    queue_timeout_ms: int = Field(0, ge=0, le=3_600_000)
    """Milliseconds a request may wait in a model's queue before it is refused. 0: for ever. See `queue_size`."""
    instances: Count = "auto"
    """Copies of each model that work at the same time; auto: see serve/sizing.py."""
    threads: Count = "auto"
    """Of ONNX Runtime, inside one operator, per instance; auto: see serve/sizing.py."""
    gpus: tuple[int, ...] | None = None
    """Devices that engines run on, `instances` on each; absent: all."""
    rate_limit: RateLimit | None = None
    text_cache_mb: int = Field(0, ge=0, le=65_536)
    """Memory for the embeddings of ids that were asked before, kept by Triton itself; 0: no such cache. Triton keeps errors
    too, and gives them out as empty answers until they fall out: only where texts are few and clients try again."""
    label_cache_mb: int = Field(64, ge=0, le=65_536)
    """Memory for the embeddings of label sets, per instance of `classify`; the least recently used set goes first."""
    index: Path | None = None
    """Folder of an index that `search` looks in; absent: no such model."""

    @field_validator("backend", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value
