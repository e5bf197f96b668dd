"""Feature distillation, FD of CLIP-KD (Yang et al. 2024): unit embeddings copy the teacher's.

L = MSE(v, V) + MSE(t, T), mean over pairs and dims; hence the published weight of 2000.
"""

import torch.nn.functional as F
from torch import Tensor

from clipress.compress.losses import LOSSES, Loss, each_side
from clipress.tasks.training import Batch


@LOSSES.register("feature")
class Feature(Loss):
    """Mean squared difference of unit embeddings [B, D], image plus text."""

    needs = frozenset({"teacher", "space"})

    class Settings(Loss.Settings):
        weight: float = 2000.0

    def forward(self, batch: Batch) -> Tensor:
        return sum(F.mse_loss(own, wanted) for own, wanted in each_side(batch))
