"""Feature distillation, FD of CLIP-KD (Yang et al. 2024): match the teacher's normalized embeddings.

L = MSE(v, V) + MSE(t, T), mean over pairs and dims, which is small; hence the published weight of 2000.
"""

import torch.nn.functional as F
from torch import Tensor

from clipress.compress.losses import LOSSES, Loss, each_side
from clipress.tasks.training import Batch


@LOSSES.register("feature")
class Feature(Loss):
    """Mean squared error of L2-normalized embeddings [B, D], image plus text."""

    needs = frozenset({"teacher", "space"})

    class Settings(Loss.Settings):
        weight: float = 2000.0

    def forward(self, batch: Batch) -> Tensor:
        return sum(F.mse_loss(own, target) for own, target in each_side(batch))
