"""Graphs put together from the towers' graphs, nothing exported anew: what a tower computed, it still computes."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper


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


def _copy(model: ModelProto) -> ModelProto:
    """Return a copy without metadata and without shapes of what is inside, which ONNX can infer again."""
    copy = ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    del copy.metadata_props[:]
    return copy
