"""What a model costs before any clock runs: parameters, multiply-accumulates, bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipress.bench.layers import layer_costs
from clipress.models import anatomy
from clipress.tasks import model_from_artifact


def cost(artifact: Path) -> dict[str, Any]:
    """Return parameters with and without embeddings and in blocks, MACs of one image and one text, and both per layer."""
    model = model_from_artifact(artifact)
    layers = layer_costs(model)
    per_tower = {
        tower: sum(row["macs"] for row in layers if row["tower"] == tower) for tower in anatomy.towers(model.module)
    }
    return anatomy.counts(model.module) | {
        "macs": sum(per_tower.values()),
        "macs_per_tower": per_tower,
        "layers": layers,
    }
