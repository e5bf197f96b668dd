"""Loss terms, one file each. A recipe lists them by name, with weights or settings.

To add one, write a file with a `Loss` that is registered under its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import AfterValidator
from torch import Tensor, nn

from clipress.errors import RecipeError
from clipress.recipe import Section, checked
from clipress.registry import Registry
from clipress.tasks import Task
from clipress.tasks.clip import MAX_LOG_SCALE, SIDES
from clipress.tasks.training import Batch, Sizes

VERSION_1 = {"ita": "momentum-contrastive", "labels": "classification", "ce": "embedding-ce", "kl": "embedding-kl"}
"""Losses that version 1 had under other names."""


def _renamed(losses: Any) -> Any:
    """Replace names of version 1, unless a plugin has a loss of that name or the new name is given too."""
    names = {name: new for name, new in VERSION_1.items() if name not in LOSSES and new not in losses}
    if isinstance(losses, dict):
        return {names.get(name, name): value for name, value in losses.items()}
    return tuple(names.get(name, name) for name in losses)


Losses = Annotated[dict[str, float | dict[str, Any]] | tuple[str, ...], AfterValidator(_renamed)]
"""Losses in a recipe: a list of names, or a mapping from names to weights or settings."""

LOSSES: Registry[type[Loss]] = Registry("loss", "clipress.compress.losses")


class Loss(nn.Module):
    """One loss term: a scalar computed from a batch. It may have parameters of its own, such as projections or scales."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Requirements of the loss, any of: `pairs` (embeddings of both towers), `teacher`, `space` (embeddings are compared
    with the teacher's, projected if the widths differ), `width` (teacher and student must have the same width), `keys`
    (both towers of the teacher), `momentum`, `tokens`, `masked`, `labels`, `logits` (scores of a classifier, or of next tokens),
    `words` (next tokens), `matches` (scores of right and wrong pairs), `matches_of_all` (wrong ones from all processes)."""

    class Settings(Section):
        """Settings in a recipe; `weight` defaults to the published value."""

        weight: float = 1.0

    def __init__(self, settings: Settings, sizes: Sizes) -> None:
        super().__init__()
        self.settings = settings

    @classmethod
    def needs_with(cls, settings: Loss.Settings) -> frozenset[str]:
        """Return the requirements under these settings, `needs` and maybe more."""
        return cls.needs

    def mask_patches(self, pixels: Tensor, draw: Callable[..., Tensor]) -> Tensor:
        """Mask the images [B, 3, S, S] for a loss that needs `masked`; `draw(*shape)` is uniform noise [B, *shape]."""
        raise NotImplementedError


class Scale(nn.Module):
    """A learnable logit scale, initially 1 / 0.07. `published` omits the exp like CLIP-KD's code (initially 2.66)."""

    def __init__(self, published: bool = False) -> None:
        super().__init__()
        self.log, self.published = nn.Parameter(torch.tensor(math.log(1 / 0.07))), published

    def forward(self) -> Tensor:
        return self.log if self.published else self.log.exp()


def loss_type(name: str, where: str) -> type[Loss]:
    """Return the class of a loss. Raises RecipeError for an unknown name."""
    return LOSSES.find(name, where)


def terms_from(losses: Mapping[str, Any] | tuple[str, ...], where: str) -> dict[str, Loss.Settings]:
    """Validate a recipe's losses and fill in default weights and settings."""
    named = losses.items() if isinstance(losses, Mapping) else ((name, {}) for name in losses)
    terms = {}
    for name, value in named:
        settings = loss_type(name, where).Settings
        if isinstance(value, settings):
            terms[name] = value
        else:
            given = {"weight": value} if isinstance(value, float | int) else value
            terms[name] = checked(settings, given, f"{where}.{name}")
    return terms


def needs_of(terms: Mapping[str, Loss.Settings]) -> frozenset[str]:
    """Return the combined requirements of the terms."""
    return frozenset().union(*(loss_type(name, "losses").needs_with(settings) for name, settings in terms.items()))


def check_losses(terms: Mapping[str, Loss.Settings], task: Task, where: str) -> None:
    """Raise RecipeError for a loss that needs something the task does not provide."""
    for name in terms:
        if lacking := sorted(loss_type(name, where).needs - task.provides):
            raise RecipeError(
                f"{where}: loss '{name}' requires {', '.join(lacking)}, which task {task.name} does not provide. Choose "
                "another loss."
            )


class Objective(nn.Module):
    """The weighted loss terms of a stage, with their parameters and the projections into the teacher's space.

    Parameters are initialized from `seed`, identically on every process.
    """

    def __init__(self, terms: Mapping[str, Loss.Settings], sizes: Sizes, seed: int = 0) -> None:
        super().__init__()
        self.terms, self.needs = dict(terms), needs_of(terms)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.losses = nn.ModuleDict(
                {name: loss_type(name, "losses")(settings, sizes) for name, settings in terms.items()}
            )
            # As in CLIP-KD, each tower gets a linear projection, but only if the widths differ.
            apart = "space" in self.needs and sizes.teachers and sizes.student != sizes.teachers[0]
            maps = {side: nn.Linear(sizes.student, sizes.teachers[0]) for side in SIDES} if apart else {}
            self.projections = nn.ModuleDict(maps)

    @classmethod
    def needs_with(cls, settings: Loss.Settings) -> frozenset[str]:
        """Return the requirements under these settings, `needs` and maybe more."""
        return cls.needs

    def mask_patches(self, pixels: Tensor, draw: Callable[..., Tensor]) -> Tensor:
        """Mask the images for the one term that needs `masked`."""
        return next(loss for loss in self.losses.values() if "masked" in loss.needs).mask_patches(pixels, draw)

    @torch.no_grad()
    def clamp_scales(self) -> None:
        """Clamp the losses' own logit scales to CLIP's range, 1 to 100."""
        for module in self.modules():
            if isinstance(module, Scale) and not module.published:
                module.log.clamp_(0, MAX_LOG_SCALE)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum and each weighted term."""
        parts = {name: settings.weight * self.losses[name](batch) for name, settings in self.terms.items()}
        return torch.stack(list(parts.values())).sum(), parts


def each_side(batch: Batch, kind: str = "{}") -> list[tuple[Tensor, Tensor]]:
    """Return (student, teacher) embeddings [B, D] of every trained tower, L2-normalized, or raw with `raw_{}`."""
    names = [kind.format(side) for side in batch.sides]
    return [(getattr(batch.matched, name), getattr(batch.teacher, name)) for name in names]


def crossed_logits(batch: Batch, scale: Tensor) -> list[Tensor]:
    """Return the student's similarities [B, N] to the teacher's embeddings of the other tower, per trained tower."""
    own, keys = batch.matched, {"image": batch.teacher.all_text, "text": batch.teacher.all_image}
    return [scale * getattr(own, side) @ keys[side].T for side in batch.sides]


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over rows of -sum(targets * log_softmax(logits)); both [B, N]."""
    return -(targets * logits.log_softmax(-1)).sum(-1).mean()


def kl_divergence(logits: Tensor, target_logits: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over rows of KL(softmax(target_logits) || softmax(logits)), both [B, N], or their sum with weights [B]."""
    rows = F.kl_div(logits.log_softmax(-1), target_logits.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    return rows.mean() if weights is None else (weights * rows).sum()
