"""Budgets: turn scores and exact costs into keep masks, within one aligned step of the target.

Levels of a site are cut in steps of `align`, so widths stay multiples of it, and never below `min_keep`. All heads of a
layer keep the same number of dims, but each head keeps its own best ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor

from clipress.compress.prune.costs import HOW_TO_MEASURE, UPOP_ATTENTION, CostModel
from clipress.compress.prune.gates import Site
from clipress.errors import RecipeError, nearest
from clipress.recipe import Section

UNITS = ("params", "macs", "latency", "upop")
ABSOLUTE = {"max_params": "params", "max_macs": "macs", "max_ms": "latency"}


class Target(Section):
    """How much may remain: exactly one limit, as a fraction of what the blocks have, or absolute."""

    params: float | None = Field(None, gt=0, lt=1)
    """Fraction of the parameters."""
    macs: float | None = Field(None, gt=0, lt=1)
    """Fraction of the multiply-accumulates."""
    latency: float | None = Field(None, gt=0, lt=1)
    """Fraction of the latency according to a cost table; requires `costs`."""
    upop: float | None = Field(None, gt=0, lt=1)
    """Fraction of UPop's own cost, only to reproduce its runs: 1 per hidden unit and `upop_attention` per attention gate."""
    upop_attention: float = Field(UPOP_ATTENTION, gt=0)
    """UPop's cost of an attention gate. Its code has 36 for every model: q, k and v of 12 heads. For a model with other
    heads, the same rule is 3 x heads."""
    max_params: int | None = Field(None, ge=1)
    """Parameters inside blocks."""
    max_macs: int | None = Field(None, ge=1)
    """Multiply-accumulates inside blocks, for one sample."""
    max_ms: float | None = Field(None, gt=0)
    """Milliseconds inside blocks according to the cost table, at the table's batch size; requires `costs`."""

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
    """One target shared by all towers, or one per tower under the tower's name.

    With a shared target, the search decides how much each tower keeps.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Target] = Field(init=False)
    """Targets by tower. The names are checked against the model's towers when the search starts."""
    costs: Path | None = None
    """Cost table for `latency` and `max_ms`, from `clipress latency-table`."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, raw: Any) -> Any:
        """Raise RecipeError for an unknown key that cannot be a tower, since it holds no target."""
        for key, value in raw.items() if isinstance(raw, Mapping) else ():
            if key not in cls.model_fields and not isinstance(value, Mapping | Target | None):
                raise RecipeError(f"prune.budget: unknown key '{key}'.{nearest(key, cls.model_fields)}")
        if isinstance(raw, Mapping):  # null removes a tower's target
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
            raise RecipeError(f"prune.budget: a latency budget requires 'costs', a cost table. {HOW_TO_MEASURE}")

    @property
    def by_tower(self) -> dict[str, Target]:
        """Targets by tower; empty if all towers share one."""
        return self.__pydantic_extra__ or {}

    def target_of(self, tower: str) -> Target | None:
        """Return the target of a tower, its own or the shared one; None if the tower is not pruned."""
        return self.by_tower.get(tower) if self.by_tower else self

    def targets(self, towers: Sequence[str]) -> list[tuple[tuple[str, ...], Target]]:
        """Return the targets with the towers that share them. Raises RecipeError for towers the model does not have."""
        check_towers(self.by_tower, towers, "prune.budget")
        if not self.by_tower:
            return [(tuple(towers), self)]
        return [((tower,), self.by_tower[tower]) for tower in towers if tower in self.by_tower]


def check_towers(named: Mapping[str, Any], towers: Sequence[str], where: str) -> None:
    """Raise RecipeError if a setting names a tower that the model does not have."""
    for name in named:
        if name not in towers:
            raise RecipeError(f"{where}: expected a tower of this model ({', '.join(towers)}), found '{name}'.")


class Align(Section):
    """Widths are kept at multiples of these. The defaults suit INT8, 2:4 and wide vector units."""

    head_dim: int = Field(8, ge=1)
    ffn: int = Field(32, ge=1)
    heads: int = Field(1, ge=1)
    channels: int = Field(8, ge=1)
    """Channels of a convolutional tower."""


class MinKeep(Section):
    """Minimum fraction of each site to keep; 0 allows removing all heads or all hidden units of a layer."""

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


def smallest_fraction(sites: Sequence[Site], costs: CostModel, align: Align, min_keep: MinKeep) -> float:
    """Return the smallest part of the total cost that `align` and `min_keep` allow."""
    least = (float(curve[_least(site, align, min_keep)]) for site, curve in zip(sites, costs.curves, strict=True))
    return (costs.fixed + sum(least)) / costs.total


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
    """Return bool masks [groups, units] whose cost, including the fixed part, is at most `fraction` of the total.

    Steps are added in order of their mean score (per cost with `per_cost`), best first, until no more fit.
    """
    kept = [_least(site, align, min_keep) for site in sites]
    smallest = smallest_fraction(sites, costs, align, min_keep)
    left = (fraction - smallest) * costs.total
    if left < 0:
        raise RecipeError(
            f"prune.budget: {costs.unit} {fraction:.3f} cannot be met; with these 'min_keep' and 'align' the smallest "
            f"possible is {smallest:.3f}. Raise the budget or lower 'min_keep' or 'align'."
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
    for step in sorted(steps, key=lambda step: -step.value):  # a stable sort keeps the order within a site
        if step.site not in full and step.cost <= left:
            kept[step.site] += step.count
            left -= step.cost
        else:
            full.add(step.site)  # steps of a site cannot be skipped
    return [_best(score, count) for score, count in zip(scores, kept, strict=True)]


def stride(site: Site, align: Align) -> int:
    """Return the step size in which a site's levels are cut."""
    return {"ffn": align.ffn, "heads": align.heads}.get(site.kind, -(-align.head_dim // site.dims))


def _least(site: Site, align: Align, min_keep: MinKeep) -> int:
    fraction = {"ffn": min_keep.ffn, "heads": min_keep.heads}.get(site.kind, min_keep.head_dim)
    # every head keeps at least one step; whole heads are cut by kind `heads`
    return least_width(site.units, fraction, stride(site, align), 0 if site.kind in ("ffn", "heads") else 1)


def least_width(units: int, fraction: float, step: int, steps: int) -> int:
    """Return the smallest width that keeps a fraction of the units: whole steps, at least `steps` of them, or all units."""
    return min(max(-(-int(fraction * units + 0.5) // step), steps) * step, units)


def _best(score: Tensor, count: int) -> Tensor:
    """Return a bool mask of the `count` best scores in each row."""
    order = score.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)
