"""Loss terms, one file each. A recipe names them with weights; a term that is absent is not computed.

To add one: a file with a function `(Batch) -> scalar Tensor`, and a line in `TERMS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from clipress.errors import RecipeError, nearest


@dataclass(frozen=True)
class Features:
    """What one model makes of a batch. B: this process's pairs; N: all processes' pairs; D: embedding."""

    image: Tensor  # [B, D], L2-normalised
    text: Tensor  # [B, D]
    all_image: Tensor  # [N, D], gathered with gradients; row `offset + i` is image[i]
    all_text: Tensor  # [N, D]
    scale: Tensor  # (), exp(logit_scale)

    def logits(self) -> tuple[Tensor, Tensor]:
        """Return scaled similarities, image -> text and text -> image: [B, N] each."""
        return self.scale * self.image @ self.all_text.T, self.scale * self.text @ self.all_image.T


@dataclass(frozen=True)
class Momentum:
    """What a slow copy of the student makes of a batch, and of what went before. M = N + queue. No gradients."""

    image: Tensor  # [B, D]
    text: Tensor  # [B, D]
    all_image: Tensor  # [M, D]: the slow copy's features of this batch, then past online features
    all_text: Tensor  # [M, D]
    teacher_image: Tensor | None  # [M, D]: the teacher's features of the same pairs
    teacher_text: Tensor | None
    targets: Tensor  # [B, M], rows sum to one
    share: float  # of the slow copy's opinion in the targets


@dataclass(frozen=True)
class Batch:
    """What a loss may look at."""

    student: Features
    teacher: Features | None  # no gradients
    targets: Tensor  # [B, N], rows sum to one; several right answers share the mass
    momentum: Momentum | None = None
    masks_move: bool = False
    """Whether a search changes its masks after this step."""


Term = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class TermInfo:
    """A loss, what it needs besides the student, and its weight where a recipe gives none (the published one)."""

    compute: Term
    teacher: bool = False
    momentum: bool = False
    weight: float = 1.0


def _terms() -> dict[str, TermInfo]:
    from clipress.compress.losses.affinity import affinity
    from clipress.compress.losses.contrastive import contrastive
    from clipress.compress.losses.feature import feature
    from clipress.compress.losses.interactive import interactive
    from clipress.compress.losses.ita import ita
    from clipress.compress.losses.upop_kd import upop_kd

    return {
        "contrastive": TermInfo(contrastive),
        "affinity": TermInfo(affinity, teacher=True),
        "feature": TermInfo(feature, teacher=True, weight=2000.0),
        "interactive": TermInfo(interactive, teacher=True),
        "ita": TermInfo(ita, momentum=True),
        "upop-kd": TermInfo(upop_kd, teacher=True, momentum=True),
    }


def weights_of(losses: Mapping[str, float] | tuple[str, ...], where: str) -> dict[str, float]:
    """Check the names in a recipe and fill in the published weights for a plain list of names."""
    terms = _terms()
    for name in losses:
        if name not in terms:
            raise RecipeError(f"{where}: there is no loss '{name}'.{nearest(name, terms)}")
    if isinstance(losses, Mapping):
        return {name: float(weight) for name, weight in losses.items()}
    return {name: terms[name].weight for name in losses}


def needs_teacher(weights: Mapping[str, float]) -> bool:
    """Tell whether any term compares with a teacher."""
    terms = _terms()
    return any(terms[name].teacher for name in weights)


def needs_momentum(weights: Mapping[str, float]) -> bool:
    """Tell whether any term looks at a slow copy of the student."""
    terms = _terms()
    return any(terms[name].momentum for name in weights)


def compute(weights: Mapping[str, float], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted sum and each weighted term."""
    terms = _terms()
    parts = {name: weight * terms[name].compute(batch) for name, weight in weights.items()}
    return torch.stack(list(parts.values())).sum(), parts


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over rows of -sum(targets * log_softmax(logits)); both [B, N]."""
    return -(targets * logits.log_softmax(-1)).sum(-1).mean()
