"""Loss terms, one file each. A recipe names them, with weights or settings; an absent term is not computed.

To add one: a file with a `Loss`, registered under its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipress.errors import RecipeError
from clipress.recipe import Section, checked
from clipress.registry import Registry
from clipress.tasks import Task
from clipress.tasks.clip import MAX_LOG_SCALE
from clipress.tasks.training import Batch, Sizes

Losses = dict[str, float | dict[str, Any]] | tuple[str, ...]
"""How a recipe writes losses: names; names with weights; names with settings."""

LOSSES: Registry[type[Loss]] = Registry("loss", "clipress.compress.losses")


class Loss(nn.Module):
    """One term: a scalar from a batch. What it learns itself (projections, scales) are its parameters."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Of: pairs (both towers' embeddings), teacher, space (embeddings are compared with the teacher's, projected where
    widths differ), width (the teacher's must be the student's), keys (both of the teacher's towers), momentum, tokens,
    masked, labels, logits (a classifier's scores)."""

    class Settings(Section):
        """What a recipe may set; `weight` is the published one."""

        weight: float = 1.0

    def __init__(self, settings: Settings, sizes: Sizes) -> None:
        super().__init__()
        self.settings = settings

    def mask_patches(self, pixels: Tensor, draw: Callable[..., Tensor]) -> Tensor:
        """Return the images [B, 3, S, S] as a `masked` term needs them; `draw(*shape)` is uniform noise [B, *shape]."""
        raise NotImplementedError


class Scale(nn.Module):
    """A learnable factor on similarities, at first 1 / 0.07; `published`: CLIP-KD's, which forgets the exp (2.66)."""

    def __init__(self, published: bool = False) -> None:
        super().__init__()
        self.log, self.published = nn.Parameter(torch.tensor(math.log(1 / 0.07))), published

    def forward(self) -> Tensor:
        return self.log if self.published else self.log.exp()


def loss_type(name: str, where: str) -> type[Loss]:
    """Return the class of a named term. Raises RecipeError for an unknown name."""
    return LOSSES.find(name, where)


def terms_from(losses: Mapping[str, Any] | tuple[str, ...], where: str) -> dict[str, Loss.Settings]:
    """Check a recipe's losses and fill in published weights and settings."""
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
    """Return everything the terms need."""
    return frozenset().union(*(loss_type(name, "losses").needs for name in terms))


def check_losses(terms: Mapping[str, Loss.Settings], task: Task, where: str) -> None:
    """Raise RecipeError for a loss that needs what a task does not have."""
    for name in terms:
        if lacking := sorted(loss_type(name, where).needs - task.provides):
            raise RecipeError(
                f"{where}: loss '{name}' needs {', '.join(lacking)}, which task {task.name} does not have."
            )


class Objective(nn.Module):
    """The weighted terms of a stage, with what they learn and the projections into the teacher's space.

    Everything learnable starts the same on every process, from `seed`.
    """

    def __init__(self, terms: Mapping[str, Loss.Settings], sizes: Sizes, seed: int = 0) -> None:
        super().__init__()
        self.terms, self.needs = dict(terms), needs_of(terms)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.losses = nn.ModuleDict(
                {name: loss_type(name, "losses")(settings, sizes) for name, settings in terms.items()}
            )
            # CLIP-KD: a linear map per tower, only where the widths differ
            apart = "space" in self.needs and sizes.teachers and sizes.student != sizes.teachers[0]
            maps = {side: nn.Linear(sizes.student, sizes.teachers[0]) for side in ("image", "text")} if apart else {}
            self.projections = nn.ModuleDict(maps)

    def mask_patches(self, pixels: Tensor, draw: Callable[..., Tensor]) -> Tensor:
        """Return the images with patches masked, for the one term that needs it."""
        return next(loss for loss in self.losses.values() if "masked" in loss.needs).mask_patches(pixels, draw)

    @torch.no_grad()
    def clamp_scales(self) -> None:
        """Keep scales that losses learn where CLIP keeps its own: 1 to 100."""
        for module in self.modules():
            if isinstance(module, Scale) and not module.published:
                module.log.clamp_(0, MAX_LOG_SCALE)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum and each weighted term."""
        parts = {name: settings.weight * self.losses[name](batch) for name, settings in self.terms.items()}
        return torch.stack(list(parts.values())).sum(), parts


def each_side(batch: Batch, kind: str = "{}") -> list[tuple[Tensor, Tensor]]:
    """Return (student's, teacher's) embeddings [B, D] of every tower that learns: unit rows, or `raw_{}` ones."""
    names = [kind.format(side) for side in batch.sides]
    return [(getattr(batch.matched, name), getattr(batch.teacher, name)) for name in names]


def crossed_logits(batch: Batch, scale: Tensor) -> list[Tensor]:
    """Return similarities of the student's rows to the teacher's of the other tower, per tower that learns: [B, N]."""
    own, keys = batch.matched, {"image": batch.teacher.all_text, "text": batch.teacher.all_image}
    return [scale * getattr(own, side) @ keys[side].T for side in batch.sides]


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over rows of -sum(targets * log_softmax(logits)); both [B, N]."""
    return -(targets * logits.log_softmax(-1)).sum(-1).mean()


def kl_divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Mean over rows of KL(softmax(wanted) || softmax(logits)); both [B, N]."""
    return F.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean")
