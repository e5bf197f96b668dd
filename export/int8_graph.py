"""Rewrite the INT8 graph that torch exports, in place and exactly, into the form that runtimes execute on integers.

Weights, which torch leaves as float32 behind a QuantizeLinear, are stored as int8; so is the token embedding. A patch
embedding becomes a product, since ONNX Runtime does not run a convolution with float output on integers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from clipress.export.onnx_file import values
from clipress.models.quantizers import PORTABLE


def tidy(model: onnx.ModelProto) -> None:
    """Apply all three rewrites, in place."""
    fold_weight_quantizers(model)
    shrink_embedding(model)
    patches_as_product(model)


def is_portable(model: onnx.ModelProto) -> bool:
    """Return whether no product of a graph's int8 weights can overflow on any CPU: |weight| <= 64. True without INT8.

    The token embedding does not count: it is looked up, never multiplied as integers.
    """
    stored = {item.name: item for item in model.graph.initializer if item.data_type == onnx.TensorProto.INT8}
    weights = [
        values(stored[node.input[0]]).astype(np.int16)  # The magnitude of -128 does not fit int8.
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in stored
    ]
    return all(np.abs(weight).max(initial=0) <= PORTABLE for weight in weights)


def fold_weight_quantizers(model: onnx.ModelProto) -> None:
    """Store weights as int8 instead of float32 behind a QuantizeLinear, in place: exact, and a quarter of the size."""
    graph = model.graph
    constants = {item.name: item for item in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            value = next((a.t for a in node.attribute if a.name == "value"), None)
            if value is not None:
                constants[node.output[0]] = value
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    for node in [n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] in constants]:
        weight, scale = values(constants[node.input[0]]), values(constants[node.input[1]])
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        spread = scale if scale.size == 1 else scale.reshape([-1 if d == axis else 1 for d in range(weight.ndim)])
        rounded = np.clip(np.rint(weight / spread), -128, 127).astype(np.int8)
        name = f"{node.output[0]}_int8"
        graph.initializer.append(numpy_helper.from_array(rounded, name))
        for user in users[node.output[0]]:
            user.input[:] = [name if i == node.output[0] else i for i in user.input]
        graph.node.remove(node)
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    kept = [item for item in graph.initializer if item.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    for node in [n for n in graph.node if n.op_type == "Constant" and n.output[0] not in used]:
        graph.node.remove(node)


def shrink_embedding(model: onnx.ModelProto) -> None:
    """Store a token embedding as int8 with one scale per row, in place: in a small CLIP it is most of the file.

    Rows are scaled after the look-up, so only those of a text's ids become floats.
    """
    graph = model.graph
    tables = {item.name: item for item in graph.initializer if len(item.dims) == 2}
    given = {put.name for put in graph.input}
    for position, node in enumerate(list(graph.node)):
        if node.op_type != "Gather" or node.input[0] not in tables or node.input[1] not in given:
            continue
        table = values(tables[node.input[0]])
        scale = np.maximum(np.abs(table).max(1, keepdims=True), 1e-12).astype(np.float32) / 127
        name, ids, out = node.input[0], node.input[1], node.output[0]
        graph.initializer.remove(tables[name])
        graph.initializer.append(numpy_helper.from_array(np.rint(table / scale).astype(np.int8), f"{name}_int8"))
        graph.initializer.append(numpy_helper.from_array(scale, f"{name}_scale"))
        parts = [
            helper.make_node("Gather", [f"{name}_int8", ids], [f"{out}_int8"], axis=0),
            helper.make_node("Gather", [f"{name}_scale", ids], [f"{out}_scale"], axis=0),
            helper.make_node("Cast", [f"{out}_int8"], [f"{out}_whole"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", [f"{out}_whole", f"{out}_scale"], [out]),
        ]
        graph.node.remove(node)
        for offset, part in enumerate(parts):
            graph.node.insert(position + offset, part)
        return


def patches_as_product(model: onnx.ModelProto) -> None:
    """Turn the convolution of a patch embedding into a product, in place: patches [B, P, C k k] times [C k k, O].

    This applies to INT8 whose patches tile the image. The output keeps the convolution's shape, [B, O, rows, columns].
    """
    graph = model.graph
    made = {name: node for node in graph.node for name in node.output}
    weights = {item.name: item for item in graph.initializer}
    images = {put.name: [d.dim_value for d in put.type.tensor_type.shape.dim] for put in graph.input}
    for conv in graph.node:
        sides = [made.get(name) for name in conv.input[:2]]
        if conv.op_type != "Conv" or any(side is None or side.op_type != "DequantizeLinear" for side in sides):
            continue
        rounded = made.get(sides[0].input[0])
        if rounded is None or rounded.input[0] not in images or sides[1].input[0] not in weights:
            continue
        weight, image = weights[sides[1].input[0]], images[rounded.input[0]]  # [O, C, k, k] and [batch, C, S, S]
        if _tiles(conv, weight.dims[2:], image[2:]):
            _replace(graph, conv, rounded, sides, weight, image[2:])
            return


def _tiles(conv: onnx.NodeProto, kernel: Sequence[int], image: Sequence[int]) -> bool:
    """Return whether a convolution's windows cover the whole image without overlap."""
    given = {a.name: helper.get_attribute_value(a) for a in conv.attribute}
    return (
        given.get("strides") == list(kernel)
        and not any(given.get("pads", []))
        and set(given.get("dilations", [1])) == {1}
        and given.get("group", 1) == 1
        and given.get("auto_pad", b"NOTSET") == b"NOTSET"
        and all(side > 0 and side % k == 0 for side, k in zip(image, kernel, strict=True))
    )


def _replace(
    graph: onnx.GraphProto,
    conv: onnx.NodeProto,
    rounded: onnx.NodeProto,
    sides: list[onnx.NodeProto],
    weight: onnx.TensorProto,
    image: Sequence[int],
) -> None:
    outs, channels, height, width = weight.dims
    rows, columns = image[0] // height, image[1] // width
    turned = np.ascontiguousarray(values(weight).reshape(outs, -1).T)  # [C k k, O]
    weight.CopyFrom(numpy_helper.from_array(turned, weight.name))
    for attribute in sides[1].attribute:
        if attribute.name == "axis":  # The scales belong to the output channels.
            attribute.i = 1

    def shape(label: str, dims: list[int]) -> str:
        graph.initializer.append(numpy_helper.from_array(np.asarray(dims, np.int64), f"patches_{label}"))
        return f"patches_{label}"

    cut = [  # A 0 copies the batch.
        helper.make_node(
            "Reshape", [rounded.input[0], shape("grid", [0, channels, rows, height, columns, width])], ["patches_cut"]
        ),
        helper.make_node("Transpose", ["patches_cut"], ["patches_sorted"], perm=[0, 2, 4, 1, 3, 5]),
        helper.make_node(
            "Reshape", ["patches_sorted", shape("rows", [0, rows * columns, channels * height * width])], ["patches"]
        ),
    ]
    product = [helper.make_node("MatMul", [sides[0].output[0], sides[1].output[0]], ["patches_product"])]
    if len(conv.input) > 2:
        product.append(helper.make_node("Add", ["patches_product", conv.input[2]], ["patches_shifted"]))
    product += [
        helper.make_node("Transpose", [product[-1].output[0]], ["patches_turned"], perm=[0, 2, 1]),
        helper.make_node("Reshape", ["patches_turned", shape("image", [0, outs, rows, columns])], [conv.output[0]]),
    ]
    rounded.input[0] = "patches"
    nodes = []
    for node in graph.node:
        nodes += [*cut, node] if node is rounded else product if node is conv else [node]
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
