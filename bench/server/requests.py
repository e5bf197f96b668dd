"""Requests for a server under load: test images in turns, and texts that never repeat."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from PIL import Image

from clipress.bench.server.protocols import RequestTemplate
from clipress.data.eval_sets import EvalSet
from clipress.data.transforms import Preprocess, fitted, normalised
from clipress.runtime.export_folder import Exported
from clipress.runtime.graph import Graph
from clipress.runtime.served import IMAGE, SENT, TEXT, chain_name, model_of, separate

IMAGES = 64  # that requests take turns with; the server caches no images


def model_names(graphs: Iterable[Graph]) -> list[str]:
    """Return the models of a repository that load is put on.

    A graph of images has two, one that takes files and one that takes pixels; a graph of texts has one. Graphs with other
    inputs have none.
    """
    found = []
    for graph in graphs:
        sent = _sent(graph)
        found += [chain_name(graph)] if sent else []
        found += [model_of(graph)] if sent == IMAGE else []
    return found


def request_templates(exported: Exported, sets: Sequence[EvalSet]) -> dict[str, RequestTemplate]:
    """Return the requests to each model of an export's repository, by the model's name; see `model_names`."""
    images = [image for one in sets for image in _images(one)][:IMAGES]
    found: list[RequestTemplate] = []
    for graph in separate(exported.graphs).values():
        sent = _sent(graph)
        if sent == IMAGE:
            found += [_file_template(graph, images), _pixel_template(graph, _pixels(images, exported.preprocess))]
        elif sent == TEXT:
            found.append(_text_template(graph))
    return {one.model: one for one in found}


def _sent(graph: Graph) -> str | None:
    """Return what clients send for a graph with one input, images or texts; None for any other graph."""
    return SENT.get(graph.inputs[0].name) if len(graph.inputs) == 1 else None


def _file_template(graph: Graph, images: Sequence[np.ndarray]) -> RequestTemplate:
    files = [_bytes_tensor(_jpeg(pixels)) for pixels in images]
    return RequestTemplate(
        chain_name(graph), IMAGE, graph.outputs[0].name, "BYTES", (1, 1), lambda number: files[number % len(files)]
    )


def _text_template(graph: Graph) -> RequestTemplate:
    return RequestTemplate(
        chain_name(graph),
        TEXT,
        graph.outputs[0].name,
        "BYTES",
        (1, 1),
        lambda number: _bytes_tensor(b"a photo of number %d" % number),
    )


def _pixel_template(graph: Graph, pixels: np.ndarray) -> RequestTemplate:
    rows = [row.tobytes() for row in pixels]
    return RequestTemplate(
        model_of(graph),
        graph.inputs[0].name,
        graph.outputs[0].name,
        "FP32",
        (1, *pixels.shape[1:]),
        lambda number: rows[number % len(rows)],
    )


def _pixels(images: Sequence[np.ndarray], preprocess: Preprocess) -> np.ndarray:
    return normalised(np.stack([fitted(image, preprocess) for image in images]), preprocess)


def _images(source: EvalSet) -> Iterator[np.ndarray]:
    for index in range(min(IMAGES, len(source.source))):
        yield np.asarray(source.source.image(index))


def _jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def _bytes_tensor(content: bytes) -> bytes:
    return struct.pack("<I", len(content)) + content
