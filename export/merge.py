"""Merge the ONNX models of a CLIP's graphs into one: a classifier of fixed labels, or both graphs with their logits."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import ModelProto, TensorProto, compose, helper, numpy_helper

from clipress.export import onnx_file
from clipress.export.precision import at_least, opset_of

PROBABILITIES, LOGITS = "probabilities", "logits_per_image"  # Outputs.


def classifier(
    image: ModelProto, classes: np.ndarray, logit_scale: float, logit_bias: float | None = None
) -> ModelProto:
    """Return images -> probabilities f32 [batch, C] of labels whose unit embeddings [C, D] become a constant.

    With a bias, every label has its own (metrics.zeroshot.label_probabilities); without one they are a softmax.
    """
    model = _copy(image)
    graph, embeds = model.graph, image.graph.output[0].name
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    graph.initializer.append(numpy_helper.from_array(classes.astype(np.float32), "label_embeds"))
    takes, (kind, how) = [embeds, "label_embeds"], ("Softmax", {"axis": 1})
    if logit_bias is not None:
        graph.initializer.append(numpy_helper.from_array(np.float32(logit_bias), "logit_bias"))
        takes, (kind, how) = [*takes, "logit_bias"], ("Sigmoid", {})
    graph.node.append(helper.make_node("Gemm", takes, ["logits"], name="label_logits", alpha=logit_scale, transB=1))
    graph.node.append(helper.make_node(kind, ["logits"], [PROBABILITIES], name="label_probabilities", **how))
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(PROBABILITIES, TensorProto.FLOAT, [batch, len(classes)]))
    return model


def joint(models: Mapping[str, ModelProto], logit_scale: float, logit_bias: float | None) -> ModelProto:
    """Return images and texts -> both embeddings and logits_per_image f32 [image_batch, text_batch].

    `models` are the image model and the text model, by graph. The two batches are independent.
    """
    opset, ir = max(map(opset_of, models.values())), max(model.ir_version for model in models.values())
    parts, batches = [], [f"{side}_batch" for side in models]
    for (side, model), batch in zip(models.items(), batches, strict=True):
        part = at_least(_copy(model), opset)
        part.ir_version = ir
        for value in (*part.graph.input, *part.graph.output):
            value.type.tensor_type.shape.dim[0].dim_param = batch
        parts.append(compose.add_prefix(part, f"{side}/", rename_inputs=False, rename_outputs=False, inplace=True))
    domains = {entry.domain: entry.version for part in parts for entry in part.opset_import}
    opsets = [helper.make_opsetid(*entry) for entry in domains.items()]
    model = helper.make_model(helper.make_graph([], "joint", [], []), opset_imports=opsets, ir_version=ir)
    graph = model.graph
    for part in parts:  # compose.merge_models checks the whole, and does not know where weights lie
        for kind in ("node", "input", "output", "initializer"):
            getattr(graph, kind).extend(getattr(part.graph, kind))
    takes = [value.name for value in graph.output]
    if logit_bias is not None:
        graph.initializer.append(numpy_helper.from_array(np.float32(logit_bias), "logit_bias"))
        takes.append("logit_bias")
    graph.node.append(helper.make_node("Gemm", takes, [LOGITS], name=LOGITS, alpha=logit_scale, transB=1))
    graph.output.append(helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, batches))
    return model


def _copy(model: ModelProto) -> ModelProto:
    """Return a copy without metadata and inner shapes, which ONNX can infer again."""
    copy = onnx_file.copy_of(model)
    del copy.graph.value_info[:]
    del copy.metadata_props[:]
    return copy
