"""TinyCLIP, manual inheritance: a plain CLIP (GELU, heads 64 wide) whose towers are wrapped one by one.

Auto-inherited checkpoints are cut along the residual width by learned masks, and are refused.
"""

from __future__ import annotations

import re

from torch import Tensor

from clipress.errors import ArtifactError
from clipress.models.importers.base import IMPORTERS, Importer
from clipress.models.importers.open_clip import OpenClip
from clipress.models.importers.openai import HEAD, architecture_from_shapes, model_from_weights, root
from clipress.models.load import Model
from clipress.models.weights_file import State

# _image_encoder.module.visual.conv1.weight -> visual.conv1.weight; _logit_scale.module.logit_scale -> logit_scale
_WRAPPER = re.compile(r"_?(image_encoder|text_encoder|logit_scale)(_without_ddp)?\.(module\.)*")


@IMPORTERS.register("tinyclip")
class TinyClip(Importer):
    """Recognised by the wrapped image tower."""

    priority = 10

    def recognises(self, state: State) -> bool:
        return any(_WRAPPER.match(name) and ".visual." in name for name in state)

    def model_from_state(self, state: State, model_name: str | None) -> Model:
        """Take the towers out of their wrappers and build the model, by name or from its shapes."""
        weights = {_WRAPPER.sub("", name, count=1): tensor for name, tensor in state.items()}
        if any(root(name) == "l0_module" for name in weights) or any(_is_cut(name, weights[name]) for name in weights):
            raise ArtifactError(
                "this is an auto-inherited TinyCLIP (l0_module masks, or blocks they have cut), which clipress does not "
                "import. Use a manual-inherited one, without 'auto' in its name."
            )
        if model_name is not None:
            return OpenClip().model_from_state(weights, model_name)
        return model_from_weights(architecture_from_shapes(weights, quick_gelu=False), weights)


def _is_cut(name: str, tensor: Tensor) -> bool:
    rows_per_column = 3 if name.endswith(".attn.in_proj_weight") else 4 if name.endswith(".mlp.c_fc.weight") else None
    if rows_per_column is None or tensor.ndim != 2:
        return False
    rows, width = tensor.shape
    return rows != rows_per_column * width or width % HEAD != 0
