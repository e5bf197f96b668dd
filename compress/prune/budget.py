"""Budgets: from scores and exact costs to a keep-mask, within one aligned step of the target.

Within a site levels are cut in steps of `align` (so widths stay multiples of it) and never below the floor. Every head
keeps as many dims as the others; which ones, each head chooses by its own scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from clipress.compress.prune.gates import Site
from clipress.errors import RecipeError
from clipress.models import anatomy
from clipress.recipe import Section


class Budget(Section):
    """What may stay, as a fraction of what the blocks of both towers have; exactly one."""

    params: float | None = Field(None, gt=0, lt=1)
    macs: float | None = Field(None, gt=0, lt=1)

    def model_post_init(self, _: object) -> None:
        if (self.params is None) == (self.macs is None):
            raise RecipeError("prune.budget: exactly one of 'params' and 'macs' is asked for.")


class Align(Section):
    """Widths stay multiples of these; 8 and 32 suit INT8, 2:4 and wide vector units."""

    head_dim: int = Field(8, ge=1)
    ffn: int = Field(32, ge=1)


class Floor(Section):
    """Smallest part of a site that stays."""

    head_dim: float = Field(0.2, ge=0, le=1)
    ffn: float = Field(0.1, ge=0, le=1)


@dataclass(frozen=True)
class _Step:
    site: int
    count: int  # levels
    cost: int
    value: float


def keep_masks(
    sites: Sequence[Site],
    scores: Sequence[Tensor],
    *,
    fraction: float,
    unit: str,
    total: int,
    fixed: int,
    align: Align,
    floor: Floor,
    per_cost: bool,
) -> list[Tensor]:
    """Return bool masks [groups, units] whose cost, with what is fixed, is at most `fraction * total`.

    unit: "params" or "macs"; total: what all blocks cost now; fixed: what cannot be cut. Steps are taken in the order
    of their mean score (per cost where asked), best first, until nothing more fits.
    """
    kept = [0] * len(sites)
    left = fraction * total - fixed
    smallest = fixed
    steps: list[_Step] = []
    for index, (site, score) in enumerate(zip(sites, scores, strict=True)):
        cost = getattr(site, unit)
        size, least = _stride(site, align), _least(site, align, floor)
        ranked = score.double().sort(dim=1, descending=True).values.sum(0)  # [units]: score of the j-th level
        kept[index] = least
        left -= least * cost
        smallest += least * cost
        for start in range(least, site.units, size):
            count = min(size, site.units - start)
            value = float(ranked[start : start + count].sum()) / (count * (cost if per_cost else site.groups))
            steps.append(_Step(index, count, count * cost, value))
    if left < 0:
        raise RecipeError(
            f"prune.budget: {unit} {fraction:.3f} was asked for; with these floors and alignments the smallest possible "
            f"is {smallest / total:.3f}. Raise the budget or lower 'floor' or 'align'."
        )
    full = set()
    for step in sorted(steps, key=lambda step: -step.value):  # stable: within a site the order stands
        if step.site not in full and step.cost <= left:
            kept[step.site] += step.count
            left -= step.cost
        else:
            full.add(step.site)  # a site never skips a step
    return [_best(score, count) for score, count in zip(scores, kept, strict=True)]


def _stride(site: Site, align: Align) -> int:
    return align.ffn if site.kind == "ffn" else align.head_dim


def _least(site: Site, align: Align, floor: Floor) -> int:
    part = floor.ffn if site.kind == "ffn" else floor.head_dim
    stride = _stride(site, align)
    wanted = max(-(-int(part * site.units + 0.5) // stride) * stride, stride)
    return min(wanted, site.units)


def _best(score: Tensor, count: int) -> Tensor:
    """Mark the `count` best of each row: bool, same shape."""
    order = score.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)


def block_cost(model: nn.Module, sites: Sequence[Site], unit: str) -> tuple[int, int]:
    """Return (total, fixed) cost of all blocks: what they cost now, and what no site can cut."""
    prunable = sum(site.units * getattr(site, unit) for site in sites)
    if unit == "macs":  # every product inside a block belongs to a site
        return prunable, 0
    total = anatomy.counts(model)["block_params"]
    return total, total - prunable
