"""Which axes of an open_clip transformer's tensors are residual channels, so that a tower's width can be cut."""

from __future__ import annotations

import re

from torch import nn

from clipress.errors import ArtifactError
from clipress.models.anatomy import text_root, tower_of

Axes = dict[str, tuple[int, str | None]]
"""Tensor name -> (axis, the gain of the norm that it is read through, or of the layer scale that it is written through)."""

_IN_TOWER: dict[str, Axes] = {
    "image": {
        "conv1.weight": (0, None),
        "class_embedding": (0, None),
        "positional_embedding": (1, None),
        "ln_pre.weight": (0, None),
        "ln_pre.bias": (0, None),
        "ln_post.weight": (0, None),
        "ln_post.bias": (0, None),
        "proj": (0, "ln_post.weight"),
    },
    "text": {
        "token_embedding.weight": (1, None),
        "token_embedding.up.weight": (0, None),
        "cls_emb": (0, None),
        "positional_embedding": (1, None),
        "ln_final.weight": (0, None),
        "ln_final.bias": (0, None),
        "text_projection": (0, "ln_final.weight"),
        "text_projection.weight": (1, "ln_final.weight"),
    },
}
_IN_BLOCK: Axes = {
    "ln_1.weight": (0, None),
    "ln_1.bias": (0, None),
    "attn.q.weight": (1, "ln_1.weight"),
    "attn.k.weight": (1, "ln_1.weight"),
    "attn.v.weight": (1, "ln_1.weight"),
    "attn.out.weight": (0, "ls_1.gamma"),
    "attn.out.bias": (0, None),
    "ls_1.gamma": (0, None),
    "ln_2.weight": (0, None),
    "ln_2.bias": (0, None),
    "mlp.c_fc.weight": (1, "ln_2.weight"),
    "mlp.c_proj.weight": (0, "ls_2.gamma"),
    "mlp.c_proj.bias": (0, None),
    "ls_2.gamma": (0, None),
}
_WITHOUT_CHANNELS = {
    "token_embedding.rows.weight",
    "attn.q.bias",
    "attn.k.bias",
    "attn.v.bias",
    "mlp.c_fc.bias",
    "text_projection.bias",
}


def transformer(model: nn.Module, tower: str) -> nn.Module | None:
    """Return open_clip's own transformer of a tower, which holds its blocks as `resblocks`; None if it has another."""
    found = getattr(model.visual if tower == "image" else text_root(model)[1], "transformer", None)
    return found if hasattr(found, "resblocks") else None


def residual_axes(model: nn.Module, tower: str) -> Axes:
    """Return every tensor of an open_clip transformer tower that has an axis of residual channels.

    Raises ArtifactError for a tower with unknown tensors: its width cannot be changed.
    """
    prefix = "visual." if tower == "image" else text_root(model)[0]
    found: Axes = {}
    names = [name for name, _ in model.named_parameters() if tower_of(model, name) == tower]
    for name in names:
        short, at, table = name.removeprefix(prefix), prefix, _IN_TOWER[tower]
        if block := re.match(r"transformer\.resblocks\.\d+\.", short):
            short, at, table = short.removeprefix(block[0]), prefix + block[0], _IN_BLOCK
        if short in _WITHOUT_CHANNELS:
            continue
        if short not in table:
            raise ArtifactError(f"{name} of the {tower} tower is not one of a plain open_clip transformer's tensors.")
        axis, gain = table[short]
        found[name] = axis, at + gain if gain and at + gain in names else None
    return found
