"""MSE loss on raw embeddings, the default of NVIDIA's clip-distillation.

L = MSE(v, V) + MSE(t, T), before normalization, mean over pairs and dims.
"""

import torch.nn.functional as F
from torch import Tensor

from clipress.compress.losses import LOSSES, Loss, each_side
from clipress.tasks.training import Batch


@LOSSES.register("mse")
class Mse(Loss):
    """Mean squared error of raw embeddings [B, D], norms included."""

    needs = frozenset({"teacher", "space"})

    def forward(self, batch: Batch) -> Tensor:
        return sum(F.mse_loss(own, target) for own, target in each_side(batch, "raw_{}"))
