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
class Batch:
    """What a loss may look at."""

    student: Features
    teacher: Features | None  # no gradients
    targets: Tensor  # [B, N], rows sum to one; several right answers share the mass


Term = Callable[[Batch], Tensor]


def _terms() -> dict[str, tuple[Term, bool, float]]:
    from clipress.compress.losses.affinity import affinity
    from clipress.compress.losses.contrastive import contrastive
    from clipress.compress.losses.feature import feature
    from clipress.compress.losses.interactive import interactive

    # name: (function, whether it needs a teacher, weight where a recipe gives none)
    return {
        "contrastive": (contrastive, False, 1.0),
        "affinity": (affinity, True, 1.0),
        "feature": (feature, True, 2000.0),
        "interactive": (interactive, True, 1.0),
    }


def weights_of(losses: Mapping[str, float] | tuple[str, ...], where: str) -> dict[str, float]:
    """Check the names in a recipe and fill in the published weights for a plain list of names."""
    terms = _terms()
    for name in losses:
        if name not in terms:
            raise RecipeError(f"{where}: there is no loss '{name}'.{nearest(name, terms)}")
    if isinstance(losses, Mapping):
        return {name: float(weight) for name, weight in losses.items()}
    return {name: terms[name][2] for name in losses}


def needs_teacher(weights: Mapping[str, float]) -> bool:
    """Tell whether any term compares with a teacher."""
    terms = _terms()
    return any(terms[name][1] for name in weights)


def compute(weights: Mapping[str, float], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted sum and each weighted term."""
    terms = _terms()
    parts = {name: weight * terms[name][0](batch) for name, weight in weights.items()}
    return torch.stack(list(parts.values())).sum(), parts


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over rows of -sum(targets * log_softmax(logits)); both [B, N]."""
    return -(targets * logits.log_softmax(-1)).sum(-1).mean()
