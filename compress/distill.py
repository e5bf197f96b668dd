"""Distillation and plain training: move a student's weights with any of the loss terms.

With only `contrastive` it is ordinary CLIP training and needs no teacher; after pruning it is recovery.
"""

from __future__ import annotations

from typing import Any

from clipress.compress.context import Context
from clipress.compress.losses import Losses, terms_from
from clipress.compress.settings import Training
from clipress.compress.stage import stage
from clipress.compress.train import train
from clipress.models.load import Model


class Distill(Training):
    """Settings of `distill`."""

    losses: Losses = ("contrastive",)
    """Names, or names with weights."""

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        terms_from(self.losses, "distill.losses")


@stage(
    "distill",
    Distill,
    makes="distilled",
    never_after={"quantize": "training would leave the INT8 scales behind; quantize trains itself"},
)
def run(settings: Distill, model: Model, context: Context) -> tuple[Model, dict[str, Any]]:
    """Train the student."""
    return model, train(model, settings, terms_from(settings.losses, "distill.losses"), context)
