"""The `bench` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from clipress.bench.runners import RUNNERS
from clipress.data.padding import CAPTION
from clipress.recipe import Section


class BenchSettings(Section):
    """The `bench` section, in trtexec's terms."""

    backends: tuple[Annotated[str, AfterValidator(RUNNERS.check)], ...] = Field(("onnxruntime",), min_length=1)
    """Runners; the first model on the first runner is the reference that all others are compared with."""
    batch: tuple[int, ...] = (1, 8, 32)
    ids: tuple[Annotated[int, Field(ge=1)], ...] = (CAPTION,)
    """Also time texts of so many ids, where the text tower needs no padding; whole texts are always timed."""
    threads: int = Field(1, ge=1)
    """Threads of ONNX Runtime and torch inside one operator. On a shared machine, one thread gives the steadiest figures."""
    cpus: tuple[int, ...] | None = None
    """CPUs to pin to. Absent: the last `threads` CPUs of those allowed; empty: no pinning."""
    warm_up: int = Field(200, ge=0)
    """Milliseconds that each model runs before it is timed."""
    duration: int = Field(1000, ge=0)
    """Milliseconds that each model is timed for, at least, per graph and batch."""
    iterations: int = Field(10, ge=1)
    """Queries that each model runs, at least, per graph and batch."""
    max_accuracy_drop: float = Field(1.0, ge=0)
    """Points of accuracy (top-1, R@1) that a faster INT8 or 2:4 model may lose on any set and still be kept."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Data type of the torch runners; bf16 requires a GPU."""
    use_sparse_kernels: bool = False
    """Use semi-structured kernels for 2:4 weights in the torch runners; requires a GPU and bf16."""
