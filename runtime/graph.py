"""Graphs: the functions of a model that are exported, timed, calibrated and compared, described without the model.

A CLIP has two, `image` and `text`; a classifier has one; those of a BLIP read what others compute. Everything after training loops over
them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from clipress.data.padding import TextEnd, without_padding

Arrays = Mapping[str, np.ndarray]
"""A graph's inputs, or outputs, by their names; the batch is the first axis of each."""
Run = Callable[[Arrays], dict[str, np.ndarray]]
"""A graph as a function from inputs to outputs, whatever it runs on."""
Agreement = Literal["embeddings", "logits", "masks"]
"""How two implementations of a graph are compared: by cosines, and by rankings, the first place, or every patch's first class."""


class Input(BaseModel):
    """One input of a graph."""

    model_config = ConfigDict(frozen=True)

    name: str
    """Becomes a value of the ONNX file, so it must differ from every name that torch's exporters generate."""
    dtype: Literal["float32", "int64"]
    shape: tuple[int, ...]
    """Without the batch; of an input with an end, the largest."""
    largest: int = Field(1, ge=1)
    """The largest value in random int64 data."""
    end: TextEnd | None = None
    """Where texts end; they may be given without what comes after. None: the input has one shape."""

    @property
    def longest(self) -> int | None:
        """How many ids a text has at most, where it may have fewer; None for an input of one shape."""
        return None if self.end is None else self.shape[0]

    def sides(self, ids: int = 0) -> tuple[int, ...]:
        """Return the shape without the batch; with `ids`, texts that may be shorter have so many."""
        return (ids,) if ids and self.end is not None else self.shape

    def example(self, batch: int, ids: int = 0) -> np.ndarray:
        """Return random data, [batch, *sides(ids)], the same at every call: latency is measured on it."""
        rng = np.random.default_rng(0)
        shape = (batch, *self.sides(ids))
        if self.dtype == "float32":
            return rng.standard_normal(shape, dtype=np.float32)
        return rng.integers(1, self.largest + 1, shape)


class Output(BaseModel):
    """One output of a graph, float32."""

    model_config = ConfigDict(frozen=True)

    name: str
    shape: tuple[int, ...]
    """Without the batch."""

    def as_input(self) -> Input:
        """Return it as an input of another graph."""
        return Input(name=self.name, dtype="float32", shape=self.shape)


class Graph(BaseModel):
    """One exported function of a model."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """Also the file's name, `<name>.onnx`, and the graph's name in tables and options."""
    inputs: tuple[Input, ...] = Field(min_length=1)
    outputs: tuple[Output, ...] = Field(min_length=1)
    """Rankings and first places are compared on the first one."""
    agrees: Agreement = "embeddings"

    def example(self, batch: int, ids: int = 0) -> dict[str, np.ndarray]:
        """Return random inputs by name, the same at every call; `ids` as for `Input.sides`."""
        return {one.name: one.example(batch, ids) for one in self.inputs}

    def needed(self, inputs: Arrays) -> Arrays:
        """Return inputs without the padding of texts, which the outputs do not depend on."""
        return needed(inputs, {one.name: one.end for one in self.inputs if one.end is not None})


def needed(inputs: Arrays, ends: Mapping[str, TextEnd]) -> Arrays:
    """Return inputs without the padding of texts; `ends` says, by input, where they end."""
    return {name: without_padding(rows, [ends[name]]) if name in ends else rows for name, rows in inputs.items()}


def clip_graphs(size: int, length: int, dim: int, end: TextEnd | None = None) -> dict[str, Graph]:
    """Return the graphs of a CLIP with images of `size` pixels, texts of `length` ids and embeddings of `dim` dims.

    `end` says where texts end, for a text tower that needs no padding.

    Exports of version 1 are CLIPs and do not describe their graphs, so that readers need these too.
    """
    pixels = Input(name="pixel_values", dtype="float32", shape=(3, size, size))
    ids = Input(name="input_ids", dtype="int64", shape=(length,), largest=399, end=end)
    return {
        side: Graph(name=side, inputs=(takes,), outputs=(Output(name=f"{side}_embeds", shape=(dim,)),))
        for side, takes in (("image", pixels), ("text", ids))
    }
