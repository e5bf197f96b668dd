"""The `serve` section of a recipe."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from clipress.recipe import Section


class ServeSettings(Section):
    """What the Triton model repositories ask of the server."""

    backend: tuple[Literal["onnxruntime", "python"], ...] = Field(("onnxruntime", "python"), min_length=1)
    """One or several; each becomes a repository of its own."""
    max_batch: int = Field(64, ge=1, le=1024)
    """Largest batch the server makes of waiting requests, and takes in one request."""
    queue_delay_us: int = Field(0, ge=0, le=1_000_000)
    """Microseconds a request may wait for company. A lone client pays them in full; at 0, busy servers batch all the same."""
    instances: int = Field(1, ge=1, le=64)
    """Copies of each model that work at the same time."""
    threads: int = Field(1, ge=1, le=1024)
    """Of ONNX Runtime, inside one operator, per instance."""

    @field_validator("backend", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value
