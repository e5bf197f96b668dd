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
"""A graph as a function from inputs to outputs, whatever it runs on."""
Agreement = Literal["embeddings", "logits"]
"""How two implementations of a graph are compared: by cosines and rankings, or by cosines and the first place."""


class Input(BaseModel):
    """One input of a graph."""

    model_config = ConfigDict(frozen=True)

    name: str
    """Becomes a value of the ONNX file, so it must differ from every name that torch's exporters generate."""
    dtype: Literal["float32", "int64"]
    shape: tuple[int, ...]
    """Without the batch."""
    largest: int = Field(1, ge=1)
    """The largest value in random int64 data."""

    def example(self, batch: int) -> np.ndarray:
        """Return random data, [batch, *shape], the same at every call: latency is measured on it."""
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
    """Also the file's name, `<name>.onnx`, and the graph's name in tables and options."""
    inputs: tuple[Input, ...] = Field(min_length=1)
    outputs: tuple[Output, ...] = Field(min_length=1)
    """Rankings and first places are compared on the first one."""
    agrees: Agreement = "embeddings"

    def example(self, batch: int) -> dict[str, np.ndarray]:
        """Return random inputs by name, the same at every call."""
        return {one.name: one.example(batch) for one in self.inputs}


def clip_graphs(size: int, length: int, dim: int) -> dict[str, Graph]:
    """Return the graphs of a CLIP with images of `size` pixels, texts of `length` ids and embeddings of `dim` dims.

    Exports of version 1 are CLIPs and do not describe their graphs, so that readers need these too.
    """
    pixels = Input(name="pixel_values", dtype="float32", shape=(3, size, size))
    ids = Input(name="input_ids", dtype="int64", shape=(length,), largest=399)
    return {
        side: Graph(name=side, inputs=(takes,), outputs=(Output(name=f"{side}_embeds", shape=(dim,)),))
        for side, takes in (("image", pixels), ("text", ids))
    }
