"""Graphs: the functions of a model that are exported, timed, calibrated and compared, described without the model.

A CLIP has two, `image` and `text`; a classifier has one. Everything after training loops over them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

Arrays = Mapping[str, np.ndarray]
"""A graph's inputs, or outputs, by their names; the batch is the first axis of each."""
Run = Callable[[Arrays], dict[str, np.ndarray]]
"""A graph that can be called, whatever it runs on: inputs -> outputs."""
Agreement = Literal["embeddings", "logits"]
"""How two implementations of a graph are compared: cosines and rankings, or differences and first places."""


class Input(BaseModel):
    """One input of a graph."""

    model_config = ConfigDict(frozen=True)

    name: str
    dtype: Literal["float32", "int64"]
    shape: tuple[int, ...]
    """Without the batch."""
    largest: int = Field(1, ge=1)
    """Of int64 inputs: the largest value that random data may have."""

    def example(self, batch: int) -> np.ndarray:
        """Return random data of the right form, [batch, *shape]: what a latency is measured on, the same at every call."""
        rng = np.random.default_rng(0)
        shape = (batch, *self.shape)
        if self.dtype == "float32":
            return rng.standard_normal(shape, dtype=np.float32)
        return rng.integers(1, self.largest + 1, shape)


class Output(BaseModel):
    """One output of a graph, float32."""

    model_config = ConfigDict(frozen=True)

    name: str
    shape: tuple[int, ...]
    """Without the batch."""


class Graph(BaseModel):
    """One exported function of a model."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """Names the file, `<name>.onnx`, and rows and options that speak of the graph."""
    inputs: tuple[Input, ...] = Field(min_length=1)
    outputs: tuple[Output, ...] = Field(min_length=1)
    """The first one is what implementations are compared by."""
    agrees: Agreement = "embeddings"

    def example(self, batch: int) -> dict[str, np.ndarray]:
        """Return random inputs of the right form."""
        return {one.name: one.example(batch) for one in self.inputs}


def clip_graphs(size: int, length: int, dim: int) -> dict[str, Graph]:
    """Return a CLIP's graphs; `size` of its images in pixels, `length` of its texts in ids, `dim` of its embeddings.

    They stand here since exports of version 1 do not describe their graphs, and are CLIPs.
    """
    pixels = Input(name="pixel_values", dtype="float32", shape=(3, size, size))
    ids = Input(name="input_ids", dtype="int64", shape=(length,), largest=399)
    return {
        side: Graph(name=side, inputs=(takes,), outputs=(Output(name=f"{side}_embeds", shape=(dim,)),))
        for side, takes in (("image", pixels), ("text", ids))
    }
