"""Structured pruning: train with gates, move the masks as the schedule asks, then cut.

`criterion: upop` follows UPop (Shi et al. 2023): its gates, its signed sum, standardisation per kind and soft masks;
`criterion: fisher` is ours. `guide` adds distillation losses while searching (the knowledge-guided variant).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from clipress.compress.losses import weights_of
from clipress.compress.prune.budget import Align, Budget, Floor, block_cost, keep_masks
from clipress.compress.prune.criterion import CRITERIA, Accumulator
from clipress.compress.prune.gates import Gates
from clipress.compress.prune.schedule import progress
from clipress.compress.train import Context, Hook, Training, steps_of, train
from clipress.errors import ClipressError
from clipress.models import surgery
from clipress.models.anatomy import counts
from clipress.models.load import Clip


class Prune(Training):
    """Settings of `prune`."""

    budget: Budget
    criterion: Literal["fisher", "taylor", "upop"] = "fisher"
    losses: dict[str, float] | tuple[str, ...] = ("contrastive",)
    """The task loss; scores come from its gradient and the guide's."""
    guide: dict[str, float] | tuple[str, ...] = ()
    """Distillation losses during the search."""
    schedule: Literal["sine", "cubic", "one-shot"] = "cubic"
    interval: int = Field(10, ge=1)
    """Steps between updates of the masks."""
    frozen: float = Field(0.2, ge=0, lt=1)
    """Last part of the search in which the masks stay."""
    align: Align = Align()
    floor: Floor = Floor()
    lr: float = Field(2e-4, ge=0)

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        weights_of(self.losses, "prune.losses")
        weights_of(self.guide, "prune.guide")


class Search(Hook):
    """Accumulate scores, and set the masks when it is time."""

    def __init__(self, gates: Gates, settings: Prune, total: int, fixed: int, steps: int, reduce: Callable) -> None:
        self.gates, self.settings, self.steps, self.reduce = gates, settings, steps, reduce
        self.criterion = CRITERIA[settings.criterion]
        self.seen = Accumulator(self.criterion, gates.sites)
        self.unit = "params" if settings.budget.params is not None else "macs"
        self.target = getattr(settings.budget, self.unit)
        self.total, self.fixed = total, fixed
        self.updates = 0
        self._masks(
            [torch.ones_like(site.mask) for site in gates.sites], self.target
        )  # an impossible budget says so now

    def before(self, step: int) -> None:
        self.gates.clear()

    def after_backward(self, step: int) -> None:
        self.seen.add()

    def after_update(self, step: int) -> None:
        due = progress(self.settings.schedule, step, self.steps, self.settings.frozen)
        last_due = progress(self.settings.schedule, step - 1, self.steps, self.settings.frozen) if step else 0.0
        moving = due < 1.0 and (step + 1) % self.settings.interval == 0
        if moving or (due == 1.0 and last_due < 1.0) or (due == 1.0 and not self.updates):
            self.update(due)

    @torch.no_grad()
    def update(self, due: float) -> None:
        """Set every mask for the part of the pruning that is due."""
        scores = self.seen.scores(self.reduce)
        if not self.criterion.reversible:
            scores = [s.masked_fill(site.mask == 0, 0.0) for s, site in zip(scores, self.gates.sites, strict=True)]
        fraction = 1 - due * (1 - self.target)
        # UPop's soft masks: a unit to be cut sinks from 1 to 0 as the schedule goes on
        cut_value = 1 - due if self.criterion.reversible else 0.0
        for site, keep in zip(self.gates.sites, self._masks(scores, fraction), strict=True):
            site.mask = torch.where(keep, 1.0, cut_value)
        self.updates += 1

    def _masks(self, scores: list[Tensor], fraction: float) -> list[Tensor]:
        return keep_masks(
            self.gates.sites,
            scores,
            fraction=fraction,
            unit=self.unit,
            total=self.total,
            fixed=self.fixed,
            align=self.settings.align,
            floor=self.settings.floor,
            per_cost=self.criterion.per_cost,
        )


def run(settings: Prune, clip: Clip, context: Context) -> tuple[Clip, dict[str, Any]]:
    """Search and cut. The result computes what the masked model computed."""
    weights = weights_of(settings.losses, "prune.losses") | weights_of(settings.guide, "prune.guide")
    fabric = context.fabric
    clip.model.to(fabric.device)
    gates = Gates(clip.model, CRITERIA[settings.criterion].space)
    unit = "params" if settings.budget.params is not None else "macs"
    total, fixed = block_cost(clip.model, gates.sites, unit)
    before = counts(clip.model)["block_params"]

    def reduce(total: Tensor) -> Tensor:
        return total if fabric.world_size == 1 else fabric.all_reduce(total, reduce_op="sum")

    search = Search(gates, settings, total, fixed, steps_of(settings, context), reduce)
    details = train(clip, settings, weights, context, [search])
    if not search.updates or any(((site.mask != 0) & (site.mask != 1)).any() for site in gates.sites):
        raise ClipressError(f"prune: the search ended before its masks were final (updates: {search.updates}).")
    for block, keep in gates.keeps().values():
        surgery.cut(block, keep)
    gates.remove()
    kept = counts(clip.model)["block_params"] / before
    return clip, details | {
        "criterion": settings.criterion,
        "mask_updates": search.updates,
        "samples_left_out": search.seen.left_out,
        "block_params_kept": round(kept, 4),
        "shapes": surgery.shapes(clip.model),
    }
