"""Stochastic depth (Huang et al. 2016): in training, a residual branch of a block is left out for some samples."""

from __future__ import annotations

import torch
from torch import nn

from clipress.errors import RecipeError
from clipress.models import anatomy

PLACES = ("drop_path1", "drop_path2")  # what timm's blocks put their branches through


def set_drop_path(model: nn.Module, rate: float) -> None:
    """Leave out branches of the last block with a probability of `rate`, of earlier ones less, down to 0 in the first; in place.

    Raises RecipeError for a model without such branches.
    """
    from timm.layers import DropPath

    blocks = [block.module for block in anatomy.blocks(model) if hasattr(block.module, PLACES[0])]
    if not blocks:
        raise RecipeError("drop_path: expected a vision transformer of timm's, found none. Leave it out.")
    for block, own in zip(blocks, torch.linspace(0, rate, len(blocks)).tolist(), strict=True):
        for place in PLACES:
            setattr(block, place, DropPath(own).train(block.training) if own else nn.Identity())
