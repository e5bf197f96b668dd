"""Supervised classification, with the teacher's class prompts as the head of a CLIP.

L = mean over labeled samples of CE(s v C^T, y);  v unit image embeddings [B, D], C the teacher's text classifier for the
sources' classes [K, D], y labels [B]. Used alone, it is plain supervised training of the image tower with the teacher's
head. Samples without a label contribute nothing; a batch without labels has a loss of exactly zero. Of mixed images (mixup, CutMix),
each label counts by its share.
"""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from clipress.compress.losses import LOSSES, Loss
from clipress.errors import RecipeError
from clipress.tasks.training import Batch, Sizes


@LOSSES.register("classification")
class Classification(Loss):
    """Cross-entropy against labels, averaged over the labeled samples of all processes."""

    needs = frozenset({"space", "labels"})

    class Settings(Loss.Settings):
        scale: float = 100.0
        smoothing: float = Field(0.0, ge=0, lt=1)
        """Label smoothing (Szegedy et al. 2016): this part of the target is spread over all classes."""

    def __init__(self, settings: Settings, sizes: Sizes) -> None:
        super().__init__(settings, sizes)
        if "image" not in sizes.sides:
            raise RecipeError(
                "classification: expected a trained image tower, found it frozen. Set 'towers' to both or image."
            )

    def forward(self, batch: Batch) -> Tensor:
        logits = batch.class_scores(self.settings.scale)
        rows = self._rows(logits, batch.labels)
        if batch.shares is not None:
            rows = batch.shares * rows + (1 - batch.shares) * self._rows(logits, batch.other_labels)
        labeled = (batch.all_labels >= 0).sum().clamp(min=1)
        return rows.mean() * len(batch.all_labels) / labeled  # processes may have different numbers of labels

    def _rows(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(
            logits, labels, ignore_index=-1, reduction="none", label_smoothing=self.settings.smoothing
        )
