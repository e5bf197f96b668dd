"""CLIP-KD: {"state_dict": ...} of the student in open_clip's naming, perhaps with the distillation's own projections."""

from __future__ import annotations

import logging

from clipress.models.importers import State, open_clip
from clipress.models.importers.openai import ROOTS, architecture_from_shapes, model_from_weights, root
from clipress.models.load import Model

log = logging.getLogger("clipress.models")
# What the losses train beside the student; none of it belongs to the CLIP.
EXTRAS = {
    *("visual_proj", "text_proj", "visual_fusion_proj", "text_fusion_proj"),
    *("cross_logit_scale", "fusion_logit_scale"),
}


def recognises(state: State) -> bool:
    """Tell by the distillation's own weights; without them the file is an ordinary open_clip checkpoint."""
    return open_clip.recognises(state) and any(root(name) in EXTRAS for name in state)


def clip_from_state(state: State, model_name: str | None) -> Model:
    """Build the student: by name, or by its shapes when it is a plain ViT (heads 64 wide, GELU)."""
    student = {name: tensor for name, tensor in state.items() if root(name) in ROOTS | {"text", "logit_bias"}}
    if dropped := sorted(state.keys() - student.keys()):
        log.warning("%d tensors are not part of the CLIP and are ignored: %s", len(dropped), ", ".join(dropped[:8]))
    if model_name is not None:
        return open_clip.clip_from_state(student, model_name)
    return model_from_weights(architecture_from_shapes(student, quick_gelu=False), student)
