"""Structured pruning: train with gates, move the masks as the schedule asks, then cut.

`criterion: upop` follows UPop (Shi et al. 2023): its gates, its signed sum, standardisation per kind and soft masks;
`criterion: fisher` is ours. `guide` adds distillation losses while searching (the knowledge-guided variant).

A convolutional image tower is scored during the same search and cut at its end (`convnets.py`); a limit for both towers
together then holds for each by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from clipress.compress.calibration import outputs_of
from clipress.compress.context import Context, steps_of
from clipress.compress.hook import Hook
from clipress.compress.losses import Losses, terms_from
from clipress.compress.prune.budget import Align, Budget, Floor, cost_curves, keep_masks, read_costs, stride
from clipress.compress.prune.convnets import ConvPruning
from clipress.compress.prune.criterion import CRITERIA, Accumulator
from clipress.compress.prune.gates import Gates, Site
from clipress.compress.prune.schedule import progress
from clipress.compress.settings import Training
from clipress.compress.stage import stage
from clipress.compress.train import train
from clipress.errors import ClipressError, RecipeError
from clipress.models import convnets, surgery
from clipress.models.anatomy import counts
from clipress.models.load import Model
from clipress.recipe import Section
from clipress.tasks import task_named

log = logging.getLogger("clipress.prune")
Kind = Literal["heads", "qk", "v", "ffn"]


class Sites(Section):
    """What may be cut, per tower; an empty list leaves a tower alone."""

    image: tuple[Kind, ...] = ("qk", "v", "ffn")
    text: tuple[Kind, ...] = ("qk", "v", "ffn")

    def model_post_init(self, _: Any) -> None:
        for tower, kinds in (("image", self.image), ("text", self.text)):
            if "heads" in kinds and {"qk", "v"} & set(kinds):
                raise RecipeError(
                    f"prune.sites.{tower}: heads and dims of heads cannot be searched together, for the worth and cost of "
                    "one depend on the other. Prune heads in one stage and dims in another."
                )


class Prune(Training):
    """Settings of `prune`."""

    budget: Budget
    sites: Sites = Sites()
    criterion: Literal["fisher", "taylor", "gauss-newton", "upop", "magnitude", "random"] = "fisher"
    losses: Losses = ("contrastive",)
    """The task loss; scores come from its gradient and the guide's."""
    guide: Losses = ()
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
        terms_from(self.losses, "prune.losses")
        terms_from(self.guide, "prune.guide")
        if self.criterion != "upop" and any(limit.unit == "upop" for _, limit in self.budget.limits()):
            raise RecipeError("prune.budget: 'upop' counts gates of criterion upop alone. Use params, macs or latency.")


@dataclass(frozen=True)
class Goal:
    """One limit and the sites that share it; indices into all sites."""

    members: list[int]
    curves: list[np.ndarray]
    unit: str
    target: float  # fraction
    total: float
    fixed: float


def goals_of(model: Model, sites: Sequence[Site], budget: Budget) -> list[Goal]:
    """Work out what each limit means for this model. Raises RecipeError when there is nothing to cut under it."""
    table = read_costs(budget.costs) if budget.costs is not None else None
    goals = []
    for towers, limit in budget.limits():
        members = [i for i, site in enumerate(sites) if site.block.tower in towers]
        if not members and convnets.is_convnet(model.module) and "image" in towers:
            continue
        if not members:
            raise RecipeError(f"prune: nothing of the {' and '.join(towers)} tower may be cut; look at 'sites'.")
        curves, total, fixed = cost_curves(model.module, [sites[i] for i in members], limit.unit, table)
        goals.append(Goal(members, curves, limit.unit, limit.fraction(total), total, fixed))
    return goals


