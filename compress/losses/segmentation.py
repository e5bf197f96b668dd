"""Supervised segmentation: cross-entropy of every labelled pixel.

L = mean over labelled pixels of CE(s, y);  s the scores of patches, enlarged to the image bilinearly [B, C, S, S], y labels [B, S, S].
As Segmenter (Strudel et al. 2021) is trained. A batch without labelled pixels has a loss of exactly zero.
"""

import torch.nn.functional as F
from torch import Tensor

from clipress.compress.losses import LOSSES, Loss
from clipress.data.transforms import IGNORED
from clipress.tasks.training import Batch


@LOSSES.register("segmentation")
class Segmentation(Loss):
    """Cross-entropy against masks, averaged over the labelled pixels of all processes."""

    needs = frozenset({"masks"})

    def forward(self, batch: Batch) -> Tensor:
        size = batch.masks.shape[-2:]
        scores = F.interpolate(batch.student.scores, size=size, mode="bilinear", align_corners=False)
        total = F.cross_entropy(scores, batch.masks, ignore_index=IGNORED, reduction="sum")
        labelled = (batch.all_masks != IGNORED).sum().clamp(min=1)  # processes may have different numbers of labels
        return total * (len(batch.all_masks) / len(batch.masks)) / labelled
