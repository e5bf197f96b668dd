"""Budgets: from scores and exact costs to a keep-mask, within one aligned step of the target.

Within a site levels are cut in steps of `align` (so widths stay multiples of it) and never below the floor. Every head
keeps as many dims as the others; which ones, each head chooses by its own scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from clipress.compress.prune.gates import Site
from clipress.errors import RecipeError
from clipress.models import anatomy
from clipress.recipe import Section
from clipress.storage import read_json

UNITS = ("params", "macs", "latency", "upop")
UPOP_COSTS = {"attn": 36, "ffn": 1}  # as published, for every model; true costs are 16 to 32 to 1


class Limit(Section):
    """What may stay: exactly one, as a fraction of what the blocks have or as an absolute."""

    params: float | None = Field(None, gt=0, lt=1)
    macs: float | None = Field(None, gt=0, lt=1)
    latency: float | None = Field(None, gt=0, lt=1)
    """Of the time a cost table says; needs `costs`."""
    upop: float | None = Field(None, gt=0, lt=1)
    """Of UPop's own count, 36 for a gate of attention and 1 for a hidden unit: only to repeat its published runs."""
    max_params: int | None = Field(None, ge=1)
    """Parameters inside blocks."""
    max_macs: int | None = Field(None, ge=1)
    """Multiply-accumulates inside blocks, of one image and one text."""
    max_ms: float | None = Field(None, gt=0)
    """Milliseconds inside blocks, by the cost table, at the table's batch."""

    def given(self) -> list[str]:
        """Return which limits are set."""
        names = (*UNITS, "max_params", "max_macs", "max_ms")
        return [name for name in names if getattr(self, name) is not None]

    @property
    def unit(self) -> str:
        """Return params, macs, latency or upop."""
        return {"max_params": "params", "max_macs": "macs", "max_ms": "latency"}.get(self.given()[0], self.given()[0])

    def fraction(self, total: float) -> float:
        """Return the limit as a fraction of `total`."""
        name = self.given()[0]
        value = getattr(self, name)
        return value if name in UNITS else min(value / total, 1.0)


class Budget(Limit):
    """One limit for both towers, whose shares the search finds; or one for each tower."""

    image: Limit | None = None
    text: Limit | None = None
    costs: Path | None = None
    """The cost table of `latency`: made by `clipress bench costs`."""

    def model_post_init(self, _: object) -> None:
        towers = [tower for tower in (self.image, self.text) if tower is not None]
        limits = towers or [self]
        if (towers and self.given()) or any(len(limit.given()) != 1 for limit in limits):
            raise RecipeError(
                "prune.budget: exactly one of params, macs, latency, max_params, max_macs, max_ms is asked for, for both "
                "towers together or for each tower under 'image' and 'text'."
            )
        if any(limit.unit == "latency" for limit in limits) and self.costs is None:
            raise RecipeError(
                "prune.budget: a latency budget needs 'costs', a table measured on the target. "
                "Make it with: clipress bench costs RUN --out costs.json"
            )

    def limits(self) -> list[tuple[tuple[str, ...], Limit]]:
        """Return which towers share which limit."""
        if self.image is None and self.text is None:
            return [(anatomy.TOWERS, self)]
        return [((name,), limit) for name, limit in (("image", self.image), ("text", self.text)) if limit is not None]


class Align(Section):
    """Widths stay multiples of these; 8 and 32 suit INT8, 2:4 and wide vector units."""

    head_dim: int = Field(8, ge=1)
    ffn: int = Field(32, ge=1)
    heads: int = Field(1, ge=1)
    channels: int = Field(8, ge=1)
    """Of a convolutional image tower."""


class Floor(Section):
    """Smallest part of a site that stays; 0 lets all heads, or all hidden units, of a layer go."""

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
    curves: Sequence[np.ndarray],
    *,
    unit: str,
    fraction: float,
    total: float,
    fixed: float,
    align: Align,
    floor: Floor,
    per_cost: bool,
) -> list[Tensor]:
    """Return bool masks [groups, units] whose cost, with what is fixed, is at most `fraction * total`.

    curves: per site, what keeping 0, 1, ... levels costs; total: what all blocks cost now; fixed: what cannot be cut.
    Steps are taken in the order of their mean score (per cost where asked), best first, until nothing more fits.
    """
    kept = [_least(site, align, floor) for site in sites]
    smallest = fixed + sum(float(curve[least]) for curve, least in zip(curves, kept, strict=True))
    left = fraction * total - smallest
    if left < 0:
        raise RecipeError(
            f"prune.budget: {unit} {fraction:.3f} was asked for; with these floors and alignments the smallest possible "
            f"is {smallest / total:.3f}. Raise the budget or lower 'floor' or 'align'."
        )
    steps: list[_Step] = []
    for index, (site, score, curve) in enumerate(zip(sites, scores, curves, strict=True)):
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


