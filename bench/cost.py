"""Static costs of a model: parameters and multiply-accumulates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clipress.bench.layers import layer_costs
from clipress.bench.results import LayerCost
from clipress.models import anatomy
from clipress.tasks import model_from_artifact


@dataclass(frozen=True)
class Cost:
    """Fields are those of a row of results.json."""

    params: int
    params_without_embeddings: int
    block_params: int
    macs: int
    """Multiply-accumulates of one item through every tower."""
    macs_per_tower: dict[str, int]
    layers: tuple[LayerCost, ...]


def cost(artifact: Path) -> Cost:
    """Return what an artifact's model costs, as a whole and per layer."""
    model = model_from_artifact(artifact)
    layers = tuple(LayerCost.model_validate(row) for row in layer_costs(model))
    per_tower = dict.fromkeys((row.tower for row in layers), 0)
    for row in layers:
        per_tower[row.tower] += row.macs
    return Cost(**anatomy.counts(model.module), macs=sum(per_tower.values()), macs_per_tower=per_tower, layers=layers)
