"""What is sent to a server under load: test images in turns, and texts that no request had before."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

from clipress.bench.server.protocols import RequestTemplate
from clipress.data.eval_sets import EvalSet
from clipress.data.transforms import fitted, normalised
from clipress.runtime.export_folder import Exported
from clipress.runtime.graph import Graph

MODELS = ("embed_image", "image_encoder", "embed_text")
"""Of a CLIP's repository, those that load is put on."""
IMAGES = 64  # that requests take turns with; the server caches no images
PIXELS, IDS = "pixel_values", "input_ids"  # inputs of graphs that a server embeds images and texts with


def request_templates(exported: Exported, sets: Sequence[EvalSet]) -> dict[str, RequestTemplate]:
    """Return the requests to each model of an export's repository, by the model's name.

    A graph of images has two models, one that takes files and one that takes pixels; a graph of texts has one.
    """
    images = [image for one in sets for image in _images(one)][:IMAGES]
    found: list[RequestTemplate] = []
    for graph in exported.graphs.values():
        takes = [put.name for put in graph.inputs]
        if takes == [PIXELS]:
            pixels = normalised(np.stack([fitted(image, exported.preprocess) for image in images]), exported.preprocess)
            found += [_file_template(graph, images), _pixel_template(graph, pixels)]
        elif takes == [IDS]:
            found.append(_text_template(graph))
    return {one.model: one for one in found}


def _file_template(graph: Graph, images: Sequence[np.ndarray]) -> RequestTemplate:
    files = [_bytes_tensor(_jpeg(pixels)) for pixels in images]
    return _embed_template(graph, lambda number: files[number % len(files)])


def _text_template(graph: Graph) -> RequestTemplate:
    return _embed_template(graph, lambda number: _bytes_tensor(b"a photo of number %d" % number))


def _embed_template(graph: Graph, content: Callable[[int], bytes]) -> RequestTemplate:
    return RequestTemplate(f"embed_{graph.name}", graph.name, graph.outputs[0].name, "BYTES", (1, 1), content)


def _pixel_template(graph: Graph, pixels: np.ndarray) -> RequestTemplate:
    rows = [row.tobytes() for row in pixels]
    return RequestTemplate(
        f"{graph.name}_encoder",
        PIXELS,
        graph.outputs[0].name,
        "FP32",
        (1, *pixels.shape[1:]),
        lambda number: rows[number % len(rows)],
    )


def _images(source: EvalSet) -> Iterator[np.ndarray]:
    for index in range(min(IMAGES, len(source.source))):
        yield np.asarray(source.source.image(index))


def _jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def _bytes_tensor(content: bytes) -> bytes:
    return struct.pack("<I", len(content)) + content
