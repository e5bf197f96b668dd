"""What sites cost: parameters and MACs exactly from the shapes, or milliseconds from a measured table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from clipress.compress.prune.gates import Site, level_costs
from clipress.errors import RecipeError
from clipress.models import anatomy
from clipress.models.anatomy import Attn, Part
from clipress.storage import read_json

UPOP_COSTS = {"attn": 36, "ffn": 1}  # as published, for every model; true costs are 16 to 32 to 1
HOW_TO_MEASURE = "Measure one on the target: clipress latency-table RUN --out costs.json"


@dataclass(frozen=True)
class CostModel:
    """What a group of sites costs."""

    unit: str
    """params, macs, latency or upop."""
    curves: list[np.ndarray]
    """Per site: what keeping 0, 1, ... levels costs."""
    total: float
    """What all blocks of the sites' towers cost uncut."""
    fixed: float
    """What no site can cut."""


def cost_model(model: nn.Module, sites: Sequence[Site], unit: str, table: dict[str, Any] | None = None) -> CostModel:
    """Return what the sites cost in a unit; latency is read from a table, linearly between its measured points."""
    if unit in ("upop", "latency"):
        curves = [_upop_curve(site) if unit == "upop" else latency_curve(site, table) for site in sites]
        return CostModel(unit, curves, sum(float(curve[-1]) for curve in curves), 0.0)
    curves = [np.arange(site.units + 1) * float(getattr(site, unit)) for site in sites]
    towers = {site.part.tower for site in sites}
    if unit == "macs":
        total = float(sum(part_macs(part) for part in anatomy.parts(model) if part.tower in towers))
    else:
        inside = [block.module for block in anatomy.blocks(model) if block.tower in towers]
        total = float(sum(p.numel() for module in inside for p in module.parameters()))
    return CostModel(unit, curves, total, total - sum(float(curve[-1]) for curve in curves))


def part_macs(part: Part) -> int:
    """Count multiply-accumulates of one part on one sample: projections, and attention's two products."""
    costs = level_costs(part)
    if isinstance(part, Attn):
        return part.module.qk_dim * costs["qk"][1] + part.module.v_dim * costs["v"][1]
    return part.hidden * costs["ffn"][1]


def _upop_curve(site: Site) -> np.ndarray:
    return np.arange(site.units + 1) * float(UPOP_COSTS[site.kind])


def latency_curve(site: Site, table: dict[str, Any]) -> np.ndarray:
    """Return the milliseconds that keeping 0, 1, ... levels of a site costs, by a table from `read_costs`."""
    tower, kind = site.part.tower, site.kind
    try:
        points = table["towers"][tower][kind]
        levels, times = np.asarray(points["levels"], float), np.asarray(points["ms"], float)
        if not (len(levels) and levels.shape == times.shape == (len(levels),) and np.isfinite(levels + times).all()):
            raise ValueError("levels and milliseconds differ in number, or are not finite")
    except (KeyError, TypeError, ValueError):
        raise RecipeError(
            f"prune.budget.costs: expected levels and milliseconds of {kind} in the {tower} tower, the table has none. "
            f"{HOW_TO_MEASURE}"
        ) from None
    if levels[-1] < site.units:
        raise RecipeError(
            f"prune.budget.costs: expected up to {site.units} {kind} in the {tower} tower, the table ends at "
            f"{levels[-1]:.0f}: it was measured for another model. {HOW_TO_MEASURE}"
        )
    times = np.maximum.accumulate(times)  # noise must not make a wider layer cheaper
    return np.interp(np.arange(site.units + 1), levels, times - times[0])


def read_costs(path: Path) -> dict[str, Any]:
    """Read a cost table. Raises RecipeError for a file that is missing or no cost table."""
    try:
        table = read_json(path)
        if table["schema_version"] != 1:
            raise ValueError(f"schema_version {table['schema_version']!r}")
        return table
    except FileNotFoundError:
        raise RecipeError(f"prune.budget.costs: {path} does not exist. {HOW_TO_MEASURE}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"prune.budget.costs: {path} is no cost table ({error}). {HOW_TO_MEASURE}") from None
