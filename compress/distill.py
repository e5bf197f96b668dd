"""The `distill` stage: train a student with any combination of losses.

With `contrastive` alone it is plain CLIP training and needs no teacher; after pruning it is the recovery phase.
"""

from __future__ import annotations

from typing import Any

from clipress.compress.context import Context
from clipress.compress.losses import Losses, terms_from
from clipress.compress.names import MAKES
from clipress.compress.settings import Training
from clipress.compress.stage import stage
from clipress.compress.train import train
from clipress.models.load import Model


class Distill(Training):
    """Settings of `distill`."""

    losses: Losses = ("contrastive",)
    """Loss names, or a mapping from names to weights or settings."""

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        terms_from(self.losses, "distill.losses")


@stage(
    "distill",
    Distill,
    makes=MAKES["distill"],
    never_after={
        "quantize": "further training would invalidate the INT8 scales. The quantize stage does its own training"
    },
)
def run(settings: Distill, model: Model, context: Context) -> tuple[Model, dict[str, Any]]:
    """Train the student."""
    return model, train(model, settings, terms_from(settings.losses, "distill.losses"), context)
