"""Logit distillation for classifiers (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network").

L = T^2 KL(softmax(Z / T) || softmax(z / T)), mean over the batch;  z, Z are the student's and the teacher's logits [B, C]. Of texts the
rows are next tokens, which count by the task's weights, see `lm`.
DeiT (Touvron et al. 2021) calls it soft distillation and uses T = 3. The factor T^2 keeps the gradient magnitude independent
of T.
"""

from pydantic import Field
from torch import Tensor

from clipress.compress.losses import LOSSES, Loss, kl_divergence
from clipress.tasks.training import Batch


@LOSSES.register("logits")
class Logits(Loss):
    """KL divergence of the student's softened class probabilities from the teacher's."""

    needs = frozenset({"teacher", "logits"})

    class Settings(Loss.Settings):
        temperature: float = Field(3.0, gt=0)

    def forward(self, batch: Batch) -> Tensor:
        t = self.settings.temperature
        return t * t * kl_divergence(batch.student.logits / t, batch.teacher.logits / t, batch.weights)
