"""How much INT8 harms each layer, and a greedy choice of the layers to leave in full precision.

Damage is 1 - mean cosine between a tower's embeddings with and without rounding, over calibration samples. A layer
changes the embeddings of its own tower only, so every tower is measured, and chosen from, by itself.
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

PAIRS = 256  # each layer costs a pass over them


@dataclass(frozen=True)
class Layer:
    """The damage to its tower's embeddings when this module, and no other, rounds."""

    module: str
    tower: str
    damage: float
    """1 - mean cosine."""


def first_samples(batches: Iterable[Samples]) -> list[Samples]:
    """Return the first batches, up to `PAIRS` pairs or the batch that exceeds them."""
    kept: list[Samples] = []
    for samples in batches:
        kept.append(samples)
        if sum(_rows(one) for one in kept) >= PAIRS:
            break
    return kept


def sensitivities(model: Model, names: Sequence[str], samples: Sequence[Samples]) -> list[Layer]:
    """Measure every calibrated module of `names` alone in INT8, in evaluation mode. Returns the most damaging first.

    The caller decides which modules round afterwards.
    """
    exact = _embedded(model, names, (), samples)
    towers = {name: tower_of(model.module, name) for name in names}
    report = [Layer(n, tower, _damage(model, names, (n,), samples, exact, tower)) for n, tower in towers.items()]
    return sorted(report, key=lambda layer: -layer.damage)


def keep_sensitive(
    model: Model, report: Sequence[Layer], samples: Sequence[Samples], limit: float
) -> tuple[list[str], dict[str, float]]:
    """Choose the modules to leave in full precision so that no tower's damage exceeds `limit`.

    Greedy, tower by tower: it starts with every module of the tower in INT8, and while the damage exceeds the limit, the
    most sensitive module that still rounds, by the report, returns to full precision. Returns those modules, in that
    order, and the damage with all others in INT8. Raises RecipeError when no module remains in INT8. The caller decides
    which modules round afterwards.
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
            f"quantize: max_damage {limit:g} with 'exclude: auto' leaves no module in INT8; the least sensitive module alone "
            f"has a damage of {report[-1].damage:.2g}. Raise max_damage."
        )
    return kept, damage


@torch.no_grad()
def _embedded(
    model: Model, names: Sequence[str], rounding: Sequence[str], samples: Sequence[Samples]
) -> dict[str, Tensor]:
    """Return every graph's outputs as unit rows, float64 [N, D], while the modules `rounding` round."""
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
    # a tower that is a graph of its own changes that graph alone
    graphs = [tower] if tower in exact else list(exact)
    rounded = _embedded(model, names, rounding, [{graph: one[graph] for graph in graphs} for one in samples])
    damage = max(max(1 - (rounded[graph] * exact[graph]).sum(1).mean().item(), 0.0) for graph in graphs)
    return float(f"{damage:.4g}")  # the lineage records it


def _rows(samples: Samples) -> int:
    first = next(iter(samples.values()))
    return len(next(iter(first.values())))
