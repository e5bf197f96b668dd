"""Mean squared difference of raw embeddings: the default of NVIDIA's clip-distillation.

L = MSE(v, V) + MSE(t, T), before normalisation, mean over pairs and dims.
"""

import torch.nn.functional as F
from torch import Tensor

from clipress.compress.losses import LOSSES, Loss, each_side
from clipress.tasks.training import Batch


@LOSSES.register("mse")
class Mse(Loss):
    """Raw embeddings [B, D] copy the teacher's, length included."""

    needs = frozenset({"teacher", "space"})

    def forward(self, batch: Batch) -> Tensor:
        return sum(F.mse_loss(own, wanted) for own, wanted in each_side(batch, "raw_{}"))
