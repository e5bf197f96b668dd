"""Module-wise error, after MoPE-CLIP (Lin et al. 2024): what a model loses when a group of units is removed from it.

MoPE-CLIP measures the loss of retrieval accuracy. This measures the change of the embeddings, which needs no labels and few
samples: 1 - the mean cosine with the embeddings of the masked model before the removal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clipress.compress.prune.criterion import CRITERIA, Criterion, Magnitude
from clipress.compress.prune.gates import Site

SAMPLES = 64  # of the batch at an update of the masks


@CRITERIA.register("module-error")
class ModuleError(Criterion):
    """Change of the embeddings when a group of units is removed, measured before every update of the masks.

    A group is a step of `align`: in every head, or in the feed-forward, the units next to one another by magnitude. It costs
    a forward pass of one tower for each group.
    """

    uses_gradients = False
    measures = True

    @torch.no_grad()
    def measure(self, sites: Sequence[Site], strides: Sequence[int], embed: Callable[[str], Tensor]) -> list[Tensor]:
        """Return the error of every unit, its share of its group's: [groups, units] for each site.

        `embed` returns the embeddings [B, D] of a tower with the sites' masks in force. Units that are cut score 0.
        """
        whole = {tower: embed(tower) for tower in dict.fromkeys(site.part.tower for site in sites)}
        found = []
        for site, step in zip(sites, strides, strict=True):
            mask, score = site.mask, torch.zeros_like(site.mask, dtype=torch.float64)
            try:
                for group in groups_by_magnitude(site, step):
                    site.mask = mask.scatter(1, group, 0.0)
                    error = cosine_error(embed(site.part.tower), whole[site.part.tower])
                    score.scatter_(1, group, error / group.numel())
            finally:
                site.mask = mask
            found.append(score)
        return found

    def score(self, site: Site, generator: torch.Generator) -> Tensor:
        return self.measured[site.name]


def cosine_error(found: Tensor, expected: Tensor) -> float:
    """Return 1 - the mean cosine of rows [B, D], as half the squared distance on the unit sphere, which loses no digits."""
    return float((F.normalize(found.double()) - F.normalize(expected.double())).square().sum(1).mean() / 2)


def groups_by_magnitude(site: Site, step: int) -> list[Tensor]:
    """Return the units that are not cut in groups of `step` per head, largest first: indices [groups, step] each."""
    size = Magnitude().score(site, torch.Generator()).detach().double()
    order = size.masked_fill(site.mask == 0, -1.0).argsort(dim=1, descending=True, stable=True)
    left = int((site.mask[0] != 0).sum())  # every head keeps as many as the others
    return [order[:, start : min(start + step, left)] for start in range(0, left, step)]
