"""CLIP Distill's KL divergence: raw embeddings are treated as logits of a distribution over their dims.

L = H^2 KL(softmax(V / H) || softmax(v / H)) + the same for texts, mean over pairs;  v, V are embeddings [B, D] before
normalization, H is the temperature. The default weight is CLIP Distill's, for use with `l1` and `embedding-ce`. CLIP Distill
halves the temperature after 100 epochs; here it is constant.
"""

from pydantic import Field
from torch import Tensor

from clipress.compress.losses import LOSSES, Loss, each_side, kl_divergence
from clipress.tasks.training import Batch


@LOSSES.register("embedding-kl")
class EmbeddingKl(Loss):
    """KL divergence of softened embeddings from the teacher's."""

    needs = frozenset({"teacher", "space"})

    class Settings(Loss.Settings):
        weight: float = 0.6
        temperature: float = Field(4.0, gt=0)

    def forward(self, batch: Batch) -> Tensor:
        h = self.settings.temperature
        return sum(h**2 * kl_divergence(own / h, target / h) for own, target in each_side(batch, "raw_{}"))
