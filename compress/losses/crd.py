"""Contrastive relational distillation, CRD of CLIP-KD (Yang et al. 2024): match the teacher's similarity distributions.

L = (KL(softmax(S_T) || softmax(S_S)) + KL(softmax(S_T') || softmax(S_S'))) / 2;  S = s v t^T [B, N] with each model's own
exponentiated scale and no further temperature, S' = s t v^T. It equals `affinity` minus the teacher's entropy: the
gradient is the same, and the loss is zero when the student matches the teacher.
"""

from torch import Tensor

from clipress.compress.losses import LOSSES, Loss, kl_divergence
from clipress.tasks.training import Batch


@LOSSES.register("crd")
class Crd(Loss):
    """KL divergence of the student's similarity distributions from the teacher's."""

    needs = frozenset({"pairs", "teacher"})

    def forward(self, batch: Batch) -> Tensor:
        rows = zip(batch.student.similarities(), batch.teacher.similarities(), strict=True)
        return sum(kl_divergence(own, target) for own, target in rows) / 2