def _least(site: Site, align: Align, floor: Floor) -> int:
    part = {"ffn": floor.ffn, "heads": floor.heads}.get(site.kind, floor.head_dim)
    step = stride(site, align)
    wanted = -(-int(part * site.units + 0.5) // step) * step
    if site.kind not in ("ffn", "heads"):  # a head without dims is no head: whole heads go as heads
        wanted = max(wanted, step)
    return min(wanted, site.units)


def _best(score: Tensor, count: int) -> Tensor:
    """Mark the `count` best of each row: bool, same shape."""
    order = score.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)


def cost_curves(
    model: nn.Module, sites: Sequence[Site], unit: str, table: dict[str, Any] | None = None
) -> tuple[list[np.ndarray], float, float]:
    """Return per site what keeping 0, 1, ... levels costs, the total of the sites' blocks, and what no site can cut.

    params and macs are exact, from the shapes; latency is read from a table, between its measured points in straight lines.
    """
    if unit == "upop":
        curves = [np.arange(site.units + 1) * float(UPOP_COSTS[site.kind]) for site in sites]
        return curves, sum(float(curve[-1]) for curve in curves), 0.0
    if unit == "latency":
        curves = [_measured(site, table) for site in sites]
        return curves, sum(float(curve[-1]) for curve in curves), 0.0
    curves = [np.arange(site.units + 1) * float(getattr(site, unit)) for site in sites]
    prunable = sum(float(curve[-1]) for curve in curves)
    towers = {site.block.tower for site in sites}
    blocks = [block for block in anatomy.blocks(model) if block.tower in towers]
    if unit == "macs":
        total = float(sum(block_macs(block) for block in blocks))
    else:
        total = float(sum(p.numel() for block in blocks for p in block.module.parameters()))
    return curves, total, total - prunable


def block_macs(block: anatomy.Block) -> int:
    """Count multiply-accumulates of one block on one sample: projections, attention's two products, feed-forward."""
    attn, d, n = block.attn, block.width, block.tokens
    attention = attn.heads * (attn.qk_dim + attn.v_dim) * (2 * d * n + n * n)
    return attention + 2 * d * n * block.ffn_in.out_features


def _measured(site: Site, table: dict[str, Any]) -> np.ndarray:
    try:
        points = table["towers"][site.block.tower][site.kind]
        levels, times = np.asarray(points["levels"], float), np.asarray(points["ms"], float)
        if not (len(levels) and levels.shape == times.shape == (len(levels),) and np.isfinite(levels + times).all()):
            raise ValueError("levels and milliseconds do not go together")
    except (KeyError, TypeError, ValueError):
        raise RecipeError(
            f"prune.budget.costs: the table says nothing of {site.kind} in the {site.block.tower} tower. "
            "Measure it for this model: clipress bench costs RUN --out costs.json"
        ) from None
    if levels[-1] < site.units:
        raise RecipeError(
            f"prune.budget.costs: the table goes to {levels[-1]:.0f} {site.kind} in the {site.block.tower} tower, the "
            f"model has {site.units}: it was measured for another one. Do: clipress bench costs RUN --out costs.json"
        )
    times = np.maximum.accumulate(times)  # noise must not make a wider layer cheaper
    return np.interp(np.arange(site.units + 1), levels, times - times[0])


def read_costs(path: Path) -> dict[str, Any]:
    """Read a cost table."""
    try:
        table = read_json(path)
        if table["schema_version"] != 1:
            raise ValueError(f"schema_version {table['schema_version']!r}")
        return table
    except FileNotFoundError:
        raise RecipeError(
            f"prune.budget.costs: {path} was asked for, and there is no such file. "
            "Make it with: clipress bench costs RUN --out costs.json"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"prune.budget.costs: {path} is no cost table ({error}).") from None
