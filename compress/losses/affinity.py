"""Affinity mimicking (TinyCLIP, Wu et al. 2023): match the student's similarity distributions to the teacher's.

L = (CE(softmax(S_T), S_S) + CE(softmax(S_T'), S_S')) / 2;  S = s v t^T with each model's own scale, S' = s t v^T.
"""

from torch import Tensor

from clipress.compress.losses import LOSSES, Loss, soft_cross_entropy
from clipress.tasks.training import Batch


@LOSSES.register("affinity")
class Affinity(Loss):
    """Cross-entropy of the student's similarity distributions against the teacher's."""

    needs = frozenset({"pairs", "teacher"})

    def forward(self, batch: Batch) -> Tensor:
        rows = zip(batch.student.similarities(), batch.teacher.similarities(), strict=True)
        return sum(soft_cross_entropy(own, target.softmax(-1)) for own, target in rows) / 2
