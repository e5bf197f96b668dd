"""The `prune` stage: rotate, train with gates, update the masks along a schedule, cut, refit.

With `steps: 0` nothing is trained: units are scored on calibration batches (`scoring.py`), and what remains is refitted in
closed form (`refit.py`).

`criterion: upop` follows UPop (Shi et al. 2023): its gates, signed sum, standardization per kind and soft masks;
`criterion: fisher` is ours. `distill_losses` adds distillation losses to the search (the knowledge-guided variant).

A convolutional tower is scored during the same search and cut at the end (`convnets.py`); in that case a target shared by
all towers applies to each of them separately.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clipress.compress.calibration import Calibration, outputs_of, random_projection
from clipress.compress.context import Context
from clipress.compress.fabric import Reduce, all_sum
from clipress.compress.hook import Hook
from clipress.compress.losses import terms_from
from clipress.compress.names import MAKES
from clipress.compress.prune.budget import Budget, keep_masks, smallest_fraction, stride
from clipress.compress.prune.convnets import ConvPruning
from clipress.compress.prune.costs import CostModel, cost_model, read_costs
from clipress.compress.prune.criterion import CRITERIA, Accumulator
from clipress.compress.prune.cutting import cut_parts
from clipress.compress.prune.gates import DEFAULT_KINDS, Gates, Site, sites
from clipress.compress.prune.module_error import SAMPLES
from clipress.compress.prune.rotate import rotate
from clipress.compress.prune.schedule import progress
from clipress.compress.prune.scoring import score_units
from clipress.compress.prune.settings import Prune
from clipress.compress.prune.vocabulary import shrink
from clipress.compress.stage import Details, stage
from clipress.compress.train import train
from clipress.errors import ClipressError, RecipeError
from clipress.models import anatomy, convnets, surgery
from clipress.models.anatomy import Attn
from clipress.models.load import Model
from clipress.tasks import task_named

log = logging.getLogger("clipress.prune")


@dataclass(frozen=True)
class BudgetGroup:
    """The sites that share a target, as indices into all sites."""

    members: list[int]
    costs: CostModel
    target: float
    """Fraction of the total cost."""


def groups_of(model: Model, sites: Sequence[Site], budget: Budget) -> list[BudgetGroup]:
    """Resolve the targets of a budget for a model. Raises RecipeError if a target has no sites to cut."""
    table = read_costs(budget.costs) if budget.costs is not None else None
    groups = []
    for towers, target in budget.targets(anatomy.towers(model.module)):
        members = [i for i, site in enumerate(sites) if site.part.tower in towers]
        if not members and convnets.is_convnet(model.module) and convnets.TOWER in towers:
            continue
        if not members:
            raise RecipeError(
                f"prune.sites: expected something to cut in the {' and '.join(towers)} tower, found nothing. Remove the "
                "tower's target, or allow kinds of sites in it."
            )
        costs = cost_model(model.module, [sites[i] for i in members], target.unit, table, target.upop_attention)
        groups.append(BudgetGroup(members, costs, target.fraction(costs.total)))
    return groups


def smallest_budget(settings: Prune, model: Model) -> float:
    """Return the smallest fraction that the budget's unit may be set to, for all towers together."""
    found = sites(model.module, CRITERIA[settings.criterion].space, settings.sites)
    (group,) = groups_of(model, found, settings.budget)
    return smallest_fraction([found[i] for i in group.members], group.costs, settings.align, settings.min_keep)


