"""What every ONNX file says of itself, so that it can be used without the folder it was made in.

It is JSON in `metadata_props`, under the key `clipress`; ONNX Runtime shows it:

    json.loads(session.get_modelmeta().custom_metadata_map["clipress"])

    tower                            image, text, classifier or joint
    precision                        fp32 or int8; in a lowered file fp16, bf16 or int8-fp16 and the like
    preprocess                       size, mean, std and what else makes pixel_values of a picture
    tokenizer                        name, context_length and kwargs: what makes input_ids of a text
    embed_dim, logit_scale, logit_bias   the scale is exponentiated; a bias is null where the model has none
    labels, templates                of a classifier: what its columns mean, in order, and how they were prompted
    stage, lineage_hash              the artefact it was exported from
    made_of                          of a file put together from others: their sha256, by tower
    parity                           what its comparison with what it was made from gave
    opset, settings, exporter        how the towers were exported
    int8                             of a convolutional INT8 tower: which form it has, and what both took per picture
    portable                         whether INT8 products overflow on no CPU; where not, ONNX Runtime needs its exact mode
                                     (session.x64quantprecision) on x86 without VNNI instructions
    self_test                        inputs from a seed and the outputs of exact arithmetic, see runtime/self_test.py
    versions                         of clipress, torch, onnx and onnxruntime when they were
    schema_version                   1
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import onnx

from clipress.export.int8_graph import is_portable
from clipress.runtime.onnx_session import METADATA

KEY = METADATA


def stamp(model: onnx.ModelProto, about: Mapping[str, Any]) -> None:
    """Make a graph say this of itself, and nothing else."""
    onnx.helper.set_model_props(model, {KEY: json.dumps(about)})
    model.producer_name = "clipress"


def stamp_portable(model: onnx.ModelProto) -> None:
    """Make a graph say whether it is portable, which decides how it is opened until it is stamped for good."""
    stamp(model, {"portable": is_portable(model)})


def told(model: onnx.ModelProto) -> dict[str, Any] | None:
    """Return what a graph says of itself; None for one that clipress did not make. Raises ValueError for damage."""
    kept = {item.key: item.value for item in model.metadata_props}.get(KEY)
    about = None if kept is None else json.loads(kept)
    if not isinstance(about, dict | None):
        raise ValueError(f"a mapping is asked for, found {about!r}")
    return about
