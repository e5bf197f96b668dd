"""Export folders of a few matrices in ONNX, small enough to be computed by hand, and images for them."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

SIZE, LENGTH, DIM = 2, 3, 4
MEAN, STD = (0.5, 0.25, 0.75), (0.5, 0.25, 1.0)
RNG = np.random.default_rng(0)
IMAGE_WEIGHT = RNG.standard_normal((3 * SIZE * SIZE, DIM)).astype(np.float32)
TEXT_WEIGHT = RNG.standard_normal((LENGTH, DIM)).astype(np.float32)
PIXEL_WEIGHT = RNG.standard_normal((4, 3)).astype(np.float32)  # of the Segmenter: scores of a pixel's labels
LABELS = ("cat", "dog", "red fox", "Käfer")  # Labels of the classifier, which has the image encoder's weights.
TOKENIZER = {"name": "clip-bpe", "context_length": LENGTH, "kwargs": {}}
PIXELS = {"name": "pixel_values", "dtype": "float32", "shape": [3, SIZE, SIZE]}
IDS = {"name": "input_ids", "dtype": "int64", "shape": [LENGTH], "largest": 99}


def save(path, nodes, takes, gives, **weights):
    """Write an ONNX file; `takes` and `gives` are {name: (type, shape)}."""
    values = [
        [helper.make_tensor_value_info(name, kind, ["batch", *shape]) for name, (kind, shape) in tensors.items()]
        for tensors in (takes, gives)
    ]
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "graph", *values, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)


def flattened(name, weight):
    """Return nodes that flatten an input and multiply it by a weight, into `<name>_y`."""
    return [
        helper.make_node("Cast", [name], [f"{name}_x"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", [f"{name}_x"], [f"{name}_flat"], axis=1),
        helper.make_node("MatMul", [f"{name}_flat", weight], [f"{name}_y"]),
    ]


def linear_encoder(path, takes, kind, shape, gives, weight):
    """Write an ONNX encoder that flattens, multiplies by `weight` and normalises."""
    nodes = flattened(takes, "weight")
    nodes.append(helper.make_node("LpNormalization", [f"{takes}_y"], [gives], axis=1, p=2))
    save(path, nodes, {takes: (kind, shape)}, {gives: (TensorProto.FLOAT, [DIM])}, weight=weight)


def write_export(folder: Path) -> Path:
    """Write the export folder of a CLIP."""
    folder.mkdir(parents=True)
    linear_encoder(
        folder / "image.onnx", "pixel_values", TensorProto.FLOAT, [3, SIZE, SIZE], "image_embeds", IMAGE_WEIGHT
    )
    linear_encoder(folder / "text.onnx", "input_ids", TensorProto.INT64, [LENGTH], "text_embeds", TEXT_WEIGHT)
    describe(folder)
    return folder


def describe(folder, **changes):
    """Write the export.json of a CLIP."""
    clip = {"embed_dim": DIM, "logit_scale": 3.0, "logit_bias": None, "tokenizer": TOKENIZER}
    describe_graphs(folder, ("image", "text"), **clip | changes)


def describe_graphs(folder, names, **described):
    """Write an export.json: the keys common to all tasks, and `more`."""
    paths = {name: folder / f"{name}.onnx" for name in names}
    files = {
        graph: {
            "file": path.name,
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for graph, path in paths.items()
    }
    every = {
        "schema_version": 1,
        "stage": "int8",
        "precision": "int8",
        "preprocess": {"size": SIZE, "mean": MEAN, "std": STD},
        "lineage_hash": "0123456789abcdef",
        "files": files,
    }
    (folder / "export.json").write_text(json.dumps(every | described), encoding="utf-8")


def write_classifier(folder: Path, labels=LABELS) -> Path:
    """Write the export folder of a classifier: one graph, logits, no texts."""
    folder.mkdir(parents=True)
    nodes = [*flattened("pixel_values", "weight"), helper.make_node("Identity", ["pixel_values_y"], ["logits"])]
    takes, gives = {"pixel_values": (TensorProto.FLOAT, PIXELS["shape"])}, {"logits": (TensorProto.FLOAT, [DIM])}
    save(folder / "image.onnx", nodes, takes, gives, weight=IMAGE_WEIGHT)
    outputs = [{"name": "logits", "shape": [DIM]}]
    graph = {"name": "image", "inputs": [PIXELS], "outputs": outputs, "agrees": "logits"}
    describe_graphs(folder, ["image"], task="classification", graphs={"image": graph}, labels=labels)
    return folder


def write_segmenter(folder: Path, labels=LABELS) -> Path:
    """Write the export folder of a Segmenter whose patches are pixels: their scores are products with PIXEL_WEIGHT."""
    folder.mkdir(parents=True)
    nodes = [helper.make_node("Conv", ["pixel_values", "weight"], ["scores"])]
    shape = [len(labels), SIZE, SIZE]
    takes, gives = {"pixel_values": (TensorProto.FLOAT, PIXELS["shape"])}, {"scores": (TensorProto.FLOAT, shape)}
    save(folder / "image.onnx", nodes, takes, gives, weight=PIXEL_WEIGHT[:, :, None, None])
    outputs = [{"name": "scores", "shape": shape}]
    graph = {"name": "image", "inputs": [PIXELS], "outputs": outputs, "agrees": "masks"}
    describe_graphs(folder, ["image"], task="segmentation", graphs={"image": graph}, labels=labels)
    return folder


def write_questions(folder: Path) -> Path:
    """Write the export folder of a model that embeds questions about images, weighted: one graph of three inputs."""
    folder.mkdir(parents=True)
    nodes = [
        *flattened("pixel_values", "image_weight"),
        *flattened("input_ids", "text_weight"),
        helper.make_node("Mul", ["input_ids_y", "weight"], ["weighted"]),
        helper.make_node("Add", ["pixel_values_y", "weighted"], ["question_embeds"]),
        helper.make_node("Sub", ["pixel_values_y", "weighted"], ["difference"]),
    ]
    takes = {
        "pixel_values": (TensorProto.FLOAT, PIXELS["shape"]),
        "input_ids": (TensorProto.INT64, IDS["shape"]),
        "weight": (TensorProto.FLOAT, [1]),
    }
    gives = {"question_embeds": (TensorProto.FLOAT, [DIM]), "difference": (TensorProto.FLOAT, [DIM])}
    save(folder / "question.onnx", nodes, takes, gives, image_weight=IMAGE_WEIGHT, text_weight=TEXT_WEIGHT)
    graph = {
        "name": "question",
        "inputs": [PIXELS, IDS, {"name": "weight", "dtype": "float32", "shape": [1]}],
        "outputs": [{"name": name, "shape": [DIM]} for name in gives],
    }
    described = {"task": "questions", "graphs": {"question": graph}, "tokenizer": TOKENIZER}
    describe_graphs(folder, ["question"], **described)
    return folder


def ids_of(text):
    """A tokenizer that is simple enough to compute by hand."""
    return [len(text), ord(text[-1]) % 17, sum(text.encode()) % 23]


def small_image(seed):
    """Return random pixels, and the same as a PNG file's bytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return pixels, file.getvalue()


def normalised_by_hand(pixels):
    """Return the flat pixel values of an image of the right size."""
    return np.concatenate([((pixels[:, :, c] / 255.0 - MEAN[c]) / STD[c]).ravel() for c in range(3)])
