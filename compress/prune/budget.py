"""Budgets: from scores and exact costs to keep-masks, within one aligned step of the target.

Within a site levels are cut in steps of `align` (so widths stay multiples of it) and never below `min_keep`. Every head
keeps as many dims as the others; which ones, each head chooses by its own scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor

from clipress.compress.prune.costs import HOW_TO_MEASURE, CostModel
from clipress.compress.prune.gates import Site
from clipress.errors import RecipeError, nearest
from clipress.recipe import Section

UNITS = ("params", "macs", "latency", "upop")
ABSOLUTE = {"max_params": "params", "max_macs": "macs", "max_ms": "latency"}


class Target(Section):
    """What may remain: exactly one limit, as a fraction of what the blocks have or as an absolute."""

    params: float | None = Field(None, gt=0, lt=1)
    macs: float | None = Field(None, gt=0, lt=1)
    latency: float | None = Field(None, gt=0, lt=1)
    """Of the time in a cost table; needs `costs`."""
    upop: float | None = Field(None, gt=0, lt=1)
    """Of UPop's own count, 36 for a gate of attention and 1 for a hidden unit: only to repeat its published runs."""
    max_params: int | None = Field(None, ge=1)
    """Parameters inside blocks."""
    max_macs: int | None = Field(None, ge=1)
    """Multiply-accumulates inside blocks, of one sample."""
    max_ms: float | None = Field(None, gt=0)
    """Milliseconds inside blocks, by the cost table, at the table's batch."""

    def given(self) -> list[str]:
        """Return which limits are set."""
        return [name for name in (*UNITS, *ABSOLUTE) if getattr(self, name) is not None]

    @property
    def unit(self) -> str:
        """Return params, macs, latency or upop."""
        (name,) = self.given()
        return ABSOLUTE.get(name, name)

    def fraction(self, total: float) -> float:
        """Return the target as a fraction of `total`."""
        (name,) = self.given()
        value = getattr(self, name)
        return value if name in UNITS else min(value / total, 1.0)


class Budget(Target):
    """One target for all towers together, whose shares the search finds; or one per tower, under the tower's name."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Target] = Field(init=False)
    """Targets by tower. Their names are checked when the search starts, against the towers of the model."""
    costs: Path | None = None
    """The cost table of `latency`: made by `clipress latency-table`."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, raw: Any) -> Any:
        """Raise RecipeError for an unknown key that holds no target, and so cannot be a tower."""
        for key, value in raw.items() if isinstance(raw, Mapping) else ():
            if key not in cls.model_fields and not isinstance(value, Mapping | Target | None):
                raise RecipeError(f"prune.budget: unknown key '{key}'.{nearest(key, cls.model_fields)}")
        if isinstance(raw, Mapping):  # a tower set to null has no target
            return {key: value for key, value in raw.items() if key in cls.model_fields or value is not None}
        return raw

    def model_post_init(self, _: object) -> None:
        targets = list(self.by_tower.values()) or [self]
        if (self.by_tower and self.given()) or any(len(target.given()) != 1 for target in targets):
            found = [*self.given(), *self.by_tower]
            raise RecipeError(
                "prune.budget: expected exactly one of params, macs, latency, max_params, max_macs, max_ms, for all towers "
                f"together or under the name of each tower; found {', '.join(found) or 'none'}."
            )
        if any(target.unit == "latency" for target in targets) and self.costs is None:
            raise RecipeError(f"prune.budget: a latency budget needs 'costs', a cost table. {HOW_TO_MEASURE}")

    @property
    def by_tower(self) -> dict[str, Target]:
        """The targets of single towers; empty where all towers share one."""
        return self.__pydantic_extra__ or {}

    def target_of(self, tower: str) -> Target | None:
        """Return the target that a tower has to meet, alone or with the others; None: it is left alone."""
        return self.by_tower.get(tower) if self.by_tower else self

    def targets(self, towers: Sequence[str]) -> list[tuple[tuple[str, ...], Target]]:
        """Return which of a model's towers share which target. Raises RecipeError for a tower it does not have."""
        check_towers(self.by_tower, towers, "prune.budget")
        if not self.by_tower:
            return [(tuple(towers), self)]
        return [((tower,), self.by_tower[tower]) for tower in towers if tower in self.by_tower]


