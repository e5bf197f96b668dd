"""Supervised training: the image embedding is classified by the teacher's class prompts.

L = mean over labelled pairs of CE(s v C^T, y);  v unit image embeddings [B, D], C the teacher's text classifier of the
sources' classes [K, D], y labels [B]. Alone it is plain supervised training of the image tower, the teacher giving the
head only. Pairs without a label contribute nothing, and a batch of them is worth exactly zero.
"""

import torch.nn.functional as F
from torch import Tensor

from clipress.compress.losses import LOSSES, Loss
from clipress.errors import RecipeError
from clipress.tasks.training import Batch, Sizes


@LOSSES.register("classification")
class Classification(Loss):
    """Cross-entropy against labels, averaged over the labelled pairs of all processes."""

    needs = frozenset({"space", "labels"})

    class Settings(Loss.Settings):
        scale: float = 100.0

    def __init__(self, settings: Settings, sizes: Sizes) -> None:
        super().__init__(settings, sizes)
        if "image" not in sizes.sides:
            raise RecipeError(
                "classification: pictures are classified, and the image tower does not learn. Change 'towers'."
            )

    def forward(self, batch: Batch) -> Tensor:
        logits = batch.class_scores(self.settings.scale)
        rows = F.cross_entropy(logits, batch.labels, ignore_index=-1, reduction="none")
        labelled = (batch.all_labels >= 0).sum().clamp(min=1)
        return rows.mean() * len(batch.all_labels) / labelled  # processes may hold unequal numbers of labels
