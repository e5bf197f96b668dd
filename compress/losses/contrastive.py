"""CLIP's contrastive loss (Radford et al. 2021), with several positives per row where pairs share a group.

L = (CE(s v t^T, T) + CE(s t v^T, T)) / 2;  v, t unit features, s = exp(logit_scale), T uniform over a row's positives.
"""

from torch import Tensor

from clipress.compress.losses import LOSSES, Loss, soft_cross_entropy
from clipress.tasks.training import Batch


@LOSSES.register("contrastive")
class Contrastive(Loss):
    """Pull the pairs of a group together. Groups are symmetric, so both directions share the targets."""

    needs = frozenset({"pairs"})

    def forward(self, batch: Batch) -> Tensor:
        to_text, to_image = batch.student.similarities()
        return (soft_cross_entropy(to_text, batch.targets) + soft_cross_entropy(to_image, batch.targets)) / 2
