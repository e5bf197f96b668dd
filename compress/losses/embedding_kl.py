"""CLIP Distill's divergence: a raw embedding is read as the logits of one distribution over its dims.

L = H^2 KL(softmax(V / H) || softmax(v / H)) + the same of texts, mean over pairs, v and V [B, D] before normalisation, H the
temperature. The weight is CLIP Distill's, beside `l1` and `ce`. It halves the temperature after 100 epochs; ours stays.
"""

from pydantic import Field
from torch import Tensor

from clipress.compress.losses import LOSSES, Loss, each_side, kl_divergence
from clipress.tasks.training import Batch


@LOSSES.register("embedding-kl")
class EmbeddingKl(Loss):
    """Divergence of softened embeddings from the teacher's."""

    needs = frozenset({"teacher", "space"})

    class Settings(Loss.Settings):
        weight: float = 0.6
        temperature: float = Field(4.0, gt=0)

    def forward(self, batch: Batch) -> Tensor:
        heat = self.settings.temperature
        return sum(heat**2 * kl_divergence(own / heat, wanted / heat) for own, wanted in each_side(batch, "raw_{}"))
