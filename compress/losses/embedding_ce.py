"""CLIP Distill's cross-entropy: a raw embedding is read as the logits of one distribution over its dims.

L = CE(softmax(V), v) + CE(softmax(T), t), mean over pairs;  v, t are logits [B, D]. The weight is CLIP Distill's, beside
`kl` and `l1`. Its code takes a softmax of v and then another within the cross-entropy: `published: true` does the same.
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
        """Softmax twice on the student's side."""

    def forward(self, batch: Batch) -> Tensor:
        pairs = [(v.softmax(-1) if self.settings.published else v, V) for v, V in each_side(batch, "raw_{}")]
        return sum(soft_cross_entropy(own, wanted.softmax(-1)) for own, wanted in pairs)