def check_towers(named: Mapping[str, Any], towers: Sequence[str], where: str) -> None:
    """Raise RecipeError when a setting names a tower that the model does not have."""
    for name in named:
        if name not in towers:
            raise RecipeError(f"{where}: expected a tower of this model ({', '.join(towers)}), found '{name}'.")


class Align(Section):
    """Widths stay multiples of these; 8 and 32 suit INT8, 2:4 and wide vector units."""

    head_dim: int = Field(8, ge=1)
    ffn: int = Field(32, ge=1)
    heads: int = Field(1, ge=1)
    channels: int = Field(8, ge=1)
    """Of a convolutional tower."""


class MinKeep(Section):
    """The smallest fraction of a site that remains; 0 lets all heads, or all hidden units, of a layer go."""

    head_dim: float = Field(0.2, ge=0, le=1)
    ffn: float = Field(0.1, ge=0, le=1)
    heads: float = Field(0.2, ge=0, le=1)
    channels: float = Field(0.1, ge=0, le=1)


@dataclass(frozen=True)
class _Step:
    site: int
    count: int  # levels
    cost: float
    value: float


def keep_masks(
    sites: Sequence[Site],
    scores: Sequence[Tensor],
    costs: CostModel,
    fraction: float,
    *,
    align: Align,
    min_keep: MinKeep,
    per_cost: bool,
) -> list[Tensor]:
    """Return bool masks [groups, units] whose cost, with what is fixed, is at most `fraction` of the total.

    Steps are taken in the order of their mean score (per cost with `per_cost`), best first, until nothing more fits.
    """
    kept = [_least(site, align, min_keep) for site in sites]
    smallest = costs.fixed + sum(float(curve[least]) for curve, least in zip(costs.curves, kept, strict=True))
    left = fraction * costs.total - smallest
    if left < 0:
        raise RecipeError(
            f"prune.budget: {costs.unit} {fraction:.3f} cannot be met; with these floors and alignments the smallest "
            f"possible is {smallest / costs.total:.3f}. Raise the budget or lower 'min_keep' or 'align'."
        )
    steps: list[_Step] = []
    for index, (site, score, curve) in enumerate(zip(sites, scores, costs.curves, strict=True)):
        ranked = score.double().sort(dim=1, descending=True).values.sum(0)  # [units]: score of the j-th level
        for start in range(kept[index], site.units, stride(site, align)):
            count = min(stride(site, align), site.units - start)
            cost = float(curve[start + count] - curve[start])
            worth = float(ranked[start : start + count].sum())
            value = worth / max(cost, 1e-12) if per_cost else worth / (count * site.groups)
            steps.append(_Step(index, count, cost, value))
    full = set()
    for step in sorted(steps, key=lambda step: -step.value):  # stable: within a site the order stands
        if step.site not in full and step.cost <= left:
            kept[step.site] += step.count
            left -= step.cost
        else:
            full.add(step.site)  # a site never skips a step
    return [_best(score, count) for score, count in zip(scores, kept, strict=True)]


def stride(site: Site, align: Align) -> int:
    """Return in what steps a site's levels are cut."""
    return {"ffn": align.ffn, "heads": align.heads}.get(site.kind, align.head_dim)


def _least(site: Site, align: Align, min_keep: MinKeep) -> int:
    part = {"ffn": min_keep.ffn, "heads": min_keep.heads}.get(site.kind, min_keep.head_dim)
    step = stride(site, align)
    wanted = -(-int(part * site.units + 0.5) // step) * step
    if site.kind not in ("ffn", "heads"):  # a head needs a dim: whole heads are cut as heads
        wanted = max(wanted, step)
    return min(wanted, site.units)


def _best(score: Tensor, count: int) -> Tensor:
    """Mark the `count` best of each row: bool, same shape."""
    order = score.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)
