"""Criteria: from the gradients of gates, or from weights alone, to a score per unit; the largest scores are kept.

Sums are kept in float64 outside `.grad`, and a sample with a non-finite gradient is left out and counted, so neither
mixed precision nor an overflow can change what is pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from clipress.compress.prune.gates import Site
from clipress.models.anatomy import Attn
from clipress.registry import Registry


class Criterion:
    """One way of scoring units. A subclass has `summed`, for scores from gradients, or `score`, for scores without."""

    space: ClassVar[str] = "separate"
    """Which gates it looks at: separate or upop."""
    uses_gradients: ClassVar[bool] = True
    probe: ClassVar[bool] = False
    """Takes the gradients of random projections of the embeddings instead of the loss's."""
    per_cost: ClassVar[bool] = True
    """Ranks by score per cost; else by the score, standardised per kind over all towers."""
    decay: ClassVar[float] = 0.5
    """The fraction of the sums that remains after each update of the masks."""
    reversible: ClassVar[bool] = False
    """Whether a cut unit may come back in a later update."""
    for_channels: ClassVar[bool] = False
    """Whether it can score the channels of a convolutional tower, whose gradients come per micro-batch."""

    def summed(self, gradient: Tensor) -> Tensor:
        """Reduce gradients per sample to what is added up: [B, groups, units] -> [groups, units]."""
        raise NotImplementedError

    def score(self, site: Site, generator: torch.Generator) -> Tensor:
        """Return scores [groups, units] that need no gradients."""
        raise NotImplementedError

    def score_channels(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        """Return scores [channels], float64, from all weights that make or read each channel: [channels, weights]."""
        raise NotImplementedError


CRITERIA: Registry[type[Criterion]] = Registry("criterion", "clipress.compress.prune.criterion")


@CRITERIA.register("fisher")
class Fisher(Criterion):
    """Squared gradient per sample: the diagonal of the empirical Fisher matrix, in which nothing cancels."""

    for_channels = True

    def summed(self, gradient: Tensor) -> Tensor:
        return gradient.square().sum(0)


@CRITERIA.register("taylor")
class Taylor(Criterion):
    """First-order Taylor: the size of each sample's change of loss (Molchanov et al. 2019)."""

    for_channels = True

    def summed(self, gradient: Tensor) -> Tensor:
        return gradient.abs().sum(0)


@CRITERIA.register("gauss-newton")
class GaussNewton(Criterion):
    """Squared gradient of random projections of the embeddings.

    It needs no labels, and works with a distillation loss that is zero at the start.
    """

    probe = True

    def summed(self, gradient: Tensor) -> Tensor:
        return gradient.square().sum(0)


@CRITERIA.register("upop")
class Upop(Criterion):
    """UPop's signed sum over the whole search (Shi et al. 2023). The largest are cut, hence the minus."""

    space = "upop"
    per_cost = False
    decay = 1.0
    reversible = True

    def summed(self, gradient: Tensor) -> Tensor:
        return -gradient.sum(0)


@CRITERIA.register("magnitude")
class Magnitude(Criterion):
    """Product of the norms of the weights that go into a unit and of those that come out of it."""

    uses_gradients = False
    for_channels = True

    def score(self, site: Site, generator: torch.Generator) -> Tensor:
        if not isinstance(site.part, Attn):
            return (site.part.linear_in.weight.norm(dim=1) * site.part.linear_out.weight.norm(dim=0))[None]
        attn = site.part.module
        if site.kind == "qk":
            return (attn.q.weight.norm(dim=1) * attn.k.weight.norm(dim=1)).reshape(site.groups, site.units)
        values = (attn.v.weight.norm(dim=1) * attn.out.weight.norm(dim=0)).reshape(attn.heads, attn.v_dim)
        return values.norm(dim=1)[None] if site.kind == "heads" else values

    def score_channels(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        return weights.double().norm(dim=1)


@CRITERIA.register("random")
class Random(Criterion):
    """Uniform noise: the baseline that every other criterion must beat."""

    uses_gradients = False
    for_channels = True

    def score(self, site: Site, generator: torch.Generator) -> Tensor:
        return torch.rand(site.groups, site.units, generator=generator).to(site.mask.device)

    def score_channels(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        return torch.rand(len(weights), generator=generator, dtype=torch.float64)


class Accumulator:
    """Running sums of one criterion over all sites."""

    def __init__(self, criterion: Criterion, sites: Sequence[Site], seed: int = 0) -> None:
        self.criterion, self.sites, self.seed = criterion, sites, seed
        self.sums = [torch.zeros(s.groups, s.units, dtype=torch.float64, device=s.mask.device) for s in sites]
        self.left_out = 0

    @torch.no_grad()
    def add(self) -> None:
        """Add this step's gradients."""
        if not self.criterion.uses_gradients:
            return
        gradients = [site.gradient() for site in self.sites]
        finite = torch.stack([g.isfinite().flatten(1).all(1) for g in gradients if g is not None and len(g)], 0)
        # all towers see the same samples; one non-finite copy leaves the sample out everywhere
        good = finite.all(0)
        self.left_out += int((~good).sum())
        for total, gradient in zip(self.sums, gradients, strict=True):
            if gradient is not None:
                total += self.criterion.summed(gradient[good].double())

    def scores(self, reduce: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Return every site's scores [groups, units], summed over processes by `reduce`, then decay the sums."""
        if not self.criterion.uses_gradients:
            generator = torch.Generator().manual_seed(self.seed)  # the same scores at every update
            return [self.criterion.score(site, generator).detach().double() for site in self.sites]
        sums = [reduce(total) for total in self.sums]
        self.sums = [total * self.criterion.decay for total in self.sums]
        if self.criterion.per_cost:
            return sums
        return self._standardised(sums)

    def _standardised(self, sums: list[Tensor]) -> list[Tensor]:
        result = list(sums)
        for kind in {site.kind for site in self.sites}:
            members = [i for i, site in enumerate(self.sites) if site.kind == kind]
            values = torch.cat([sums[i].flatten() for i in members])
            for i in members:
                result[i] = (sums[i] - values.mean()) / values.std().clamp_min(1e-30)
        return result
