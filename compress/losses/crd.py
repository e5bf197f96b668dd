"""Contrastive relational distillation, CRD of CLIP-KD (Yang et al. 2024): similarity rows copy the teacher's.

L = (KL(softmax(S_T) || softmax(S_S)) + KL(softmax(S_T') || softmax(S_S'))) / 2;  S = s v t^T [B, N] with each model's own
exponentiated scale and no further temperature, ' the other way. It is `affinity` less the teacher's entropy: the same
gradient, and zero when the student has caught up.
"""

from torch import Tensor

from clipress.compress.losses import LOSSES, Loss, kl_divergence
from clipress.tasks.training import Batch


@LOSSES.register("crd")
class Crd(Loss):
    """Divergence of the student's similarity rows from the teacher's."""

    needs = frozenset({"pairs", "teacher"})

    def forward(self, batch: Batch) -> Tensor:
        rows = zip(batch.student.similarities(), batch.teacher.similarities(), strict=True)
        return sum(kl_divergence(own, wanted) for own, wanted in rows) / 2
