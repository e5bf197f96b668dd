"""The `serve` section of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, field_validator

from clipress.recipe import Section

Count = Literal["auto"] | Annotated[int, Field(ge=1, le=1024)]


class RateLimit(Section):
    """What the encoders take from Triton's rate limiter. It works only if the server is started with
    --rate-limit=execution_count, as `clipress triton` and the repository's README.md do."""

    resources: dict[str, PositiveInt] = Field(default_factory=dict)
    """How much of each resource one run takes. Models that name the same resource share it."""
    priority: int = Field(1, ge=1)
    """An encoder of priority 2 runs half as often as one of priority 1."""


class ServeSettings(Section):
    """The `serve` section: how Triton model repositories are written."""

    backend: tuple[Literal["onnxruntime", "python", "tensorrt"], ...] = Field(("onnxruntime", "python"), min_length=1)
    """Backends of the encoders, one or several. Each gets a repository of its own."""
    container: str = Field("24.10", pattern=r"^\d\d\.\d\d$")
    """Release of NVIDIA's container. Engines need the one with their version of TensorRT."""
    precision: str | None = None
    """Precision of the engines, such as fp16 or int8-fp16. Not needed if there is only one."""
    max_batch: int = Field(64, ge=1, le=1024)
    """Largest batch that the server forms, and accepts in one request. Engines may take less."""
    queue_delay_us: int = Field(0, ge=0, le=1_000_000)
    """Microseconds a request may wait to be batched. A lone client always waits that long; busy servers batch even at 0."""
    queue_size: int = Field(0, ge=0, le=1_000_000)
    """Requests that may wait for a model; further ones are refused at once. 0 sets no limit.

    With this or `queue_timeout_ms` Triton keeps its dynamic batcher from working ahead, and 2.51 then loses wake-ups:
    requests wait half a second for nothing, the fewer instances the more often, and throughput may decay until the model
    is loaded again (triton-inference-server/server#8870)."""
    queue_timeout_ms: int = Field(0, ge=0, le=3_600_000)
    """Milliseconds after which a waiting request is refused. 0 sets no limit. See `queue_size`."""
    instances: Count = "auto"
    """Copies of each model that work in parallel; auto: see serve/sizing.py."""
    threads: Count = "auto"
    """Threads of ONNX Runtime inside one operator, per instance; auto: see serve/sizing.py."""
    gpus: tuple[int, ...] | None = None
    """Devices for engines, `instances` on each. Default: all."""
    rate_limit: RateLimit | None = None
    text_cache_mb: int = Field(0, ge=0, le=65_536)
    """Memory for embeddings of token ids that were sent before, kept by Triton itself; 0 for no cache. Triton caches errors
    too and returns them as empty answers until they are evicted: use it only where texts are few and clients retry."""
    label_cache_mb: int = Field(64, ge=0, le=65_536)
    """Memory for embeddings of label sets, per instance of `classify`. The least recently used set is dropped first."""
    checksums: bool = False
    """Let the server refuse a model whose files are not as they were written. It needs Triton's repository agent `checksum`,
    which NVIDIA's containers have; the server that `clipress triton` downloads has none."""
    keep: int | None = Field(None, ge=1)
    """How many versions of the models a repository keeps, the newest ones and the served one. Default: all."""
    index: Path | None = None
    """Folder of the index that `search` uses. Without one there is no such model."""

    @field_validator("backend", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value
