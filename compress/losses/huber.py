"""Huber loss of raw embeddings, a choice of NVIDIA's clip-distillation: squared up to a difference of 1, then linear.

L = H(v, V) + H(t, T), before normalisation, mean over pairs and dims;  H(x) = x^2 / 2 if |x| <= 1 else |x| - 1/2.
"""

import torch.nn.functional as F
from torch import Tensor

from clipress.compress.losses import LOSSES, Loss, each_side
from clipress.tasks.training import Batch


@LOSSES.register("huber")
class Huber(Loss):
    """Raw embeddings [B, D] copy the teacher's; a dim that is far off does not rule the rest."""

    needs = frozenset({"teacher", "space"})

    def forward(self, batch: Batch) -> Tensor:
        return sum(F.huber_loss(own, wanted) for own, wanted in each_side(batch, "raw_{}"))
