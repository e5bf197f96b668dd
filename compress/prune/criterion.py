"""Criteria: from the gradient of the gates to a score per unit, larger meaning worth keeping.

Sums are kept in float64 outside `.grad`; a sample with a non-finite gradient is left out and counted, so neither mixed
precision nor an overflow can change what is pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipress.compress.prune.gates import Site
from clipress.models.anatomy import Block


@dataclass(frozen=True)
class Criterion:
    """How gradients [B, groups, units] are summed, and how sums become scores."""

    space: str = "separate"
    """Which gates it looks at: separate or upop."""
    summed: Callable[[Tensor], Tensor] | None = None
    """[B, groups, units] -> [groups, units]; None: scores do not come from gradients."""
    static: Callable[[Site, torch.Generator], Tensor] | None = None
    """Site -> scores [groups, units], where no gradient is needed."""
    probe: bool = False
    """Gradients of random projections of the embeddings instead of the loss's."""
    per_cost: bool = True
    """Rank by score per cost; else by the score, standardised per kind over both towers."""
    decay: float = 0.5
    """What part of the sums is left after each update of the masks."""
    reversible: bool = False
    """Whether a cut unit may come back in a later update."""


def _magnitude(site: Site, _: torch.Generator) -> Tensor:
    """Product of the norms of what goes into a unit and what comes out of it."""
    block = site.block
    attn, kind = block.attn, site.kind
    if kind == "ffn":
        return (block.ffn_in.weight.norm(dim=1) * block.ffn_out.weight.norm(dim=0))[None]
    if kind == "qk":
        return (attn.q.weight.norm(dim=1) * attn.k.weight.norm(dim=1)).reshape(site.groups, site.units)
    values = _value_norms(block)  # [heads, v_dim]
    return values.norm(dim=1)[None] if kind == "heads" else values


def _value_norms(block: Block) -> Tensor:
    attn = block.attn
    return (attn.v.weight.norm(dim=1) * attn.out.weight.norm(dim=0)).reshape(attn.heads, attn.v_dim)


def _random(site: Site, generator: torch.Generator) -> Tensor:
    return torch.rand(site.groups, site.units, generator=generator).to(site.mask.device)


CRITERIA = {
    # squared gradient per sample: the diagonal of the empirical Fisher matrix, no cancellation
    "fisher": Criterion(summed=lambda g: g.square().sum(0)),
    # first-order Taylor: the size of each sample's change of loss (Molchanov et al. 2019)
    "taylor": Criterion(summed=lambda g: g.abs().sum(0)),
    # squared gradient of random projections of both embeddings: needs no labels, and no loss that is zero at the start
    "gauss-newton": Criterion(summed=lambda g: g.square().sum(0), probe=True),
    # UPop: signed sum over the whole search; the largest are cut, hence the minus
    "upop": Criterion("upop", lambda g: -g.sum(0), per_cost=False, decay=1.0, reversible=True),
    "magnitude": Criterion(static=_magnitude),
    # the honest floor
    "random": Criterion(static=_random),
}


class Accumulator:
    """Running sums of one criterion over all sites."""

    def __init__(self, criterion: Criterion, sites: Sequence[Site], seed: int = 0) -> None:
        self.criterion, self.sites, self.seed = criterion, sites, seed
        self.sums = [torch.zeros(s.groups, s.units, dtype=torch.float64, device=s.mask.device) for s in sites]
        self.left_out = 0

    @torch.no_grad()
    def add(self) -> None:
        """Take in this step's gradients."""
        if self.criterion.summed is None:
            return
        gradients = [site.gradient() for site in self.sites]
        finite = torch.stack([g.isfinite().flatten(1).all(1) for g in gradients if g is not None and len(g)], 0)
        # both towers see the same samples; one bad copy leaves the sample out everywhere
        good = finite.all(0)
        self.left_out += int((~good).sum())
        for total, gradient in zip(self.sums, gradients, strict=True):
            if gradient is not None:
                total += self.criterion.summed(gradient[good].double())

    def scores(self, reduce: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Return every site's scores [groups, units], summed over processes by `reduce`; then let the sums fade."""
        if self.criterion.static is not None:
            generator = torch.Generator().manual_seed(self.seed)  # the same opinion at every update
            return [self.criterion.static(site, generator).detach().double() for site in self.sites]
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
