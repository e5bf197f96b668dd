"""The `bench` section of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from clipress.recipe import Section


class BenchSettings(Section):
    """What is measured, in trtexec's words."""

    backends: tuple[Literal["onnxruntime"], ...] = ("onnxruntime",)
    batch: tuple[int, ...] = (1, 8, 32)
    threads: int = Field(1, ge=1)
    """Of ONNX Runtime, inside one operator. One thread is what a shared machine measures best."""
    warm_up: int = Field(200, ge=0)
    """Milliseconds each model runs before it counts."""
    duration: int = Field(1000, ge=0)
    """Milliseconds each model runs at least, per tower and batch."""
    iterations: int = Field(10, ge=1)
    """Queries each model answers at least, per tower and batch."""
