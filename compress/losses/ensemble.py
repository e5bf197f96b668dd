"""MobileCLIP's distillation from several teachers (Vasu et al. 2024): their similarity distributions are averaged.

L = (CE(P, S) + CE(P', S')) / 2;  S = s v t^T [B, N] is the student's, P = mean_k softmax(s_k V_k T_k^T) the average of the
teachers, of any widths; S' and P' are text -> image. Averaging after the softmax keeps each teacher's own temperature.
"""

from dataclasses import replace

from torch import Tensor

from clipress.compress.losses import LOSSES, Loss, soft_cross_entropy
from clipress.errors import RecipeError
from clipress.tasks.training import Batch, Sizes


@LOSSES.register("ensemble")
class Ensemble(Loss):
    """Cross-entropy of the student's similarity distributions against the mean of the teachers'."""

    needs = frozenset({"pairs", "teacher"})

    class Settings(Loss.Settings):
        scales: tuple[float, ...] | None = None
        """Logit scale per teacher. Default: each teacher's own. MobileCLIP uses 100, MobileCLIP2 70 and 60."""

    def __init__(self, settings: Settings, sizes: Sizes) -> None:
        super().__init__(settings, sizes)
        if settings.scales is not None and len(settings.scales) != len(sizes.teachers):
            raise RecipeError(
                f"ensemble: expected one of 'scales' per teacher ({len(sizes.teachers)}), found {len(settings.scales)}. "
                "Set one per teacher, or leave 'scales' out."
            )

    def forward(self, batch: Batch) -> Tensor:
        scales = self.settings.scales or [teacher.scale for teacher in batch.teachers]
        rows = [replace(one, scale=scale).similarities() for one, scale in zip(batch.teachers, scales, strict=True)]
        targets = (sum(logits.softmax(-1) for logits in way) / len(way) for way in zip(*rows, strict=True))
        pairs = zip(batch.student.similarities(), targets, strict=True)
        return sum(soft_cross_entropy(own, target) for own, target in pairs) / 2
