"""The `bench` section of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from clipress.recipe import Section

Backend = Literal["onnxruntime", "onnxruntime-cuda", "torch", "torch-compiled", "tensorrt"]


class BenchSettings(Section):
    """What is measured, in trtexec's words."""

    backends: tuple[Backend, ...] = Field(("onnxruntime",), min_length=1)
    """What the models run on; the first one, with the first model, is what the others are compared with."""
    batch: tuple[int, ...] = (1, 8, 32)
    threads: int = Field(1, ge=1)
    """Of ONNX Runtime and torch, inside one operator. One thread is what a shared machine measures best."""
    cpus: tuple[int, ...] | None = None
    """CPUs to stay on. Absent: as many as threads, the last of those allowed; empty: wherever the system likes."""
    warm_up: int = Field(200, ge=0)
    """Milliseconds each model runs before it counts."""
    duration: int = Field(1000, ge=0)
    """Milliseconds each model runs at least, per tower and batch."""
    iterations: int = Field(10, ge=1)
    """Queries each model answers at least, per tower and batch."""
    max_loss: float = Field(1.0, ge=0)
    """Points of top-1 or R@1 on any set that an INT8 or 2:4 model may lose and still be kept for being faster."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the torch runners; bf16 needs a GPU."""
    two_four: bool = False
    """Let the torch runners use 2:4 weights as such (semi-structured kernels); needs a GPU and bf16."""
