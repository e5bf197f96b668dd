"""UPop and CLIP-KDPruning: {"model": ...} in OpenAI's naming, with a momentum copy, queues and perhaps search masks.

Blocks may be slimmed: every head of a layer keeps the same k dims; the rows are q, k, v, each head after head. The published
code divides the logits by sqrt(k) once k is less than 64, so its retrained weights need that scale, and it is kept.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from clipress.models.importers.base import IMPORTERS, Importer
from clipress.models.importers.openai import (
    HEAD,
    ROOTS,
    architecture_from_shapes,
    head_dim_of,
    model_from_weights,
    refuse_name,
    root,
    shape,
)
from clipress.models.load import Model
from clipress.models.weights_file import State

log = logging.getLogger("clipress.models")
_IN_PROJ = re.compile(r"(visual\.)?transformer\.resblocks\.\d+\.attn\.in_proj_weight")


@IMPORTERS.register("upop")
class Upop(Importer):
    """Recognised by the momentum copy, or by attention narrower than the model."""

    priority = 20

    def recognises(self, state: State) -> bool:
        has_copy = any(root(name) == "visual_m" for name in state)
        return "text_projection" in state and (has_copy or any(_is_slim(state, name) for name in state))

    def model_from_state(self, state: State, model_name: str | None) -> Model:
        """Build the model, slim or dense, that computes what the published code computes from this file."""
        refuse_name(model_name)
        masks = [tensor for name, tensor in state.items() if "alpha" in name]
        if any(bool((mask != 1).any()) for mask in masks):
            log.warning(
                "The file holds search masks that are not all 1. They are ignored: the model is the unmasked one."
            )
        weights = {name: tensor for name, tensor in state.items() if root(name) in ROOTS and "alpha" not in name}
        architecture = architecture_from_shapes(weights, quick_gelu=True)
        model = model_from_weights(architecture, weights, shapes=_shapes(weights, architecture))
        return replace(model, preprocess=model.preprocess.model_copy(update={"resize_mode": "squash"}))

    def preprocess_source(self, folder: Path | None, model_name: str | None) -> str:
        return "UPop's, which squashes images to a square, since the file does not say"


def _is_slim(state: State, name: str) -> bool:
    sides = state[name].shape
    return _IN_PROJ.fullmatch(name) is not None and len(sides) == 2 and sides[0] != 3 * sides[1]


def _shapes(weights: State, architecture: dict[str, Any]) -> dict[str, dict[str, Any]]:
    shapes = {}
    for prefix, tower in (("visual.", architecture["vision_cfg"]), ("", architecture["text_cfg"])):
        heads, layers = tower["width"] // HEAD, tower["layers"]
        for number in range(layers if isinstance(layers, int) else 0):  # a ResNet has no blocks
            at = f"{prefix}transformer.resblocks.{number}"
            dim = head_dim_of(weights, f"{at}.attn.in_proj_weight", heads)
            ffn = shape(weights, f"{at}.mlp.c_fc.weight", 2)[0]
            shapes[at] = {"heads": heads, "qk_dim": dim, "v_dim": dim, "scale": dim**-0.5, "ffn": ffn}
    return shapes
