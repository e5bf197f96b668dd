"""CLIP-KD: {"state_dict": ...} of the student in open_clip's naming, perhaps with the distillation's own projections."""

from __future__ import annotations

import logging

from clipress.models.importers.base import IMPORTERS, Importer
from clipress.models.importers.open_clip import OpenClip
from clipress.models.importers.openai import ROOTS, architecture_from_shapes, model_from_weights, root
from clipress.models.load import Model
from clipress.models.weights_file import State

log = logging.getLogger("clipress.models")
# Modules trained with the losses that are not part of the CLIP.
EXTRAS = {
    *("visual_proj", "text_proj", "visual_fusion_proj", "text_fusion_proj"),
    *("cross_logit_scale", "fusion_logit_scale"),
}


@IMPORTERS.register("clip-kd")
class ClipKd(Importer):
    """Detected by the weights of the distillation losses; without them the file is an ordinary open_clip checkpoint."""

    priority = 30

    def recognises(self, state: State) -> bool:
        return OpenClip().recognises(state) and any(root(name) in EXTRAS for name in state)

    def model_from_state(self, state: State, model_name: str | None) -> Model:
        """Build the student: by name, or from its shapes when it is a plain ViT (heads 64 wide, GELU)."""
        student = {name: tensor for name, tensor in state.items() if root(name) in ROOTS | {"text", "logit_bias"}}
        if dropped := sorted(state.keys() - student.keys()):
            log.warning("%d tensors are not part of the CLIP and are ignored: %s", len(dropped), ", ".join(dropped[:8]))
        if model_name is not None:
            return OpenClip().model_from_state(student, model_name)
        return model_from_weights(architecture_from_shapes(student, quick_gelu=False), student)
