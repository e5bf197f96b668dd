"""TinyCLIP, manual inheritance: a plain CLIP (GELU, heads 64 wide) whose towers are wrapped one by one.

Auto-inherited checkpoints are cut along the residual width by learned masks; they are refused.
"""

from __future__ import annotations

import re

from torch import Tensor

from clipress.errors import ArtifactError
from clipress.models.importers import State, open_clip
from clipress.models.importers.openai import HEAD, architecture_from_shapes, model_from_weights, root
from clipress.models.load import Model

# _image_encoder.module.visual.conv1.weight -> visual.conv1.weight; _logit_scale.module.logit_scale -> logit_scale
_WRAPPER = re.compile(r"_?(image_encoder|text_encoder|logit_scale)(_without_ddp)?\.(module\.)*")


def recognises(state: State) -> bool:
    """Tell by the wrapped image tower."""
    return any(_WRAPPER.match(name) and ".visual." in name for name in state)


def clip_from_state(state: State, model_name: str | None) -> Model:
    """Take the towers out of their wrappers and build the model, by name or by its shapes."""
    weights = {_WRAPPER.sub("", name, count=1): tensor for name, tensor in state.items()}
    if any(root(name) == "l0_module" for name in weights) or any(_is_cut(name, weights[name]) for name in weights):
        raise ArtifactError(
            "it is an auto-inherited TinyCLIP (l0_module masks, or blocks they have cut); clipress does not import these. "
            "Take a manual-inherited one, without 'auto' in its name."
        )
    if model_name is not None:
        return open_clip.clip_from_state(weights, model_name)
    return model_from_weights(architecture_from_shapes(weights, quick_gelu=False), weights)


def _is_cut(name: str, tensor: Tensor) -> bool:
    rows_per_column = 3 if name.endswith(".attn.in_proj_weight") else 4 if name.endswith(".mlp.c_fc.weight") else None
    if rows_per_column is None or tensor.ndim != 2:
        return False
    rows, width = tensor.shape
    return rows != rows_per_column * width or width % HEAD != 0
