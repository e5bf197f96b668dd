"""How an export's graphs are served: what clients send for each input, and the role of each graph."""

from __future__ import annotations

from collections.abc import Mapping

from clipress.errors import ExportError
from clipress.runtime import served
from clipress.runtime.export_folder import Exported
from clipress.runtime.graph import Graph, Input
from clipress.runtime.served import ANSWER, CAPTION, IMAGE, JUDGE, MATCH, SENT, TEXT, chain_name

PREPARED_BY = {IMAGE: "preprocess", TEXT: "tokenize"}
USES = {
    CAPTION: "writes captions of images",
    ANSWER: "answers questions about images",
    JUDGE: "judges statements about two images",
    MATCH: "finds images for texts and texts for images",
}


def sent_for(exported: Exported, one: Input) -> str | None:
    """Return what clients send for an input, IMAGE or TEXT; None where they send the input itself."""
    sent = SENT.get(one.name)
    return None if sent == TEXT and exported.tokenizer is None else sent


def inputs_for(exported: Exported, sent: str) -> dict[str, Input]:
    """Return the inputs that are made from IMAGE or TEXT, by the names of their graphs."""
    return {
        graph.name: one
        for graph in own_graphs(exported).values()
        for one in graph.inputs
        if sent_for(exported, one) == sent
    }


def chain_of(exported: Exported, graph: Graph) -> str | None:
    """Return the name of the model that prepares a graph's inputs and runs it; None where nothing is prepared."""
    is_chained = any(sent_for(exported, one) for one in graph.inputs)
    return chain_name(graph) if is_chained else None


def use_of(exported: Exported) -> str | None:
    """Return what a BLIP is for, one of USES; None for other models."""
    return served.use_of(exported.graphs)


def own_graphs(exported: Exported) -> Mapping[str, Graph]:
    """Return the graphs that have models of their own, see runtime/served.py."""
    return served.separate(exported.graphs)


def is_whole(exported: Exported) -> bool:
    """Return whether one model runs all graphs."""
    return not own_graphs(exported)


def use_in_words(exported: Exported) -> str:
    """Say what a model does, as "writes captions of images"."""
    if use := use_of(exported):
        return USES[use]
    if classifier_graph(exported) is not None:
        return "classifies images among its own labels"
    if segmenter_graph(exported) is not None:
        return "finds its labels at every pixel of an image"
    return "embeds images and texts" if is_zero_shot(exported) else f"has the task {exported.task}"


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
    if graph is None or graph.agrees != "embeddings" or len(graph.outputs[0].shape) != 1:
        raise ExportError(
            f"{exported.folder}: expected a graph '{side}' that gives embeddings, found a model that {use_in_words(exported)}. "
            "Use the export of a CLIP."
        )
    return graph
