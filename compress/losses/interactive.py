"""Interactive contrastive learning, ICL of CLIP-KD (Yang et al. 2024): student queries, teacher keys.

L = (CE(c v T^T, targets) + CE(c t V^T, targets)) / 2 over [B, N];  capitals are the teacher's unit features, c a scale this
loss learns, as the paper has it: 1 / 0.07 at first. The published code leaves out its exp: `published: true`.
A tower that does not learn asks nothing.
"""

from torch import Tensor

from clipress.compress.losses import LOSSES, Loss, Scale, crossed_logits, soft_cross_entropy
from clipress.tasks.training import Batch, Sizes


@LOSSES.register("interactive")
class Interactive(Loss):
    """Contrast the student's embeddings with the teacher's of the other tower."""

    needs = frozenset({"teacher", "space", "keys"})

    class Settings(Loss.Settings):
        published: bool = False
        """Use the logarithm of the scale (2.66 at first) for the scale, as the published code does."""

    def __init__(self, settings: Settings, sizes: Sizes) -> None:
        super().__init__(settings, sizes)
        self.scale = Scale(settings.published)

    def forward(self, batch: Batch) -> Tensor:
        rows = crossed_logits(batch, self.scale())
        return sum(soft_cross_entropy(logits, batch.targets) for logits in rows) / len(rows)
