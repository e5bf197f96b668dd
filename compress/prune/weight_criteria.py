"""Criteria that read weights alone and compare the units of a layer with one another: `fpgm` and `lamp`."""

from __future__ import annotations

import torch
from torch import Tensor

from clipress.compress.prune.criterion import CRITERIA, Criterion
from clipress.compress.prune.gates import Site


def unit_weights(site: Site) -> Tensor:
    """Return all weights that produce or read a unit: [groups, units, weights]."""
    return torch.cat(site.sides(), 2)


class Relative(Criterion):
    """Base of the criteria that compare the units of one layer. Subclasses define `compared`."""

    uses_gradients = False
    for_channels = True

    def compared(self, weights: Tensor) -> Tensor:
        """Return scores [groups, units] from the weights of each unit: [groups, units, weights]."""
        raise NotImplementedError

    def score(self, site: Site, generator: torch.Generator) -> Tensor:
        return self.compared(unit_weights(site).detach().double())

    def score_channels(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        return self.compared(weights.detach().double()[None])[0]


@CRITERIA.register("fpgm")
class Fpgm(Relative):
    """Sum of the distances to the other units of the layer (FPGM, He et al. 2019). Units near the geometric median go first.

    Dims of a head are compared with those of the same head.
    """

    def compared(self, weights: Tensor) -> Tensor:
        return torch.cdist(weights, weights, compute_mode="donot_use_mm_for_euclid_dist").sum(2)


@CRITERIA.register("lamp")
class Lamp(Relative):
    """Squared norm over the sum of those of all units of the layer that are at least as large (LAMP, Lee et al. 2021).

    A layer's largest unit scores 1, so no layer is emptied before the others.
    """

    def compared(self, weights: Tensor) -> Tensor:
        squares = weights.square().sum(2).flatten()
        ranked, order = squares.sort(descending=True, stable=True)
        shares = torch.empty_like(squares)
        shares[order] = ranked / ranked.cumsum(0).clamp_min(1e-300)
        return shares.reshape(weights.shape[:2])
