"""Affinity mimicking (TinyCLIP, Wu et al. 2023): the student's similarity rows copy the teacher's.

L = (CE(softmax(S_T), S_S) + CE(softmax(S_T'), S_S')) / 2;  S = s v t^T with each model's own scale, ' the other way.
"""

from torch import Tensor

from clipress.compress.losses import LOSSES, Loss, soft_cross_entropy
from clipress.tasks.training import Batch


@LOSSES.register("affinity")
class Affinity(Loss):
    """Cross-entropy of the student's similarity rows against the teacher's."""

    needs = frozenset({"pairs", "teacher"})

    def forward(self, batch: Batch) -> Tensor:
        rows = zip(batch.student.similarities(), batch.teacher.similarities(), strict=True)
        return sum(soft_cross_entropy(own, wanted.softmax(-1)) for own, wanted in rows) / 2
