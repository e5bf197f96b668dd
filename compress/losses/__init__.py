"""Loss terms, one file each. A recipe names them, with weights or settings; a term that is absent is not computed.

To add one: a file with a `Loss`, and a line in `TERMS`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipress.errors import RecipeError, nearest
from clipress.recipe import Section, checked

SIDES = ("image", "text")
MAX_LOG_SCALE = math.log(100)  # CLIP's clamp
Losses = dict[str, float | dict[str, Any]] | tuple[str, ...]
"""How a recipe writes losses: names; names with weights; names with settings."""

TERMS = {
    "contrastive": "contrastive.Contrastive",
    "affinity": "affinity.Affinity",
    "crd": "crd.Crd",
    "ensemble": "ensemble.Ensemble",
    "feature": "feature.Feature",
    "masked-feature": "masked_feature.MaskedFeature",
    "interactive": "interactive.Interactive",
    "cross": "cross.Cross",
    "gradient": "gradient.Gradient",
    "fused": "fused.Fused",
    "tokens": "tokens.Tokens",
    "mse": "mse.Mse",
    "l1": "l1.L1",
    "huber": "huber.Huber",
    "kl": "kl.Kl",
    "ce": "ce.Ce",
    "labels": "labels.Labels",
    "ita": "ita.Ita",
    "upop-kd": "upop_kd.UpopKd",
}


@dataclass(frozen=True)
class Features:
    """What one model makes of a batch. B: this process's pairs; N: all processes' pairs; D: embedding.

    A model that was not asked for a side has None there.
    """

    image: Tensor | None  # [B, D], L2-normalised
    text: Tensor | None  # [B, D]
    all_image: Tensor | None  # [N, D], gathered with gradients; row `offset + i` is image[i]
    all_text: Tensor | None  # [N, D]
    scale: Tensor  # (), exp(logit_scale)
    raw_image: Tensor | None = None  # [B, D], before normalisation
    raw_text: Tensor | None = None
    image_tokens: Tensor | None = None  # [B, n, W]: the tower's last layer, before pooling and projection
    text_tokens: Tensor | None = None  # [B, L, W]
    masked_image: Tensor | None = None  # [B, D], L2-normalised: of the picture with most patches hidden

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
    teachers: tuple[Features, ...]  # no gradients
    targets: Tensor  # [B, N], rows sum to one; several right answers share the mass
    groups: Tensor | None = None  # [N]: pairs of one group are right answers to one another
    momentum: Momentum | None = None
    projected: Features | None = None
    """The student in the (first) teacher's space, where their widths differ; see `matched`."""
    labels: Tensor | None = None  # [B], the row of `classes`; -1: none
    all_labels: Tensor | None = None  # [N]
    classes: Tensor | None = None  # [C, D]: the first teacher's text classifier, L2-normalised
    masks_move: bool = False
    """Whether a search changes its masks after this step."""
    sides: tuple[str, ...] = SIDES
    """The towers that learn."""

    @property
    def teacher(self) -> Features:
        """The first teacher."""
        return self.teachers[0]

    @property
    def matched(self) -> Features:
        """The student's embeddings as they are compared with the teacher's: projected if their widths differ."""
        return self.projected or self.student


@dataclass(frozen=True)
class Sizes:
    """What a loss may need to know before training: widths of embeddings, and what to check."""

    student: int
    teachers: tuple[int, ...] = ()
    sides: tuple[str, ...] = SIDES  # the towers that learn
    image: tuple[int, int] | None = None  # height and width in pixels
    student_tokens: Mapping[str, tuple[int, int]] | None = None  # per side that learns: how many, and their width
    teacher_tokens: Mapping[str, tuple[int, int]] | None = None


class Loss(nn.Module):
    """One term: a scalar from a batch. What it learns itself (projections, scales) are its parameters."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Of: pairs (both towers' embeddings), teacher, space (embeddings are compared with the teacher's, projected where
    widths differ), width (the teacher's must be the student's), keys (both of the teacher's towers), momentum, tokens,
    masked, labels."""

    class Settings(Section):
        """What a recipe may set; `weight` is the published one."""

        weight: float = 1.0

    def __init__(self, settings: Settings, sizes: Sizes) -> None:
        super().__init__()
        self.settings = settings

    def hide(self, pixels: Tensor, draw: Callable[..., Tensor]) -> Tensor:
        """Return the pictures [B, 3, S, S] as a `masked` term wants them; `draw(*shape)` is uniform noise [B, *shape]."""
        raise NotImplementedError


class Scale(nn.Module):
    """A learnable factor on similarities, at first 1 / 0.07; `published`: CLIP-KD's, which forgets the exp (2.66)."""

    def __init__(self, published: bool = False) -> None:
        super().__init__()
        self.log, self.published = nn.Parameter(torch.tensor(math.log(1 / 0.07))), published

    def forward(self) -> Tensor:
        return self.log if self.published else self.log.exp()


def loss_type(name: str, where: str) -> type[Loss]:
    """Return the class of a named term."""
    if name not in TERMS:
        raise RecipeError(f"{where}: there is no loss '{name}'.{nearest(name, TERMS)}")
    module, cls = TERMS[name].split(".")
    return getattr(importlib.import_module(f"clipress.compress.losses.{module}"), cls)


def terms_from(losses: Mapping[str, Any] | tuple[str, ...], where: str) -> dict[str, Loss.Settings]:
    """Check what a recipe says of losses and fill in published weights and settings."""
    asked = losses.items() if isinstance(losses, Mapping) else ((name, {}) for name in losses)
    terms = {}
    for name, value in asked:
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
            maps = {side: nn.Linear(sizes.student, sizes.teachers[0]) for side in SIDES} if apart else {}
            self.projections = nn.ModuleDict(maps)

    def hide(self, pixels: Tensor, draw: Callable[..., Tensor]) -> Tensor:
        """Return the pictures with patches hidden, for the one term that asks for it."""
        return next(loss for loss in self.losses.values() if "masked" in loss.needs).hide(pixels, draw)

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


def positives(groups: Tensor, all_groups: Tensor) -> Tensor:
    """Return the targets [B, N] of rows in `groups` [B] among `all_groups` [N]: uniform over a row's right answers."""
    same = (groups[:, None] == all_groups[None, :]).float()
    return same / same.sum(1, keepdim=True)


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
