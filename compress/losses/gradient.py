"""Gradient distillation, GD of CLIP-KD (Yang et al. 2024): the contrastive loss pulls at both models' embeddings alike.

For anchors p and keys k [N, D] with s = exp(logit_scale), G = softmax(s p k^T) - targets [N, N]:
  dL/dp = s G k,  dL/dk = s G^T p   of the loss summed over anchors, image -> text and text -> image
L = MSE of the student's four gradients against the teacher's, mean over rows and dims.

Summed over anchors, its size depends little on the batch. The weight that pulls at embeddings as hard as the contrastive
loss, on random features of a student near its teacher and student scales of 14 to 30: 0.03 to 0.3 at 32 dims, 0.4 to 9 at
512; at a scale of 100 far less. 0.1 is a cautious one for wide embeddings; a CLIP of 64 dims recovered better with 0.02.
The published code divides by s where it must multiply, and averages, so its gradients nearly vanish and are weighted with
1e8: `published: true` does the same.
"""

from typing import Any

import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor

from clipress.compress.losses import LOSSES, Loss
from clipress.tasks.clip import positives
from clipress.tasks.training import Batch, Features


@LOSSES.register("gradient")
class Gradient(Loss):
    """Mean squared difference of the analytic gradients, all processes' pairs together."""

    needs = frozenset({"pairs", "teacher", "width"})

    class Settings(Loss.Settings):
        weight: float = 0.1
        published: bool = False
        """Similarities divided by the scale, gradients averaged over the batch, weight 1e8 unless given."""

        @model_validator(mode="before")
        @classmethod
        def _weigh(cls, raw: Any) -> Any:
            return {"weight": 1e8, **raw} if raw.get("published") else raw

    def forward(self, batch: Batch) -> Tensor:
        targets = positives(batch.groups, batch.groups)
        pairs = zip(self._gradients(batch.student, targets), self._gradients(batch.teacher, targets), strict=True)
        return sum(F.mse_loss(own, wanted) for own, wanted in pairs)

    def _gradients(self, model: Features, targets: Tensor) -> list[Tensor]:
        """Return the gradients [N, D] with respect to anchors and keys, both ways."""
        scale = 1 / model.scale if self.settings.published else model.scale
        share = 1 / len(targets) if self.settings.published else 1.0
        found = []
        for anchors, keys in ((model.all_image, model.all_text), (model.all_text, model.all_image)):
            gap = (scale * anchors @ keys.T).softmax(-1) - targets
            found += [share * scale * gap @ keys, share * scale * gap.T @ anchors]
        return found
