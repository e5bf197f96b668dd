"""Graphs put together from the towers' graphs, nothing exported anew: what a tower computed, it still computes."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, compose, helper, numpy_helper

from clipress.export.precision import at_least, opset_of


def classifier(image: ModelProto, classes: np.ndarray, logit_scale: float) -> ModelProto:
    """Return pictures -> probabilities f32 [batch, C] of labels whose unit embeddings [C, D] become a constant.

    A logit bias would shift all labels alike, and softmax does not see that.
    """
    model = _copy(image)
    graph, embeds = model.graph, image.graph.output[0].name
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    graph.initializer.append(numpy_helper.from_array(classes.astype(np.float32), "label_embeds"))
    graph.node.extend(
        [
            helper.make_node(
                "Gemm", [embeds, "label_embeds"], ["logits"], name="label_logits", alpha=logit_scale, transB=1
            ),
            helper.make_node("Softmax", ["logits"], ["probabilities"], name="label_probabilities", axis=1),
        ]
    )
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [batch, len(classes)]))
    onnx.checker.check_model(model, full_check=True)
    return model


def joint(image: ModelProto, text: ModelProto, logit_scale: float, logit_bias: float | None) -> ModelProto:
    """Return pictures and texts -> image_embeds, text_embeds and logits_per_image f32 [image_batch, text_batch].

    The two batches are independent.
    """
    towers = [_copy(image), _copy(text)]
    opset, ir = max(map(opset_of, towers)), max(model.ir_version for model in towers)
    for place, side in enumerate(("image", "text")):
        tower = at_least(towers[place], opset)
        tower.ir_version = ir
        for value in (*tower.graph.input, *tower.graph.output):
            value.type.tensor_type.shape.dim[0].dim_param = f"{side}_batch"
        towers[place] = compose.add_prefix(tower, f"{side}/", rename_inputs=False, rename_outputs=False)
    model = compose.merge_models(*towers, io_map=[], name="joint")
    domains = {entry.domain: entry.version for entry in model.opset_import}  # both towers' were listed
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(*entry) for entry in domains.items())
    graph = model.graph
    takes = [value.name for value in graph.output]
    if logit_bias is not None:
        graph.initializer.append(numpy_helper.from_array(np.float32(logit_bias), "logit_bias"))
        takes.append("logit_bias")
    graph.node.append(
        helper.make_node("Gemm", takes, ["logits_per_image"], name="logits_per_image", alpha=logit_scale, transB=1)
    )
    shape = ["image_batch", "text_batch"]
    graph.output.append(helper.make_tensor_value_info("logits_per_image", TensorProto.FLOAT, shape))
    onnx.checker.check_model(model, full_check=True)
    return model


def _copy(model: ModelProto) -> ModelProto:
    """Return a copy without metadata and without shapes of what is inside, which ONNX can infer again."""
    copy = ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    del copy.metadata_props[:]
    return copy