class Search(Hook):
    """Accumulate scores and update the masks along the schedule."""

    only_finite = False

    def __init__(self, model: Model, gates: Gates, settings: Prune, steps: int, seed: int, reduce: Callable) -> None:
        self.model, self.gates, self.settings, self.steps, self.reduce = model, gates, settings, steps, reduce
        self.criterion = CRITERIA[settings.criterion]()
        self.seen = Accumulator(self.criterion, gates.sites, seed)
        gates.handles += self.seen.handles
        self.groups = groups_of(model, gates.sites, settings.budget)
        self.updates, self.seed = 0, seed
        self.update_every = settings.update_every or max(min(10, steps // 10), 1)
        self._masks([torch.ones_like(site.mask) for site in gates.sites], 1.0)  # fail early if the budget is impossible
        for site in gates.sites:
            step = stride(site, settings.align)
            if site.units % step:
                log.warning(
                    "%s has %d units, which is not a multiple of align (%d): it keeps all of them, or a multiple of %d.",
                    *(site.name, site.units, step, step),
                )

    def before(self, step: int, arrays: Mapping[str, Tensor]) -> None:
        if self.criterion.probe:
            self._probe(step, arrays)
        if self.criterion.measures and self.moves(step):
            self._measure(arrays)
        if self.criterion.forgets:
            self.seen.clear()
        self.gates.clear()

    def after_part(self, step: int, finite: Tensor) -> None:
        if not self.criterion.probe:
            self.seen.add(finite)
            self.gates.clear()

    def _probe(self, step: int, arrays: Mapping[str, Tensor]) -> None:
        """Accumulate gradients of random projections of all graph outputs, without touching the weights' gradients."""
        self.gates.clear()
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        task = task_named(self.model.task)
        outputs = outputs_of(task, self.model.module, task.inputs_of(arrays)).values()
        projected = sum(random_projection(y, generator) for y in outputs)
        rows = len(arrays["group"])  # a tower without samples has no copies
        copies = [site.copies[rows] for site in self.gates.sites if rows in site.copies]
        for copy, gradient in zip(copies, torch.autograd.grad(projected, copies, allow_unused=True), strict=True):
            copy.grad = gradient
        self.seen.add()

    def _measure(self, arrays: Mapping[str, Tensor]) -> None:
        """Score the units by what the embeddings of the first samples lose without them."""
        task, sites = task_named(self.model.task), self.gates.sites
        samples = task.inputs_of({name: rows[:SAMPLES] for name, rows in arrays.items()})

        def embed(tower: str) -> Tensor:
            graph = task.graph_of(tower)
            return outputs_of(task, self.model.module, {graph: samples[graph]})[graph]

        errors = self.criterion.measure(sites, [stride(site, self.settings.align) for site in sites], embed)
        self.criterion.measured = {site.name: self.reduce(error) for site, error in zip(sites, errors, strict=True)}

    def state(self) -> dict[str, Any]:
        masks = [site.mask for site in self.gates.sites]
        return {"masks": masks, "sums": self.seen.sums, "left_out": int(self.seen.left_out), "updates": self.updates}

    def load_state(self, state: dict[str, Any]) -> None:
        for site, mask in zip(self.gates.sites, state["masks"], strict=True):
            site.mask = mask.to(site.mask)
        self.seen.sums = [
            total.to(site.mask.device) for total, site in zip(state["sums"], self.gates.sites, strict=True)
        ]
        self.seen.left_out = self.seen.left_out.new_tensor(int(state["left_out"]))
        self.updates = state["updates"]

    def moves(self, step: int) -> bool:
        due, last_due = self._due(step), self._due(step - 1) if step else 0.0
        if due == 1.0:  # update once, and again only if all earlier steps were skipped
            return last_due < 1.0 or not self.updates
        return (step + 1) % self.update_every == 0

    def after_update(self, step: int) -> None:
        if self.moves(step):
            self.update(self._due(step))

    def _due(self, step: int) -> float:
        return progress(self.settings.schedule, step, self.steps, self.settings.final_fraction)

    @torch.no_grad()
    def update(self, due: float) -> None:
        """Set all masks for the fraction of the pruning that is due."""
        sites, reversible = self.gates.sites, self.criterion.reversible
        scores = self.seen.scores(self.reduce)
        if not reversible:
            scores = [score.masked_fill(site.mask == 0, 0.0) for score, site in zip(scores, sites, strict=True)]
        # With UPop's soft masks, units to be cut decrease from 1 to 0 along the schedule.
        cut_value = 1 - due if reversible else 0.0
        for site, keep in zip(sites, self._masks(scores, due), strict=True):
            site.mask = torch.where(keep, 1.0, cut_value)
        self.updates += 1

    def _masks(self, scores: list[Tensor], due: float) -> list[Tensor]:
        masks: list[Tensor | None] = [None] * len(scores)
        for group in self.groups:
            kept = keep_masks(
                [self.gates.sites[i] for i in group.members],
                [scores[i] for i in group.members],
                group.costs,
                1 - due * (1 - group.target),
                align=self.settings.align,
                min_keep=self.settings.min_keep,
                per_cost=self.criterion.per_cost,
            )
            for index, mask in zip(group.members, kept, strict=True):
                masks[index] = mask
        return [
            torch.ones_like(score, dtype=torch.bool) if m is None else m for m, score in zip(masks, scores, strict=True)
        ]


@stage(
    "prune",
    Prune,
    makes=MAKES["prune"],
    never_after={
        "sparsify": "cutting units would break the 2:4 pattern",
        "quantize": "the INT8 scales were calibrated for the uncut layers",
    },
)
def run(settings: Prune, model: Model, context: Context) -> tuple[Model, dict[str, Any]]:
    """Search, cut and refit. Until it is refitted, the cut model computes the same outputs as the masked one."""
    shrunk: dict[str, Any] = {}
    if settings.vocabulary is not None:
        model, shrunk = shrink(settings.vocabulary, model, context)
    if settings.budget is None:
        return model, shrunk
    settings.check_towers(anatomy.towers(model.module))
    fabric = context.fabric
    model.module.to(fabric.device)
    before = anatomy.counts(model.module)["block_params"]
    reduce = partial(all_sum, fabric=fabric)
    if settings.rotate:
        rotate_heads(settings, model, context)
    gates = Gates(model.module, CRITERIA[settings.criterion].space, settings.sites)
    details = _search(settings, model, context, gates, reduce)
    masks = {part.name: mask for part, mask in gates.part_masks()}
    gates.remove()
    details |= cut_parts(settings, model, context, masks, reduce)
    kept = anatomy.counts(model.module)["block_params"] / before
    shapes = surgery.shapes(model.module)
    details |= shrunk
    return model, details | {"criterion": settings.criterion, "block_params_kept": round(kept, 4), "shapes": shapes}


def rotate_heads(settings: Prune, model: Model, context: Context) -> None:
    """Turn the heads that may be cut to their principal directions on calibration items, in place."""
    cuttable = sites(model.module, CRITERIA[settings.criterion].space, settings.sites)
    wanted = [site.part for site in cuttable if isinstance(site.part, Attn)]
    show = partial(Calibration(model, settings, context, settings.calibrate), model.module)
    rotate(wanted, show, partial(all_sum, fabric=context.fabric))


def _search(settings: Prune, model: Model, context: Context, gates: Gates, reduce: Reduce) -> Details:
    """Find the masks, and cut the channels of a convolutional tower."""
    terms = terms_from(settings.losses, "prune.losses") | terms_from(settings.distill_losses, "prune.distill_losses")
    steps, search = settings.search_steps(context), None
    if gates.sites:
        search = Search(model, gates, settings, steps, context.seed, reduce)
    channels = _conv_pruning(settings, model, context)
    hooks: list[Hook] = [hook for hook in (search, channels) if hook is not None]
    if not hooks:
        raise RecipeError("prune.sites: expected something to cut, found nothing in any tower. Allow kinds of sites.")
    if settings.steps == 0:
        kind = CRITERIA[settings.criterion]
        details = score_units(
            settings, model, terms if kind.uses_gradients and not kind.probe else {}, context, hooks, steps
        )
    else:
        details = train(model, settings, terms, context, hooks)
    if search is not None:
        _check_finished(search, details)
        details |= {"mask_updates": search.updates, "samples_left_out": int(search.seen.left_out)}
    return details | (channels.cut() if channels is not None else {})


def _conv_pruning(settings: Prune, model: Model, context: Context) -> ConvPruning | None:
    """Return the pruning hook of the convolutional tower, or None if there is none to cut."""
    target = settings.budget.target_of(convnets.TOWER)
    may_be_cut = settings.sites.get(convnets.TOWER, DEFAULT_KINDS)
    if target is None or not may_be_cut or not convnets.is_convnet(model.module):
        return None
    align, min_keep = settings.align.channels, settings.min_keep.channels
    return ConvPruning(model.module, settings.criterion, target, align=align, min_keep=min_keep, seed=context.seed)


def _check_finished(search: Search, details: dict[str, Any]) -> None:
    has_soft_masks = any(((site.mask != 0) & (site.mask != 1)).any() for site in search.gates.sites)
    if not search.updates or has_soft_masks:
        raise ClipressError(
            f"prune: the search ended before its masks were final ({search.updates} updates, "
            f"{details['skipped_steps']} steps skipped). Use more steps."
        )
