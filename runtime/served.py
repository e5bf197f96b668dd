"""The names of a server's models and their tensors, shared by those who write repositories and those who send requests."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

from clipress.runtime.graph import Graph

IMAGE, TEXT = "image", "text"
"""What clients send: image files and UTF-8 texts. CLIP's two graphs have the same names."""
SENT = {"pixel_values": IMAGE, "input_ids": TEXT}
"""Inputs of graphs that the server makes from what clients send. Other inputs are sent as they are."""
MODELS = {"embeddings": "{}_encoder", "logits": "{}_classifier", "masks": "{}_segmenter"}
CHAINS = {"embeddings": "embed_{}", "logits": "score_{}", "masks": "score_patches_of_{}"}
CAPTION, ANSWER, JUDGE, MATCH = "caption", "answer", "judge", "match"
OTHER_IMAGE, QUESTION, ANSWERS, STATEMENT = "other_image", "question", "answers", "statement"
PROBABILITY = "probability"


@dataclass(frozen=True)
class Use:
    """What a BLIP is for: the graphs that it has, and what its model takes and gives."""

    graphs: Set[str]
    takes: tuple[str, ...]
    """Lists, with one of each per row; only `ANSWERS` is for all rows, and optional."""
    gives: str


USES = {
    CAPTION: Use({IMAGE, "memory", "decode"}, (IMAGE,), "caption"),
    ANSWER: Use({IMAGE, "question", "answer"}, (IMAGE, QUESTION, ANSWERS), "answer"),
    JUDGE: Use({IMAGE, "reason"}, (IMAGE, OTHER_IMAGE, STATEMENT), PROBABILITY),
    MATCH: Use({IMAGE, TEXT, "match"}, (IMAGE, TEXT), PROBABILITY),
}
"""Named as the BLIP's model and as the method of a LoadedModel."""


def use_of(graphs: Mapping[str, Graph]) -> str | None:
    """Return what a BLIP is for, one of USES; None for other models."""
    return next((name for name, use in USES.items() if use.graphs == graphs.keys()), None)


def separate(graphs: Mapping[str, Graph]) -> Mapping[str, Graph]:
    """Return the graphs that have models of their own: all, or none of a BLIP that one model runs as a whole."""
    return {} if use_of(graphs) in (CAPTION, ANSWER, JUDGE) else graphs


def model_of(graph: Graph) -> str:
    """Return the name of the model that runs a graph on its own inputs."""
    return MODELS[graph.agrees].format(graph.name)


def chain_name(graph: Graph) -> str:
    """Return the name of the model that prepares a graph's inputs and runs it."""
    return CHAINS[graph.agrees].format(graph.name)
