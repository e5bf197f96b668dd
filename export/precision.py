"""Rewrite a float32 ONNX graph in float16 or bfloat16, as TensorRT's strongly typed networks require it.

TensorRT 11 has no precision flags, and 10 deprecates them. torch can export `model.half()`, but not with INT8
quantizers, which give LayerNorm two types. So the exported float32 graph, INT8 or not, is rewritten here. Inputs and
outputs keep their types, and the final normalization stays in float32 as in torch's autocast.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, version_converter

from clipress.errors import ExportError
from clipress.export import onnx_file

# precision: (ONNX type, numpy type, first opset that allows this type for Q/DQ scales, and bf16 for convolutions)
TYPES: dict[str, tuple[int, Any, int]] = {
    "fp16": (TensorProto.FLOAT16, np.float16, 19),
    "bf16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16, 22),
}
# A norm is a sum of squares, and the largest float16 is 65504.
STAYS_FLOAT32 = "ReduceL2"


def is_int8(model: ModelProto) -> bool:
    """Return whether a graph has explicit quantization."""
    return any(node.op_type == "DequantizeLinear" for node in model.graph.node)


def engine_precision(model: ModelProto, precision: str) -> str:
    """Return the precision of an engine of this graph: fp16, bf16 or fp32, or int8-fp16 and the like."""
    return f"int8-{precision}" if is_int8(model) else precision


def lower(model: ModelProto, precision: str) -> ModelProto:
    """Return a copy that computes in `precision` ("fp32", "fp16" or "bf16"), with casts of constants folded.

    Values beyond float16's range are clipped to it; infinities of a mask stay. Raises ExportError for graphs with
    branches.
    """
    lowered = onnx_file.copy_of(model)
    _as_initializers(lowered.graph)
    if precision != "fp32":
        type_, kind, opset = TYPES[precision]
        lowered = at_least(lowered, opset)
        floats = _float_tensors(lowered)
        del lowered.graph.value_info[:]
        _lower(lowered.graph, floats, type_, kind)
    return lowered


def _as_initializers(graph: onnx.GraphProto) -> None:
    """Turn Constant nodes, and casts of constants such as the quantizers' zero points, into initializers."""
    stored, known = {item.name: item for item in graph.initializer}, dict[str, np.ndarray]()
    for node in list(graph.node):
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            raise ExportError(
                f"{graph.name}: node {node.name} has a branch or loop, which cannot be lowered to another precision."
            )
        if node.op_type == "Constant":
            attribute = node.attribute[0]
            value = helper.get_attribute_value(attribute)
            kinds = {"value_float": np.float32, "value_floats": np.float32}
            value = (
                numpy_helper.to_array(value)
                if attribute.name == "value"
                else np.asarray(value, kinds.get(attribute.name, np.int64))
            )
        elif node.op_type == "Cast" and (node.input[0] in known or node.input[0] in stored):
            to = next(a.i for a in node.attribute if a.name == "to")
            name = node.input[0]
            value = (known[name] if name in known else onnx_file.values(stored[name])).astype(
                helper.tensor_dtype_to_np_dtype(to)
            )
        else:
            continue
        known[node.output[0]] = value
        graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
        graph.node.remove(node)


def opset_of(model: ModelProto) -> int:
    """Return the version of ONNX's standard operators that a graph uses."""
    return next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def at_least(model: ModelProto, opset: int) -> ModelProto:
    """Return a model, converted if its opset is older."""
    if opset_of(model) >= opset:
        return model
    stored = {item.name: item for item in model.graph.initializer}
    converted = version_converter.convert_version(model, opset)
    for item in converted.graph.initializer:  # It forgets where weights lie.
        if item.name in stored and onnx_file.is_apart(stored[item.name]):
            item.CopyFrom(stored[item.name])
    return converted


def _lower(graph: onnx.GraphProto, floats: set[str], type_: int, kind: Any) -> None:
    """Make every node compute in `type_`, in place, except the norm and the nodes after it."""
    weights = {item.name: item for item in graph.initializer if item.data_type == TensorProto.FLOAT}
    results = floats & {item.name for item in graph.output}
    float32 = floats & {item.name for item in graph.input}
    behind: set[str] = set()  # The outputs of the norm and of the nodes after it.
    nodes: list[NodeProto] = []
    made: set[str] = set()  # Casts that exist, and the names under which weights are used.

    def cast(name: str, to: int) -> str:
        new = f"{name}_float32" if to == TensorProto.FLOAT else f"{name}_low"
        if new not in made:
            made.add(new)
            nodes.append(helper.make_node("Cast", [name], [new], name=f"{new}_cast", to=to))
        return new

    def as_wanted(name: str, to: int) -> str:
        if name in weights:
            made.add(wanted := f"{name}_float32" if to == TensorProto.FLOAT else name)
            return wanted
        if name not in floats or (name in float32) == (to == TensorProto.FLOAT):
            return name
        return cast(name, to)

    for node in graph.node:
        follows = node.op_type == STAYS_FLOAT32 or not behind.isdisjoint(node.input)
        node.input[:] = [as_wanted(name, TensorProto.FLOAT if follows else type_) for name in node.input]
        nodes.append(node)
        if follows:
            behind |= set(node.output)
            float32 |= floats & behind
            continue
        _retype(node, type_, kind)
        for place, name in enumerate(node.output):
            if name in results:  # Outputs of the graph stay float32.
                node.output[place] = f"{name}_computed"
                nodes.append(
                    helper.make_node("Cast", [node.output[place]], [name], name=f"{name}_cast", to=TensorProto.FLOAT)
                )
                float32.add(name)
    _replace(graph.node, nodes)
    kept = [item for item in graph.initializer if item.name not in weights]
    for name, item in weights.items():
        values = onnx_file.values(item)
        if name in made:
            kept.append(numpy_helper.from_array(_clipped(values, kind), name))
        if f"{name}_float32" in made:
            kept.append(numpy_helper.from_array(values, f"{name}_float32"))
    _replace(graph.initializer, kept)


def _retype(node: NodeProto, type_: int, kind: Any) -> None:
    """Replace the float32 type in a node's attributes."""
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = type_
        elif attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == TensorProto.FLOAT:
            attribute.t.CopyFrom(numpy_helper.from_array(_clipped(numpy_helper.to_array(attribute.t), kind)))


def _clipped(values: np.ndarray, kind: Any) -> np.ndarray:
    top = float(ml_dtypes.finfo(kind).max)
    return np.where(np.isinf(values), values, np.clip(values, -top, top)).astype(kind)


def _float_tensors(model: ModelProto) -> set[str]:
    """Return the names of all float32 tensors, by ONNX's type inference."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    known = {item.name for item in inferred.initializer if item.data_type == TensorProto.FLOAT}
    named = [*inferred.input, *inferred.output, *inferred.value_info]
    return known | {item.name for item in named if item.type.tensor_type.elem_type == TensorProto.FLOAT}


def _replace(field: Any, messages: list[Any]) -> None:
    copies = [
        type(message).FromString(message.SerializeToString()) for message in messages
    ]  # `del` invalidates the originals.
    del field[:]
    field.extend(copies)
