"""Language modelling: cross-entropy of the next token, as BLIP (Li et al. 2022) learns captions and answers.

L = sum over tokens of w · CE(z, y) with label smoothing;  z the logits behind every token [T, V], y the tokens that follow [T].
Weights w are the task's: of captions 1 / tokens of the batch, the prompt's and padding left out; of answers their share of the
annotators / images of the batch, so that an answer's tokens add up.
"""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from clipress.compress.losses import LOSSES, Loss
from clipress.models.blip import SMOOTHING
from clipress.tasks.training import Batch


@LOSSES.register("lm")
class LanguageModeling(Loss):
    """Cross-entropy of the next token, of the texts of this process."""

    needs = frozenset({"words"})

    class Settings(Loss.Settings):
        smoothing: float = Field(SMOOTHING, ge=0, lt=1)
        """Label smoothing (Szegedy et al. 2016): this part of the target is spread over the vocabulary."""

    def forward(self, batch: Batch) -> Tensor:
        rows = F.cross_entropy(
            batch.student.logits, batch.labels, reduction="none", label_smoothing=self.settings.smoothing
        )
        return (batch.weights * rows).sum()
