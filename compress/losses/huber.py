"""Huber loss on raw embeddings, an option of NVIDIA's clip-distillation: quadratic up to a difference of 1, then linear.

L = H(v, V) + H(t, T), before normalization, mean over pairs and dims;  H(x) = x^2 / 2 if |x| <= 1 else |x| - 1/2.
"""

import torch.nn.functional as F
from torch import Tensor

from clipress.compress.losses import LOSSES, Loss, each_side
from clipress.tasks.training import Batch


@LOSSES.register("huber")
class Huber(Loss):
    """Huber loss of raw embeddings [B, D]; single outlier dims do not dominate."""

    needs = frozenset({"teacher", "space"})

    def forward(self, batch: Batch) -> Tensor:
        return sum(F.huber_loss(own, target) for own, target in each_side(batch, "raw_{}"))
