"""L1 loss on raw embeddings, from CLIP Distill; also an option of NVIDIA's clip-distillation.

L = mean |v - V| + mean |t - T|, before normalization. The default weight is CLIP Distill's, for use with `embedding-kl` and
`embedding-ce`; NVIDIA uses it alone, with weight 1.
"""

import torch.nn.functional as F
from torch import Tensor

from clipress.compress.losses import LOSSES, Loss, each_side
from clipress.tasks.training import Batch


@LOSSES.register("l1")
class L1(Loss):
    """Mean absolute error of raw embeddings [B, D], norms included."""

    needs = frozenset({"teacher", "space"})

    class Settings(Loss.Settings):
        weight: float = 0.35

    def forward(self, batch: Batch) -> Tensor:
        return sum(F.l1_loss(own, target) for own, target in each_side(batch, "raw_{}"))
