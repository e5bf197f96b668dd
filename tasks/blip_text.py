"""What BLIP's tasks that write texts share: training on next tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from clipress.models import blip
from clipress.tasks import default_losses
from clipress.tasks.blip import BlipLesson, BlipTask, vocabulary_size
from clipress.tasks.training import Batch, Features, Gather, Outputs, TrainingJob


class BlipText(BlipTask):
    """A BLIP that writes texts."""

    provides = frozenset({"teacher", "words", "logits", "tokens"})
    stage_defaults = default_losses(["lm"], quantize=["logits"])

    def graphs_of_tower(self, tower: str) -> tuple[str, ...]:
        return (tower,)

    @abstractmethod
    def lesson(self, job: TrainingJob) -> WritingLesson: ...


def next_tokens(ids: Tensor, first: int = 1) -> Tensor:
    """Return whether the tokens behind every one but the last [B, L - 1] are written: no padding, and none before place `first`."""
    places = torch.arange(1, ids.shape[1], device=ids.device)
    return (ids[:, 1:] != blip.PAD) & (places >= first)


class WritingLesson(BlipLesson):
    """Training on next tokens, and distillation of their scores."""

    def __init__(self, job: TrainingJob) -> None:
        super().__init__(job)
        self.sizes = job.sizes(vocabulary_size, self.learning)

    @abstractmethod
    def words(self, arrays: Mapping[str, Tensor], gather: Gather) -> tuple[Tensor, Tensor]:
        """Return the texts that are written, ids [R, L], and the weight of every token but the first, [R, L - 1]."""

    def batch(
        self,
        outputs: Outputs,
        teachers: Sequence[Outputs],
        arrays: Mapping[str, Tensor],
        projections: Mapping[str, nn.Module],
        gather: Gather,
    ) -> Batch:
        # Processes have other numbers of rows and lengths, so each has the loss of its own texts.
        ids, weights = self.words(arrays, gather)
        return Batch(
            _features(outputs),
            tuple(map(_features, teachers)),
            labels=ids[:, 1:].flatten(),
            weights=weights.flatten(),
            sides=self.learning,
        )


def _features(outputs: Outputs) -> Features:
    tokens = Gather(lambda rows: rows, local=True).own_tokens(outputs)
    return Features(logits=outputs["logits"][:, :-1].flatten(0, 1), tokens=tokens)
