"""Cross distillation from CLIP-KD's code (Yang et al. 2024): student queries rank teacher keys as the teacher does.

L = (KL(softmax(S V T^T) || softmax(c v T^T)) + KL(softmax(S T V^T) || softmax(c t V^T))) / 2 over [B, N];  capitals are the
teacher's, c is a learned scale, initially 1 / 0.07. The published weight is 0, so CLIP-KD never uses it; the default here
is 1. The published code omits the exp of c; this one does not.
"""

from torch import Tensor

from clipress.compress.losses import LOSSES, Loss, Scale, crossed_logits, kl_divergence
from clipress.tasks.clip import SIDES
from clipress.tasks.training import Batch, Sizes


@LOSSES.register("cross")
class Cross(Loss):
    """KL divergence of student-to-teacher similarity distributions from teacher-to-teacher ones."""

    needs = frozenset({"teacher", "space", "keys"})

    def __init__(self, settings: Loss.Settings, sizes: Sizes) -> None:
        super().__init__(settings, sizes)
        self.scale = Scale()

    def forward(self, batch: Batch) -> Tensor:
        target = dict(zip(SIDES, batch.teacher.similarities(), strict=True))
        rows = zip(batch.sides, crossed_logits(batch, self.scale()), strict=True)
        return sum(kl_divergence(logits, target[side]) for side, logits in rows) / len(batch.sides)
