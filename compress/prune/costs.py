"""Costs of sites: exact parameters and MACs from the shapes, or milliseconds from a measured table."""

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
from clipress.models.parts import cost_name
from clipress.storage import read_json

UPOP_ATTENTION = 36  # as published, for all models, with 1 for a hidden unit; the true ratio is 2 x heads, 16 to 32
HOW_TO_MEASURE = "Measure one on the target: clipress latency-table RUN --out costs.json"


@dataclass(frozen=True)
class CostModel:
    """Costs of a group of sites."""

    unit: str
    """params, macs, latency or upop."""
    curves: list[np.ndarray]
    """Per site, the cost of keeping 0, 1, ... levels."""
    total: float
    """Cost of all uncut blocks in the sites' towers."""
    fixed: float
    """Cost that no site can reduce."""


def cost_model(
    model: nn.Module,
    sites: Sequence[Site],
    unit: str,
    table: dict[str, Any] | None = None,
    upop_attention: float = UPOP_ATTENTION,
) -> CostModel:
    """Return the sites' costs in a unit. Latency is interpolated linearly between the points of a measured table."""
    if unit in ("upop", "latency"):
        curves = [_upop_curve(site, upop_attention) if unit == "upop" else latency_curve(site, table) for site in sites]
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
    """Count the multiply-accumulates of a part for one sample: projections, and the two products of attention."""
    costs = level_costs(part)
    if isinstance(part, Attn):
        return part.module.qk_dim // part.qk_unit * costs["qk"][1] + part.module.v_dim * costs["v"][1]
    return part.hidden * costs["ffn"][1]


def _upop_curve(site: Site, attention: float) -> np.ndarray:
    return np.arange(site.units + 1) * {"attn": float(attention), "ffn": 1.0}[site.kind]


def latency_curve(site: Site, table: dict[str, Any]) -> np.ndarray:
    """Return the milliseconds for keeping 0, 1, ... levels of a site, from a table read by `read_costs`."""
    tower, kind = site.part.tower, cost_name(site.part, site.kind)
    try:
        points = table["towers"][tower][kind]
        levels, times = np.asarray(points["levels"], float), np.asarray(points["ms"], float)
        if not (len(levels) and levels.shape == times.shape == (len(levels),) and np.isfinite(levels + times).all()):
            raise ValueError("levels and milliseconds must be finite and of equal number")
    except (KeyError, TypeError, ValueError):
        raise RecipeError(
            f"prune.budget.costs: expected levels and milliseconds for {kind} in the {tower} tower, the table has none. "
            f"{HOW_TO_MEASURE}"
        ) from None
    if levels[-1] < site.units * site.dims:
        raise RecipeError(
            f"prune.budget.costs: expected up to {site.units * site.dims} {kind} in the {tower} tower, the table ends at "
            f"{levels[-1]:.0f}. It was measured for a different model. {HOW_TO_MEASURE}"
        )
    times = np.maximum.accumulate(times)  # measurement noise must not make a wider layer cheaper
    return np.interp(np.arange(site.units + 1) * site.dims, levels, times - times[0])


def read_costs(path: Path) -> dict[str, Any]:
    """Read a cost table. Raises RecipeError if the file is missing or invalid."""
    try:
        table = read_json(path)
        if table["schema_version"] != 1:
            raise ValueError(f"schema_version {table['schema_version']!r}")
        return table
    except FileNotFoundError:
        raise RecipeError(f"prune.budget.costs: {path} does not exist. {HOW_TO_MEASURE}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"prune.budget.costs: {path} is not a cost table ({error}). {HOW_TO_MEASURE}") from None
