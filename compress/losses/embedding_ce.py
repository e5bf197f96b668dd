"""CLIP Distill's cross-entropy: raw embeddings are treated as logits of a distribution over their dims.

L = CE(softmax(V), v) + CE(softmax(T), t), mean over pairs;  v, t are raw embeddings [B, D]. The default weight is CLIP
Distill's, for use with `embedding-kl` and `l1`. Its code applies softmax to v twice: `published: true` does the same.
"""

from torch import Tensor

from clipress.compress.losses import LOSSES, Loss, each_side, soft_cross_entropy
from clipress.tasks.training import Batch


@LOSSES.register("embedding-ce")
class EmbeddingCe(Loss):
    """Cross-entropy of embeddings against the teacher's."""

    needs = frozenset({"teacher", "space"})

    class Settings(Loss.Settings):
        weight: float = 0.05
        published: bool = False
        """Apply softmax twice on the student's side, as the published code does."""

    def forward(self, batch: Batch) -> Tensor:
        pairs = [(v.softmax(-1) if self.settings.published else v, V) for v, V in each_side(batch, "raw_{}")]
        return sum(soft_cross_entropy(own, target.softmax(-1)) for own, target in pairs)
