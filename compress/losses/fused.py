"""Augmented feature distillation, AFD of CLIP-KD (Yang et al. 2024): contrastive loss on features fused with the teacher's.

L = (CE(c h_v h_t^T, targets) + CE(c h_t h_v^T, targets)) / 2 over [B, N];  h_v = norm(W_v [v; V] + b_v) and h_t likewise,
[B, D] with the student's width; capitals are the teacher's. The linear maps and the scale c (initially 1 / 0.07) are
parameters of this loss.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipress.compress.losses import LOSSES, Loss, Scale, soft_cross_entropy
from clipress.tasks.clip import SIDES
from clipress.tasks.training import Batch, Sizes


@LOSSES.register("fused")
class Fused(Loss):
    """Contrastive loss on linear combinations of both models' embeddings."""

    needs = frozenset({"pairs", "teacher"})

    class Settings(Loss.Settings):
        published: bool = False
        """Omit the exp of the learned scale (initially 2.66 instead of 14.3), as the published code does."""

    def __init__(self, settings: Settings, sizes: Sizes) -> None:
        super().__init__(settings, sizes)
        width = sizes.student
        self.maps = nn.ModuleDict({side: nn.Linear(width + sizes.teachers[0], width) for side in SIDES})
        self.scale = Scale(settings.published)

    def forward(self, batch: Batch) -> Tensor:
        def fuse(side: str, rows: str) -> Tensor:
            both = torch.cat([getattr(model, rows + side) for model in (batch.student, batch.teacher)], dim=-1)
            return F.normalize(self.maps[side](both), dim=-1)

        ways = [("image", "text"), ("text", "image")]
        logits = [self.scale() * fuse(queries, "") @ fuse(keys, "all_").T for queries, keys in ways]
        return sum(soft_cross_entropy(rows, batch.targets) for rows in logits) / 2
