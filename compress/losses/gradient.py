"""Gradient distillation, GD of CLIP-KD (Yang et al. 2024): match the teacher's gradients of the contrastive loss.

For anchors p and keys k [N, D] with s = exp(logit_scale), G = softmax(s p k^T) - targets [N, N]:
  dL/dp = s G k,  dL/dk = s G^T p   for the loss summed over anchors, image -> text and text -> image
L = MSE between the four gradients of student and teacher, mean over rows and dims.

Since the loss is summed over anchors, its magnitude depends little on the batch size. The weight at which it pulls on
embeddings as hard as the contrastive loss, measured on random features of a student close to its teacher with scales of
14 to 30, is 0.03 to 0.3 at 32 dims and 0.4 to 9 at 512; at a scale of 100 it is far smaller. The default of 0.1 is
conservative for wide embeddings; a CLIP with 64 dims recovered better with 0.02.
The published code divides by s instead of multiplying, and averages over the batch, so its gradients nearly vanish and
need a weight of 1e8: `published: true` does the same.
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
    """Mean squared error of the analytic gradients, over the pairs of all processes."""

    needs = frozenset({"pairs", "teacher", "width"})

    class Settings(Loss.Settings):
        weight: float = 0.1
        published: bool = False
        """Divide similarities by the scale, average gradients over the batch, and default to weight 1e8."""

        @model_validator(mode="before")
        @classmethod
        def _weigh(cls, raw: Any) -> Any:
            return {"weight": 1e8, **raw} if raw.get("published") else raw

    def forward(self, batch: Batch) -> Tensor:
        targets = positives(batch.groups, batch.groups)
        pairs = zip(self._gradients(batch.student, targets), self._gradients(batch.teacher, targets), strict=True)
        return sum(F.mse_loss(own, target) for own, target in pairs)

    def _gradients(self, model: Features, targets: Tensor) -> list[Tensor]:
        """Return the gradients [N, D] with respect to anchors and keys, in both directions."""
        scale = 1 / model.scale if self.settings.published else model.scale
        share = 1 / len(targets) if self.settings.published else 1.0
        found = []
        for anchors, keys in ((model.all_image, model.all_text), (model.all_text, model.all_image)):
            gap = (scale * anchors @ keys.T).softmax(-1) - targets
            found += [share * scale * gap @ keys, share * scale * gap.T @ anchors]
        return found
