"""INT8 sensitivity of each layer, and a greedy choice of the layers to leave in full precision.

Damage is 1 - mean cosine between a tower's embeddings with and without rounding, over calibration samples. A layer only
affects its own tower's embeddings, so every tower is measured, and its layers are chosen, separately.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clipress.compress.calibration import Samples, outputs_of
from clipress.errors import RecipeError
from clipress.models import quantizers
from clipress.models.anatomy import tower_of
from clipress.models.load import Model
from clipress.tasks import task_named

MAX_SAMPLES = 256  # every layer costs one pass over the samples


@dataclass(frozen=True)
class Layer:
    """The damage to a tower's embeddings when only this module rounds."""

    module: str
    tower: str
    damage: float
    """1 - mean cosine."""


def first_samples(batches: Iterable[Samples]) -> list[Samples]:
    """Return the first batches that together have at least `MAX_SAMPLES` samples, or all of them."""
    kept: list[Samples] = []
    for samples in batches:
        kept.append(samples)
        if sum(_rows(one) for one in kept) >= MAX_SAMPLES:
            break
    return kept


def sensitivities(model: Model, names: Sequence[str], samples: Sequence[Samples]) -> list[Layer]:
    """Measure each calibrated module in `names` alone in INT8, in evaluation mode. Returns the most damaging first.

    Which modules round afterwards is left to the caller.
    """
    exact = _embedded(model, names, (), samples)
    towers = {name: tower_of(model.module, name) for name in names}
    report = [Layer(n, tower, _damage(model, names, (n,), samples, exact, tower)) for n, tower in towers.items()]
    return sorted(report, key=lambda layer: -layer.damage)


def keep_sensitive(
    model: Model, report: Sequence[Layer], samples: Sequence[Samples], limit: float
) -> tuple[list[str], dict[str, float]]:
    """Choose the modules to leave in full precision so that no tower's damage exceeds `limit`.

    Greedy, tower by tower: starts with all modules of the tower in INT8 and returns the most sensitive remaining one to
    full precision until the damage is within the limit. Returns the excluded modules in that order, and the damage with
    all others in INT8. Raises RecipeError if no module would remain in INT8. Which modules round afterwards is left to
    the caller.
    """
    names, kept, damage = [layer.module for layer in report], [], {}
    exact = _embedded(model, names, (), samples)
    for tower in dict.fromkeys(layer.tower for layer in report):
        rounding = [layer.module for layer in report if layer.tower == tower]
        while (found := _damage(model, names, rounding, samples, exact, tower)) > limit:
            kept.append(rounding.pop(0))
        damage[tower] = found
    if len(kept) == len(names):
        raise RecipeError(
            f"quantize.max_damage: {limit:g} with 'exclude: auto' leaves no module in INT8; the least sensitive module alone "
            f"has damage {report[-1].damage:.2g}. Raise 'max_damage'."
        )
    return kept, damage


@torch.no_grad()
def _embedded(
    model: Model, names: Sequence[str], rounding: Sequence[str], samples: Sequence[Samples]
) -> dict[str, Tensor]:
    """Return every graph's outputs, L2-normalized, float64 [N, D], with rounding in the modules `rounding`."""
    task = task_named(model.task)
    model.module.eval()
    quantizers.only(model.module, names, rounding)
    found: dict[str, list[Tensor]] = {}
    for one in samples:
        for graph, rows in outputs_of(task, model.module, one).items():
            found.setdefault(graph, []).append(nn.functional.normalize(rows.double(), dim=-1))
    return {graph: torch.cat(rows) for graph, rows in found.items()}


def _damage(
    model: Model,
    names: Sequence[str],
    rounding: Sequence[str],
    samples: Sequence[Samples],
    exact: dict[str, Tensor],
    tower: str,
) -> float:
    # A tower with its own graph affects only that graph.
    graphs = [tower] if tower in exact else list(exact)
    rounded = _embedded(model, names, rounding, [{graph: one[graph] for graph in graphs} for one in samples])
    damage = max(max(1 - (rounded[graph] * exact[graph]).sum(1).mean().item(), 0.0) for graph in graphs)
    return float(f"{damage:.4g}")  # the lineage records it


def _rows(samples: Samples) -> int:
    first = next(iter(samples.values()))
    return len(next(iter(first.values())))
