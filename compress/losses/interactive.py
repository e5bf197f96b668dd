"""Interactive contrastive learning, ICL of CLIP-KD (Yang et al. 2024): student queries, teacher keys.

L = (CE(c v T^T, targets) + CE(c t V^T, targets)) / 2 over [B, N];  capitals are the teacher's unit features, c is a learned
scale, initially 1 / 0.07, as in the paper. The published code omits its exp: `published: true` does the same.
A frozen tower contributes no term.
"""

from torch import Tensor

from clipress.compress.losses import LOSSES, Loss, Scale, crossed_logits, soft_cross_entropy
from clipress.tasks.training import Batch, Sizes


@LOSSES.register("interactive")
class Interactive(Loss):
    """Contrastive loss of the student's embeddings against the teacher's embeddings of the other tower."""

    needs = frozenset({"teacher", "space", "keys"})

    class Settings(Loss.Settings):
        published: bool = False
        """Omit the exp of the learned scale (initially 2.66 instead of 14.3), as the published code does."""

    def __init__(self, settings: Settings, sizes: Sizes) -> None:
        super().__init__(settings, sizes)
        self.scale = Scale(settings.published)

    def forward(self, batch: Batch) -> Tensor:
        rows = crossed_logits(batch, self.scale())
        return sum(soft_cross_entropy(logits, batch.targets) for logits in rows) / len(rows)
