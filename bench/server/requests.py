"""Requests for a server under load: test images in turns, a BLIP's with the texts of their records, and texts that never repeat."""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from clipress.bench.server.protocols import InputTemplate, RequestTemplate
from clipress.data.eval_sets import EvalSet, on_readable
from clipress.data.transforms import Preprocess, fitted, normalised
from clipress.runtime.export_folder import Exported
from clipress.runtime.graph import Graph
from clipress.runtime.served import (
    ANSWERS,
    IMAGE,
    OTHER_IMAGE,
    SENT,
    TEXT,
    USES,
    chain_name,
    model_of,
    separate,
    use_of,
)

RECORDS = 64  # that requests take turns with; the server caches nothing that depends on an image
Record = tuple[EvalSet, int]
"""A set, and a place in it."""


def model_names(graphs: Mapping[str, Graph]) -> list[str]:
    """Return the models of a repository that load is put on.

    A graph of images has two, one that takes files and one that takes pixels; a graph of texts has one. Graphs with other
    inputs have none. A BLIP has the model that does what it is for.
    """
    found = []
    for graph in separate(graphs).values():
        sent = _sent(graph)
        found += [chain_name(graph)] if sent else []
        found += [model_of(graph)] if sent == IMAGE else []
    use = use_of(graphs)
    return [*found, use] if use else found


def request_templates(exported: Exported, sets: Sequence[EvalSet]) -> dict[str, RequestTemplate]:
    """Return the requests to each model of an export's repository, by the model's name; see `model_names`.

    Records that cannot be read are left out. Raises RecipeError for sets without the texts or pairs that a model takes.
    """
    return on_readable(lambda readable: _templates(exported, readable), sets)


def _templates(exported: Exported, sets: Sequence[EvalSet]) -> dict[str, RequestTemplate]:
    records = [(one, index) for one in sets for index in range(min(RECORDS, len(one.source)))][:RECORDS]
    images = [_image(IMAGE, record) for record in records]
    found: list[RequestTemplate] = []
    for graph in separate(exported.graphs).values():
        sent = _sent(graph)
        if sent == IMAGE:
            found += [_file_template(graph, images), _pixel_template(graph, _pixels(images, exported.preprocess))]
        elif sent == TEXT:
            found.append(_text_template(graph))
    if use := use_of(exported.graphs):
        found.append(_blip_template(use, records))
    return {one.model: one for one in found}


def _sent(graph: Graph) -> str | None:
    """Return what clients send for a graph with one input, images or texts; None for any other graph."""
    return SENT.get(graph.inputs[0].name) if len(graph.inputs) == 1 else None


def _file_template(graph: Graph, images: Sequence[np.ndarray]) -> RequestTemplate:
    files = _in_turns("BYTES", (1, 1), [_bytes_tensor(_jpeg(pixels)) for pixels in images])
    return RequestTemplate(chain_name(graph), {IMAGE: files}, graph.outputs[0].name)


def _text_template(graph: Graph) -> RequestTemplate:
    texts = InputTemplate("BYTES", (1, 1), lambda number: _bytes_tensor(b"a photo of number %d" % number))
    return RequestTemplate(chain_name(graph), {TEXT: texts}, graph.outputs[0].name)


def _pixel_template(graph: Graph, pixels: np.ndarray) -> RequestTemplate:
    rows = _in_turns("FP32", (1, *pixels.shape[1:]), [row.tobytes() for row in pixels])
    return RequestTemplate(model_of(graph), {graph.inputs[0].name: rows}, graph.outputs[0].name)


def _blip_template(use: str, records: Sequence[Record]) -> RequestTemplate:
    """Return requests that hold a record's images and text; answers are written, not chosen from a list."""
    inputs = {
        name: _in_turns("BYTES", (1,), [_bytes_tensor(_part(name, record)) for record in records])
        for name in USES[use].takes
        if name != ANSWERS
    }
    return RequestTemplate(use, inputs, USES[use].gives)


def _in_turns(datatype: str, shape: tuple[int, ...], rows: Sequence[bytes]) -> InputTemplate:
    return InputTemplate(datatype, shape, lambda number: rows[number % len(rows)])


def _part(name: str, record: Record) -> bytes:
    """Return what a client sends of a record: one of its images as a file, or its first text."""
    if name in (IMAGE, OTHER_IMAGE):
        return _jpeg(_image(name, record))
    one, index = record
    one.require_texts()
    return one.read("captions", index)[0].encode()


def _image(name: str, record: Record) -> np.ndarray:
    one, index = record
    if name == OTHER_IMAGE:
        one.require_pairs()
    return np.asarray(one.read(name, index))


def _pixels(images: Sequence[np.ndarray], preprocess: Preprocess) -> np.ndarray:
    return normalised(np.stack([fitted(image, preprocess) for image in images]), preprocess)


def _jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def _bytes_tensor(content: bytes) -> bytes:
    return struct.pack("<I", len(content)) + content
