"""Requests to a real Triton, and the expected answers: local inference with the same files."""

from __future__ import annotations

import io
import json
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton_grpc
from PIL import Image
from tritonclient.utils import InferenceServerException

from clipress.data.transforms import fitted, normalised, open_image
from clipress.runtime.onnx_session import open_session
from clipress.serve.settings import ServeSettings

SETTINGS = ServeSettings(backend="python", max_batch=8, instances=1, threads=1, queue_delay_us=20_000)
STAGES = ("recovered", "int8")  # Stages of the tiny run, in order of versions.
MODELS = {"image_encoder", "text_encoder", "preprocess", "tokenize", "embed_image", "embed_text", "classify"}


def tensor(library, name, array, kind="BYTES"):
    made = library.InferInput(name, list(array.shape), kind)
    made.set_data_from_numpy(array)
    return made


def column(values):
    return np.asarray([[value] for value in values], object)


def infer(client, model, name, values, gives, library=triton_grpc):
    """Send one column of strings and return one output."""
    return client.infer(model, [tensor(library, name, column(values))]).as_numpy(gives)


def embed_or_error(client, file):
    """Return the embedding of one image, or the server's error."""
    try:
        return infer(client, "embed_image", "image", [file], "image_embeds")[0]
    except InferenceServerException as error:
        return error


def classify(client, images, labels, templates=None):
    given = {"image": images, "labels": [label.encode() for label in labels]}
    given |= {} if templates is None else {"templates": [template.encode() for template in templates]}
    inputs = [tensor(triton_grpc, name, np.asarray(values, object)) for name, values in given.items()]
    return client.infer("classify", inputs).as_numpy("probabilities")


def random_image(seed, kind="PNG", size=(50, 37)):
    """Return the bytes of an image file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


IMAGES = [random_image(seed, kind) for seed, kind in enumerate(("PNG", "JPEG", "WEBP", "JPEG", "PNG"))]


def pixels_of(exported, images):
    return normalised(np.stack([fitted(open_image(file), exported.preprocess) for file in images]), exported.preprocess)


def embeds_of(exported, graph, rows):
    """Return a graph's first output for rows of its only input, by ONNX Runtime."""
    (takes,) = exported.graphs[graph].inputs
    return open_session(exported.onnx(graph), 1).run(None, {takes.name: rows})[0]


def executions(client, model, rows=0):
    """Return how often a model ran, and for how many rows; wait until `rows` are counted, which is after they are answered."""
    deadline = time.monotonic() + 60
    while True:
        (counted,) = client.get_inference_statistics(model, as_json=True)["model_stats"]
        found = int(counted.get("inference_count", 0))
        if found >= rows or time.monotonic() > deadline:
            return int(counted.get("execution_count", 0)), found


def write_latencies(path, lineage_hash="0123456789abcdef", **item_ms):
    """Write a results.json with the time one item takes each graph of the stage int8."""
    latency = [
        {"tower": graph, "batch": 1, "threads": 1, "median_ms": ms, "items_per_s": 1000 / ms}
        for graph, ms in item_ms.items()
    ]
    row = {"stage": "int8", "backend": "onnxruntime", "lineage": [{"hash": lineage_hash}], "latency": latency}
    path.write_text(json.dumps({"rows": [row]}), encoding="utf-8")
    return path


def processes(server):
    """Return {pid: name} of a server and its models' processes."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            name, fields = stat.read_text().split("(", 1)[1].rsplit(") ", 1)
            if int(fields.split()[3]) == server.pid and fields[0] != "Z":
                words = (stat.parent / "cmdline").read_text().split("\0")
                found[int(stat.parent.name)] = words[-3] if name.startswith("triton_python") else name
    return found