class Search(Hook):
    """Accumulate scores, and set the masks when it is time."""

    def __init__(self, model: Model, gates: Gates, settings: Prune, steps: int, seed: int, reduce: Callable) -> None:
        self.model, self.gates, self.settings, self.steps, self.reduce = model, gates, settings, steps, reduce
        self.criterion = CRITERIA[settings.criterion]
        self.seen = Accumulator(self.criterion, gates.sites, seed)
        self.goals = goals_of(model, gates.sites, settings.budget)
        self.updates, self.seed = 0, seed
        self._masks([torch.ones_like(site.mask) for site in gates.sites], 1.0)  # an impossible budget says so now
        for site in gates.sites:
            step = stride(site, settings.align)
            if site.units % step:
                log.warning(
                    "%s has %d units, which is no multiple of align (%d): it keeps them all or a multiple of %d.",
                    *(site.name, site.units, step, step),
                )

    def before(self, step: int, arrays: Mapping[str, Tensor]) -> None:
        if self.criterion.probe:
            self._probe(step, arrays)
        self.gates.clear()

    def after_part(self, step: int) -> None:
        if not self.criterion.probe:
            self.seen.add()
            self.gates.clear()

    def _probe(self, step: int, arrays: Mapping[str, Tensor]) -> None:
        """Accumulate gradients of random projections of every graph's output; the weights' own gradients are not touched."""
        self.gates.clear()
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        task = task_named(self.model.task)
        outputs = outputs_of(task, self.model.module, task.inputs_of(arrays)).values()
        signs = [(torch.randint(0, 2, y.shape, generator=generator) * 2 - 1).to(y) for y in outputs]
        projected = sum((y * sign).sum() for y, sign in zip(outputs, signs, strict=True))
        copies = [copy for site in self.gates.sites for copy in site.copies]
        for copy, gradient in zip(copies, torch.autograd.grad(projected, copies), strict=True):
            copy.grad = gradient
        self.seen.add()

    def state(self) -> dict[str, Any]:
        masks = [site.mask for site in self.gates.sites]
        return {"masks": masks, "sums": self.seen.sums, "left_out": self.seen.left_out, "updates": self.updates}

    def load_state(self, state: dict[str, Any]) -> None:
        for site, mask in zip(self.gates.sites, state["masks"], strict=True):
            site.mask = mask.to(site.mask)
        self.seen.sums = [
            total.to(site.mask.device) for total, site in zip(state["sums"], self.gates.sites, strict=True)
        ]
        self.seen.left_out, self.updates = state["left_out"], state["updates"]

    def moves(self, step: int) -> bool:
        due, last_due = self._due(step), self._due(step - 1) if step else 0.0
        if due == 1.0:  # once; again only if every step before was skipped
            return last_due < 1.0 or not self.updates
        return (step + 1) % self.settings.interval == 0

    def after_update(self, step: int) -> None:
        if self.moves(step):
            self.update(self._due(step))

    def _due(self, step: int) -> float:
        return progress(self.settings.schedule, step, self.steps, self.settings.frozen)

    @torch.no_grad()
    def update(self, due: float) -> None:
        """Set every mask for the part of the pruning that is due."""
        sites, reversible = self.gates.sites, self.criterion.reversible
        scores = self.seen.scores(self.reduce)
        if not reversible:
            scores = [score.masked_fill(site.mask == 0, 0.0) for score, site in zip(scores, sites, strict=True)]
        # UPop's soft masks: a unit to be cut sinks from 1 to 0 as the schedule goes on
        cut_value = 1 - due if reversible else 0.0
        for site, keep in zip(sites, self._masks(scores, due), strict=True):
            site.mask = torch.where(keep, 1.0, cut_value)
        self.updates += 1

    def _masks(self, scores: list[Tensor], due: float) -> list[Tensor]:
        masks: list[Tensor | None] = [None] * len(scores)
        for goal in self.goals:
            kept = keep_masks(
                [self.gates.sites[i] for i in goal.members],
                [scores[i] for i in goal.members],
                goal.curves,
                unit=goal.unit,
                fraction=1 - due * (1 - goal.target),
                total=goal.total,
                fixed=goal.fixed,
                align=self.settings.align,
                floor=self.settings.floor,
                per_cost=self.criterion.per_cost,
            )
            for index, mask in zip(goal.members, kept, strict=True):
                masks[index] = mask
        return [
            torch.ones_like(score, dtype=torch.bool) if m is None else m for m, score in zip(masks, scores, strict=True)
        ]


@stage(
    "prune",
    Prune,
    makes="pruned",
    never_after={
        "sparsify": "cutting units would break the 2:4 pattern",
        "quantize": "INT8 scales belong to uncut layers",
    },
)
def run(settings: Prune, model: Model, context: Context) -> tuple[Model, dict[str, Any]]:
    """Search and cut. The result computes what the masked model computed."""
    terms = terms_from(settings.losses, "prune.losses") | terms_from(settings.guide, "prune.guide")
    fabric = context.fabric
    model.module.to(fabric.device)
    gates = Gates(model.module, CRITERIA[settings.criterion].space, settings.sites.model_dump())
    before = counts(model.module)["block_params"]

    def reduce(total: Tensor) -> Tensor:
        return total if fabric.world_size == 1 else fabric.all_reduce(total, reduce_op="sum")

    search = None
    if gates.sites:
        search = Search(model, gates, settings, steps_of(settings, context), context.seed, reduce)
    channels = _convolutional(settings, model, context)
    hooks: list[Hook] = [hook for hook in (search, channels) if hook is not None]
    if not hooks:
        raise RecipeError("prune: 'sites' leaves nothing that may be cut.")
    details = train(model, settings, terms, context, hooks)
    if search is not None:
        _refuse_unfinished(search, details)
        details |= {"mask_updates": search.updates, "samples_left_out": search.seen.left_out}
    for block, keep in gates.keeps():
        surgery.cut(block, keep)
    gates.remove()
    if channels is not None:
        details |= channels.cut()
    kept = counts(model.module)["block_params"] / before
    shapes = surgery.shapes(model.module)
    return model, details | {"criterion": settings.criterion, "block_params_kept": round(kept, 4), "shapes": shapes}


def _convolutional(settings: Prune, model: Model, context: Context) -> ConvPruning | None:
    """Return what scores and cuts the image tower when it is convolutional and may be cut."""
    limit = settings.budget.image or (settings.budget if settings.budget.text is None else None)
    if limit is None or not settings.sites.image or not convnets.is_convnet(model.module):
        return None
    align, floor = settings.align.channels, settings.floor.channels
    return ConvPruning(model.module, settings.criterion, limit, align=align, floor=floor, seed=context.seed)


def _refuse_unfinished(search: Search, details: dict[str, Any]) -> None:
    between = any(((site.mask != 0) & (site.mask != 1)).any() for site in search.gates.sites)
    if not search.updates or between:
        raise ClipressError(
            f"prune: the search ended before its masks were final ({search.updates} updates, "
            f"{details['skipped_steps']} steps skipped). Give it more steps."
        )
