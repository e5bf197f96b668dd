"""The names that a server's models have, shared by those who write repositories and those who send requests."""

from __future__ import annotations

from clipress.runtime.graph import Graph

IMAGE, TEXT = "image", "text"
"""What clients send: image files and UTF-8 texts. CLIP's two graphs have the same names."""
SENT = {"pixel_values": IMAGE, "input_ids": TEXT}
"""Inputs of graphs that the server makes from what clients send. Other inputs are sent as they are."""
MODELS = {"embeddings": "{}_encoder", "logits": "{}_classifier", "masks": "{}_segmenter"}
CHAINS = {"embeddings": "embed_{}", "logits": "score_{}", "masks": "score_patches_of_{}"}


def model_of(graph: Graph) -> str:
    """Return the name of the model that runs a graph on its own inputs."""
    return MODELS[graph.agrees].format(graph.name)


def chain_name(graph: Graph) -> str:
    """Return the name of the model that prepares a graph's inputs and runs it."""
    return CHAINS[graph.agrees].format(graph.name)
