"""Mean absolute difference of raw embeddings: of CLIP Distill, and a choice of NVIDIA's clip-distillation.

L = mean |v - V| + mean |t - T|, before normalisation. The weight is CLIP Distill's, beside `kl` and `ce`; NVIDIA's, alone,
is 1.
"""

import torch.nn.functional as F
from torch import Tensor

from clipress.compress.losses import LOSSES, Loss, each_side
from clipress.tasks.training import Batch


@LOSSES.register("l1")
class L1(Loss):
    """Raw embeddings [B, D] copy the teacher's, length included."""

    needs = frozenset({"teacher", "space"})

    class Settings(Loss.Settings):
        weight: float = 0.35

    def forward(self, batch: Batch) -> Tensor:
        return sum(F.l1_loss(own, wanted) for own, wanted in each_side(batch, "raw_{}"))
