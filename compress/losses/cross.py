"""Cross distillation, in CLIP-KD's code (Yang et al. 2024): student queries rank the teacher's keys as the teacher does.

L = (KL(softmax(S V T^T) || softmax(c v T^T)) + KL(softmax(S T V^T) || softmax(c t V^T))) / 2 over [B, N];  capitals are the
teacher's, c a scale this loss learns, 1 / 0.07 at first. Published with weight 0, so never used; here a recipe that names
it gets weight 1. The published code leaves out the exp of c; here it is not left out.
"""

from torch import Tensor

from clipress.compress.losses import LOSSES, Loss, Scale, crossed_logits, kl_divergence
from clipress.tasks.clip import SIDES
from clipress.tasks.training import Batch, Sizes


@LOSSES.register("cross")
class Cross(Loss):
    """Divergence of student-to-teacher similarity rows from teacher-to-teacher ones."""

    needs = frozenset({"teacher", "space", "keys"})

    def __init__(self, settings: Loss.Settings, sizes: Sizes) -> None:
        super().__init__(settings, sizes)
        self.scale = Scale()

    def forward(self, batch: Batch) -> Tensor:
        wanted = dict(zip(SIDES, batch.teacher.similarities(), strict=True))
        rows = zip(batch.sides, crossed_logits(batch, self.scale()), strict=True)
        return sum(kl_divergence(logits, wanted[side]) for side, logits in rows) / len(batch.sides)
