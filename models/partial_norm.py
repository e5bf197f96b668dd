"""Layer norm over units of which some have been cut. Those count as zeros, so that a cut model computes what the masked one did."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PartialNorm(nn.Module):
    """Layer norm whose mean and variance are over `width` units, of which the `kept` that enter are not zero.

    The original width stays when units are cut, as the softmax scale does.
    """

    def __init__(self, width: int, kept: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.weight, self.bias = nn.Parameter(torch.ones(kept)), nn.Parameter(torch.zeros(kept))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [..., kept]."""
        kept = len(self.weight)
        if not kept:
            return x
        share = kept / self.width
        mean = x.mean(-1, keepdim=True) * share
        centred = x - mean
        variance = centred.square().mean(-1, keepdim=True) * share + mean.square() * (1 - share)
        return centred * torch.rsqrt(variance + self.eps) * self.weight + self.bias


Norm = nn.LayerNorm | PartialNorm


def is_known_norm(module: nn.Module | None) -> bool:
    """Return whether units can be cut out of this norm: a layer norm over one axis, with gains and biases."""
    return isinstance(module, PartialNorm) or (
        isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1 and module.bias is not None
    )


def slice_norm(norm: Norm, mask: Tensor) -> Norm:
    """Return the norm of the units in a bool mask."""
    new = resized_norm(norm, int(mask.sum()))
    with torch.no_grad():
        new.weight.copy_(norm.weight[mask])
        new.bias.copy_(norm.bias[mask])
    return new


def resized_norm(norm: Norm, kept: int) -> Norm:
    """Return a norm of another number of units, whose gains and biases are to be set. Nothing changes if it has as many."""
    if kept == len(norm.weight):
        return norm
    width = norm.width if isinstance(norm, PartialNorm) else norm.normalized_shape[0]
    return PartialNorm(width, kept, norm.eps).to(norm.weight).train(norm.training)
