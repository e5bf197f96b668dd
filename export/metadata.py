"""Metadata in every ONNX file, so that it can be used without its export folder.

They are JSON in `metadata_props`, under the key `clipress`; in ONNX Runtime:

    json.loads(session.get_modelmeta().custom_metadata_map["clipress"])

    task                             clip, classification, ...
    tower                            the graph's name, such as image or text; classifier or joint
    agrees                           how the graph is compared with another implementation: embeddings, logits or masks
    precision                        fp32 or int8; in a lowered file fp16, bf16, int8-fp16 or the like
    preprocess                       size, mean, std and the rest of what turns an image into pixel_values
    tokenizer                        name, context_length and kwargs: what turns a text into input_ids; kept, the
                                     tokens of a reduced vocabulary (data/vocabulary.py), only where there is one;
                                     file and pad, a packed tokenizer.json (data/packed_tokenizer.py), likewise
    ends                             of a text input, where its texts end: eos, that id, or null for the largest one; or pad,
                                     the id of the padding behind them. They may be given without what comes after. Absent: the input
                                     has one length, since the text tower reads the padding too
    embed_dim, logit_scale, logit_bias   the scale is exponentiated; the bias is null for a CLIP without one
    labels, templates                of a classifier: the names of its columns, and the prompts of a zero-shot one
    probabilities                    of a zero-shot classifier: `sigmoid` of every label, or `softmax` over all
    stage, lineage_hash              the artifact it was exported from
    made_of                          of a file made from others: their sha256, by graph
    parity                           the comparison with the model or the files it was made from
    opset, settings, exporter        how the graphs were exported
    int8                             of a convolutional INT8 graph: its form, and milliseconds per image of both forms
    data_sha256                      of a large graph: the hash of the file beside it that has its weights
    portable                         whether INT8 products overflow on no CPU; if false, ONNX Runtime needs its exact
                                     mode (session.x64quantprecision) on x86 without VNNI instructions
    self_test                        seeded inputs and the outputs of exact arithmetic, see runtime/self_test.py
    versions                         of clipress, torch, onnx and onnxruntime at export
    schema_version                   1
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx

from clipress.data.padding import TextEnd
from clipress.export import onnx_file
from clipress.export.int8_graph import is_portable
from clipress.runtime.export_folder import Exported, data_path
from clipress.runtime.graph import Graph
from clipress.runtime.onnx_session import METADATA
from clipress.storage import sha256

OF_FOLDER = {"graphs", "files", "explicit", "self_test", "portable"}
"""Fields of export.json that speak of the folder, or differ by file."""


def of_graph(exported: Exported, graph: str) -> dict[str, Any]:
    """Return the metadata of one graph's file, without what only the finished file can tell."""
    about = exported.model_dump(mode="json", exclude=OF_FOLDER)
    has_logits = exported.logit_scale is not None
    kept = {key: value for key, value in about.items() if value is not None or (key == "logit_bias" and has_logits)}
    return {**kept, **ends_of(exported.graphs[graph]), "tower": graph, "agrees": exported.graphs[graph].agrees}


def _described(end: TextEnd) -> dict[str, Any]:
    return {name: token for name, token in asdict(end).items() if name == "eos" or token is not None}


def ends_of(*graphs: Graph) -> dict[str, Any]:
    """Return the metadata of a file made of these graphs that say where its texts end; empty where they have one length."""
    ends = {put.name: _described(put.end) for graph in graphs for put in graph.inputs if put.end is not None}
    return {"ends": ends} if ends else {}


def stamp(model: onnx.ModelProto, about: Mapping[str, Any]) -> None:
    """Replace a file's metadata."""
    onnx.helper.set_model_props(model, {METADATA: json.dumps(about)})
    model.producer_name = "clipress"


def stamp_file(path: Path, about: Mapping[str, Any]) -> None:
    """Replace the metadata of a file, whose weights stay as they are; the hash of those beside it is added."""
    model, data = onnx_file.read(path), data_path(path)
    stamp(model, {**about, **({"data_sha256": sha256(data)} if data.is_file() else {})})
    onnx_file.write_again(model, path)


def stamp_portable(model: onnx.ModelProto) -> None:
    """Record only whether a graph is portable: this decides how it is opened until its full metadata are known."""
    stamp(model, {"portable": is_portable(model)})


def read_metadata(model: onnx.ModelProto) -> dict[str, Any] | None:
    """Return a file's metadata; None for a file that clipress did not make. Raises ValueError for damaged ones."""
    kept = {item.key: item.value for item in model.metadata_props}.get(METADATA)
    about = None if kept is None else json.loads(kept)
    if not isinstance(about, dict | None):
        raise ValueError(f"expected a mapping, found {about!r}")
    return about
