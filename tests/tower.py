"""A CLIP of two matrices in ONNX, small enough to be computed by hand, and pictures for it."""

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


def linear_tower(path, takes, kind, shape, gives, weight):
    """Write an ONNX tower that flattens, multiplies by `weight` and normalises."""
    nodes = [
        helper.make_node("Cast", [takes], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["x"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "weight"], ["y"]),
        helper.make_node("LpNormalization", ["y"], [gives], axis=1, p=2),
    ]
    graph = helper.make_graph(
        nodes,
        "tower",
        [helper.make_tensor_value_info(takes, kind, ["batch", *shape])],
        [helper.make_tensor_value_info(gives, TensorProto.FLOAT, ["batch", DIM])],
        [numpy_helper.from_array(weight, "weight")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)


def write_export(folder: Path) -> Path:
    """Write an export folder of both towers."""
    folder.mkdir(parents=True)
    linear_tower(
        folder / "image.onnx", "pixel_values", TensorProto.FLOAT, [3, SIZE, SIZE], "image_embeds", IMAGE_WEIGHT
    )
    linear_tower(folder / "text.onnx", "input_ids", TensorProto.INT64, [LENGTH], "text_embeds", TEXT_WEIGHT)
    describe(folder)
    return folder


def describe(folder, **changes):
    files = {
        tower: {
            "file": path.name,
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for tower, path in {tower: folder / f"{tower}.onnx" for tower in ("image", "text")}.items()
    }
    described = {
        "schema_version": 1,
        "stage": "int8",
        "precision": "int8",
        "embed_dim": DIM,
        "logit_scale": 3.0,
        "logit_bias": None,
        "preprocess": {"size": SIZE, "mean": MEAN, "std": STD},
        "tokenizer": {"name": "clip-bpe", "context_length": LENGTH, "kwargs": {}},
        "lineage_hash": "0123456789abcdef",
        "files": files,
    }
    (folder / "export.json").write_text(json.dumps(described | changes), encoding="utf-8")


def ids_of(text):
    """A tokenizer that can be followed by hand."""
    return [len(text), ord(text[-1]) % 17, sum(text.encode()) % 23]


def picture(seed):
    """Random pixels, and the same as a PNG file's bytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return pixels, file.getvalue()
