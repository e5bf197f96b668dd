"""How an export's graphs are served: what clients send for each input, and the role of each graph."""

from __future__ import annotations

from clipress.errors import ExportError
from clipress.runtime.export_folder import Exported
from clipress.runtime.graph import Graph, Input
from clipress.runtime.served import IMAGE, SENT, TEXT, chain_name

PREPARED_BY = {IMAGE: "preprocess", TEXT: "tokenize"}


def sent_for(exported: Exported, one: Input) -> str | None:
    """Return what clients send for an input, IMAGE or TEXT; None where they send the input itself."""
    sent = SENT.get(one.name)
    return None if sent == TEXT and exported.tokenizer is None else sent


def inputs_for(exported: Exported, sent: str) -> dict[str, Input]:
    """Return the inputs that are made from IMAGE or TEXT, by the names of their graphs."""
    return {
        graph.name: one for graph in exported.graphs.values() for one in graph.inputs if sent_for(exported, one) == sent
    }


def chain_of(exported: Exported, graph: Graph) -> str | None:
    """Return the name of the model that prepares a graph's inputs and runs it; None where nothing is prepared."""
    is_chained = any(sent_for(exported, one) for one in graph.inputs)
    return chain_name(graph) if is_chained else None


def is_zero_shot(exported: Exported) -> bool:
    """Return whether images are classified among labels that clients name, as a CLIP does."""
    return exported.logit_scale is not None and {IMAGE, TEXT} <= exported.graphs.keys()


def classifier_graph(exported: Exported) -> Graph | None:
    """Return the graph that scores images for the export's own labels; None if it has none."""
    for graph in exported.graphs.values():
        if (
            exported.labels
            and graph.agrees == "logits"
            and [sent_for(exported, one) for one in graph.inputs] == [IMAGE]
        ):
            return graph
    return None


def segmenter_graph(exported: Exported) -> Graph | None:
    """Return the graph that scores the patches of an image for the export's own labels; None if it has none."""
    found = [graph for graph in exported.graphs.values() if graph.agrees == "masks"]
    return found[0] if found and exported.labels else None


def embedder(exported: Exported, side: str) -> Graph:
    """Return the graph that embeds images, or texts. Raises ExportError for an export that has none."""
    graph = exported.graphs.get(side)
    if graph is None or graph.agrees != "embeddings":
        raise ExportError(
            f"{exported.folder}: expected a graph '{side}' that gives embeddings, found a {exported.task} with "
            f"{', '.join(exported.graphs)}. Use the export of a CLIP."
        )
    return graph
