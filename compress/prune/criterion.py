"""Pruning criteria: score every unit from the gradients of its gate, or from weights; the largest scores are kept.

Sums are accumulated in float64 outside `.grad`, and samples with non-finite gradients are skipped and counted, so neither
mixed precision nor overflows affect what is pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from clipress.compress.prune.gates import Site
from clipress.registry import Registry


class Criterion:
    """A way to score units. Subclasses define `summed` for scores from gates, `score` for scores from weights, `watch` or
    `measure`."""

    space: ClassVar[str] = "separate"
    """Which gates it uses: `separate` or `upop`."""
    uses_gradients: ClassVar[bool] = True
    from_gates: ClassVar[bool] = True
    """Whether `uses_gradients` means those of the gates; otherwise `watch` adds up the scores."""
    measures: ClassVar[bool] = False
    """Whether to call `measure` before every update of the masks."""
    probe: ClassVar[bool] = False
    """Whether to use gradients of random projections of the outputs instead of gradients of the loss."""
    per_cost: ClassVar[bool] = True
    """Whether to rank by score per cost; otherwise by score, standardized per kind over all towers."""
    decay: ClassVar[float] = 0.5
    """Factor applied to the sums after each update of the masks."""
    forgets: ClassVar[bool] = False
    """Whether the sums begin anew at every step."""
    reversible: ClassVar[bool] = False
    """Whether a later update may restore a masked unit."""
    for_channels: ClassVar[bool] = False
    """Whether it can score the channels of a convolutional tower, which have gradients per micro-batch only."""

    def __init__(self) -> None:
        self.measured: dict[str, Tensor] = {}

    def summed(self, gradient: Tensor) -> Tensor:
        """Reduce per-sample gradients over the batch: [B, groups, units] -> [groups, units]."""
        raise NotImplementedError

    def watch(self, sites: Sequence[Site], add: Callable[[int, Tensor], None]) -> list[RemovableHandle]:
        """Install hooks that call `add` with the number of a site and a batch's scores [groups, units]."""
        return []

    def measure(self, sites: Sequence[Site], strides: Sequence[int], embed: Callable[[str], Tensor]) -> list[Tensor]:
        """Return scores from the embeddings of a tower under other masks. `measured` receives their sum over processes."""
        raise NotImplementedError

    def score(self, site: Site, generator: torch.Generator) -> Tensor:
        """Return scores [groups, units] without gradients."""
        raise NotImplementedError

    def score_channels(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        """Return float64 scores [channels] from all weights that produce or read a channel: [channels, weights]."""
        raise NotImplementedError


CRITERIA: Registry[type[Criterion]] = Registry(
    "criterion",
    *(f"clipress.compress.prune.{name}" for name in ("criterion", "weight_criteria", "hessian", "module_error")),
)


@CRITERIA.register("fisher")
class Fisher(Criterion):
    """Squared per-sample gradients: the diagonal of the empirical Fisher matrix. Samples cannot cancel out."""

    for_channels = True

    def summed(self, gradient: Tensor) -> Tensor:
        return gradient.square().sum(0)


@CRITERIA.register("taylor")
class Taylor(Criterion):
    """First-order Taylor expansion: absolute change of each sample's loss (Molchanov et al. 2019)."""

    for_channels = True

    def summed(self, gradient: Tensor) -> Tensor:
        return gradient.abs().sum(0)


@CRITERIA.register("gauss-newton")
class GaussNewton(Criterion):
    """Squared gradients of random projections of the outputs.

    Requires no labels, and works even if a distillation loss is zero at the start.
    """

    probe = True

    def summed(self, gradient: Tensor) -> Tensor:
        return gradient.square().sum(0)


@CRITERIA.register("upop")
class Upop(Criterion):
    """UPop's signed sum over the whole search (Shi et al. 2023). UPop cuts the largest sums, hence the minus sign."""

    space = "upop"
    per_cost = False
    decay = 1.0
    reversible = True

    def summed(self, gradient: Tensor) -> Tensor:
        return -gradient.sum(0)


@CRITERIA.register("upop-last")
class UpopLast(Upop):
    """UPop's sum over one batch, the last before an update.

    So its code ranks Segmenter's gates: they are in the optimizer by mistake, which clears their gradients at every step.
    """

    forgets = True


@CRITERIA.register("magnitude")
class Magnitude(Criterion):
    """Product of the norms of a unit's input weights and output weights."""

    uses_gradients = False
    for_channels = True

    def score(self, site: Site, generator: torch.Generator) -> Tensor:
        if site.kind != "heads":
            left, right = site.sides()
            return left.norm(dim=2) * right.norm(dim=2)
        attn = site.part.module
        values = (attn.v.weight.norm(dim=1) * attn.out.weight.norm(dim=0)).reshape(attn.heads, attn.v_dim)
        return values.norm(dim=1)[None]

    def score_channels(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        return weights.double().norm(dim=1)


@CRITERIA.register("random")
class Random(Criterion):
    """Uniform noise, a baseline for the other criteria."""

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
        self.left_out = torch.zeros((), dtype=torch.int64, device=sites[0].mask.device)  # samples
        self.watched: list[tuple[int, Tensor]] = []  # of this step, not yet added
        self.handles = criterion.watch(sites, self._add_to)

    def _add_to(self, at: int, scores: Tensor) -> None:
        self.watched.append((at, scores))

    def clear(self) -> None:
        """Begin the sums anew."""
        self.sums = [torch.zeros_like(total) for total in self.sums]

    @torch.no_grad()
    def add(self, finite: Tensor | None = None) -> None:
        """Add this step's gradients, unless `finite`, a bool (), is false. Nothing here waits for the device."""
        watched, self.watched = self.watched, []
        for at, scores in watched:
            self.sums[at] += scores if finite is None else torch.where(finite, scores, 0.0)
        if not (self.criterion.uses_gradients and self.criterion.from_gates):
            return
        gradients = [site.gradient() for site in self.sites]
        each = torch.stack([g.isfinite().flatten(1).all(1) for g in gradients if g is not None and len(g)], 0)
        # All towers see the same samples, so a sample with one non-finite gradient is skipped everywhere.
        good = each.all(0)
        counts = torch.ones_like(good[0]) if finite is None else finite
        self.left_out += (~good & counts).sum()
        good = (good & counts)[:, None, None]
        for total, gradient in zip(self.sums, gradients, strict=True):
            if gradient is not None:
                total += self.criterion.summed(gradient.where(good, 0.0).double())

    def scores(self, reduce: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Return the scores [groups, units] of all sites, summed over processes by `reduce`. Decays the sums."""
        if not self.criterion.uses_gradients:
            generator = torch.Generator().manual_seed(self.seed)  # the same scores at every update
            return [self.criterion.score(site, generator).detach().double() for site in self.sites]
        sums = [reduce(total) for total in self.sums]
        self.sums = [total * self.criterion.decay for total in self.sums]
        if self.criterion.per_cost:
            return sums
        return self._standardized(sums)

    def _standardized(self, sums: list[Tensor]) -> list[Tensor]:
        result = list(sums)
        for kind in {site.kind for site in self.sites}:
            members = [i for i, site in enumerate(self.sites) if site.kind == kind]
            values = torch.cat([sums[i].flatten() for i in members])
            for i in members:
                result[i] = (sums[i] - values.mean()) / values.std().clamp_min(1e-30)
        return result
