"""Several teachers at once, MobileCLIP's distillation (Vasu et al. 2024): their similarity rows are averaged.

L = (CE(P, S) + CE(P', S')) / 2;  S = s v t^T [B, N] is the student's, P = mean_k softmax(s_k V_k T_k^T) that of the
teachers, of any widths, ' the other way. Averaged after the softmax, so that a teacher's temperature is its own.
"""

from dataclasses import replace

from torch import Tensor

from clipress.compress.losses import LOSSES, Loss, soft_cross_entropy
from clipress.errors import RecipeError
from clipress.tasks.training import Batch, Sizes


@LOSSES.register("ensemble")
class Ensemble(Loss):
    """Cross-entropy of the student's similarity rows against the mean of the teachers'."""

    needs = frozenset({"pairs", "teacher"})

    class Settings(Loss.Settings):
        scales: tuple[float, ...] | None = None
        """One per teacher instead of its own; MobileCLIP has 100, MobileCLIP2 70 and 60."""

    def __init__(self, settings: Settings, sizes: Sizes) -> None:
        super().__init__(settings, sizes)
        if settings.scales is not None and len(settings.scales) != len(sizes.teachers):
            raise RecipeError(
                f"ensemble: 'scales' has {len(settings.scales)} numbers for {len(sizes.teachers)} teachers. "
                "Give one per teacher, or none."
            )

    def forward(self, batch: Batch) -> Tensor:
        scales = self.settings.scales or [teacher.scale for teacher in batch.teachers]
        rows = [replace(one, scale=scale).similarities() for one, scale in zip(batch.teachers, scales, strict=True)]
        wanted = (sum(logits.softmax(-1) for logits in way) / len(way) for way in zip(*rows, strict=True))
        return (
            sum(soft_cross_entropy(own, aim) for own, aim in zip(batch.student.similarities(), wanted, strict=True)) / 2
        )
