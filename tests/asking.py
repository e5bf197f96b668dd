"""How tests ask a real Triton, what they send, and what must come back: local inference on the same files."""

from __future__ import annotations

import io
import json
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
STAGES = ("recovered", "int8")  # of the tiny run, in order of versions
MODELS = {"image_encoder", "text_encoder", "preprocess", "tokenize", "embed_image", "embed_text", "classify"}


def tensor(library, name, array, kind="BYTES"):
    made = library.InferInput(name, list(array.shape), kind)
    made.set_data_from_numpy(array)
    return made


def column(values):
    return np.asarray([[value] for value in values], object)


def asked(client, model, name, values, gives, library=triton_grpc):
    return client.infer(model, [tensor(library, name, column(values))]).as_numpy(gives)


def embedded_or_error(client, file):
    """Ask for the embedding of one picture; return it, or what the server says instead."""
    try:
        return asked(client, "embed_image", "image", [file], "image_embeds")[0]
    except InferenceServerException as error:
        return error


def classified(client, images, labels, templates=None):
    given = {"image": images, "labels": [label.encode() for label in labels]}
    given |= {} if templates is None else {"templates": [template.encode() for template in templates]}
    inputs = [tensor(triton_grpc, name, np.asarray(values, object)) for name, values in given.items()]
    return client.infer("classify", inputs).as_numpy("probabilities")


def picture(seed, kind="PNG", size=(50, 37)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


PICTURES = [picture(seed, kind) for seed, kind in enumerate(("PNG", "JPEG", "WEBP", "JPEG", "PNG"))]


def pixels_of(exported, pictures):
    return normalised(
        np.stack([fitted(open_image(file), exported.preprocess) for file in pictures]), exported.preprocess
    )


def embeds_of(exported, tower, rows):
    return open_session(exported.onnx(tower), 1).run(None, {NAMES[tower]: rows})[0]


NAMES = {"image": "pixel_values", "text": "input_ids"}


def executions(client, model):
    (told,) = client.get_inference_statistics(model, as_json=True)["model_stats"]
    return int(told["execution_count"]), int(told["inference_count"])


def measured(path, lineage_hash="0123456789abcdef", **item_ms):
    """Write a results.json that says what one item takes each tower of the stage int8."""
    latency = [
        {"tower": tower, "batch": 1, "threads": 1, "median_ms": ms, "items_per_s": 1000 / ms}
        for tower, ms in item_ms.items()
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
            if int(fields.split()[3]) == server._process.pid and fields[0] != "Z":
                words = (stat.parent / "cmdline").read_text().split("\0")
                found[int(stat.parent.name)] = words[-3] if name.startswith("triton_python") else name
    return found
