"""Image-text matching with hard negatives, as ALBEF (Li et al. 2021) and BLIP (Li et al. 2022) learn to score pairs.

L = mean over pairs of CE(z, y);  z the logits of a pair that is read together, y whether it belongs together. Every image has three
pairs: with its own text, with a wrong text, and its text with a wrong image. Wrong ones are drawn with probabilities
softmax(similarity / temperature) from the batch of a process, or from those of all (BLIP's `negative_all_rank`); where all of it is
right, they do not count.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clipress.compress.losses import LOSSES, Loss
from clipress.tasks.training import Batch


@LOSSES.register("matching")
class Matching(Loss):
    """Cross-entropy of whether an image and a text belong together."""

    needs = frozenset({"pairs", "matches"})

    class Settings(Loss.Settings):
        negatives: Literal["own", "all"] = "own"
        """Whose pairs wrong ones are drawn from: those of a process, or of all processes."""

    @classmethod
    def needs_with(cls, settings: Settings) -> frozenset[str]:
        return cls.needs | ({"matches_of_all"} if settings.negatives == "all" else set())

    def forward(self, batch: Batch) -> Tensor:
        logits, every = batch.student.matches, batch.all_match_weights
        belongs = torch.zeros(logits.shape[:2], dtype=torch.int64, device=logits.device)
        belongs[:, 0] = 1
        rows = F.cross_entropy(logits.flatten(0, 1), belongs.flatten(), reduction="none")
        total = (batch.match_weights.flatten() * rows).sum()
        return (
            total * (len(every) / len(logits)) / every.sum()
        )  # processes may have different numbers of pairs that count
