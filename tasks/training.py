"""What passes between a training step, a task and the losses: features of a batch, sizes, and what a lesson is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from clipress.models.load import Model

Outputs = Mapping[str, Tensor]
"""What a training module returns: rows [B, ...] by name, and `scale` (), where there is one."""


@dataclass(frozen=True)
class Features:
    """One model's outputs for a batch. B: this process's rows; N: all processes' rows; D: embedding; C: classes.

    What a task does not have, or a step did not compute, is None.
    """

    image: Tensor | None = None  # [B, D], L2-normalised
    text: Tensor | None = None  # [B, D]
    all_image: Tensor | None = None  # [N, D], gathered with gradients; row `offset + i` is image[i]
    all_text: Tensor | None = None  # [N, D]
    scale: Tensor | None = None  # (), exp(logit_scale)
    raw_image: Tensor | None = None  # [B, D], before normalization
    raw_text: Tensor | None = None
    image_tokens: Tensor | None = None  # [B, n, W]: the tower's last layer, before pooling and projection
    text_tokens: Tensor | None = None  # [B, L, W]
    masked_image: Tensor | None = None  # [B, D], L2-normalised: of the image with most patches masked
    logits: Tensor | None = None  # [B, C]: a classifier's scores, before the softmax

    def similarities(self) -> tuple[Tensor, Tensor]:
        """Return scaled similarities, image -> text and text -> image: [B, N] each."""
        return self.scale * self.image @ self.all_text.T, self.scale * self.text @ self.all_image.T


@dataclass(frozen=True)
class Momentum:
    """A slow copy's features of a batch, and of past ones. M = N + queue. No gradients."""

    image: Tensor  # [B, D]
    text: Tensor  # [B, D]
    all_image: Tensor  # [M, D]: the slow copy's features of this batch, then past online features
    all_text: Tensor  # [M, D]
    teacher_image: Tensor | None  # [M, D]: the teacher's features of the same pairs
    teacher_text: Tensor | None
    targets: Tensor  # [B, M], rows sum to one
    alpha: float  # weight of the slow copy's opinion in the targets


@dataclass(frozen=True)
class Batch:
    """Everything a loss may read."""

    student: Features
    teachers: tuple[Features, ...]  # no gradients
    targets: Tensor | None = None  # [B, N], rows sum to one; several right answers share the mass
    groups: Tensor | None = None  # [N]: pairs of one group are right answers to one another
    momentum: Momentum | None = None
    projected: Features | None = None
    """The student in the (first) teacher's space, where their widths differ; see `matched`."""
    labels: Tensor | None = None  # [B], the column of `class_scores`; -1: none
    all_labels: Tensor | None = None  # [N]
    classes: Tensor | None = None  # [C, D]: the first teacher's text classifier, L2-normalised
    masks_move: bool = False
    """Whether a search changes its masks after this step."""
    sides: tuple[str, ...] = ()
    """The towers that learn."""

    @property
    def teacher(self) -> Features:
        """The first teacher."""
        return self.teachers[0]

    @property
    def matched(self) -> Features:
        """The student's embeddings as they are compared with the teacher's: projected if their widths differ."""
        return self.projected or self.student

    def class_scores(self, scale: float) -> Tensor:
        """Return scores [B, C] of the classes: a classifier's own, or `scale` times the similarities to `classes`."""
        if self.student.logits is not None:
            return self.student.logits
        return scale * self.matched.image @ self.classes.T


@dataclass(frozen=True)
class Sizes:
    """What a loss may need to know before training: widths of embeddings, and what to check."""

    student: int
    """Dimensions of the embedding, or classes of a classifier."""
    teachers: tuple[int, ...] = ()
    sides: tuple[str, ...] = ()  # the towers that learn
    image: tuple[int, int] | None = None  # height and width in pixels
    student_tokens: Mapping[str, tuple[int, int]] | None = None  # per side that learns: how many, and their width
    teacher_tokens: Mapping[str, tuple[int, int]] | None = None


@dataclass(frozen=True)
class TrainingJob:
    """What one stage is to learn from, and what its losses need."""

    title: str
    student: Model
    teachers: tuple[Model, ...]
    needs: frozenset[str]
    """Of the losses, see `losses.Loss.needs`."""
    same_width: tuple[str, ...]
    """Names of the losses that compare embeddings of one width."""
    towers: str
    """The setting: `both`, or the name of the tower that learns."""
    sources: tuple[Any, ...]
    """The training sources."""
    cached: bool
    """Whether teachers' answers come from caches."""

    def sources_have(self, what: str) -> bool:
        """Tell whether every training source has `images`, or `texts`."""
        return all(getattr(source, f"has_{what}") for source in self.sources)


@dataclass(frozen=True)
class Gather:
    """How rows of all processes come together. With `local`, a process scores its own rows against all."""

    rows: Callable[[Tensor], Tensor]
    local: bool

    def own(self, rows: Tensor) -> Tensor:
        """Return the rows that a process scores: its own, or all."""
        return rows if self.local else self.rows(rows)


class Lesson(ABC):
    """How a model learns in one stage: the module that a step calls, and the batch that losses read of its outputs."""

    needs: frozenset[str]
    """Of the losses, and what the task needs to serve them."""
    learning: tuple[str, ...]
    """The towers that learn."""
    sizes: Sizes

    @abstractmethod
    def module(self, module: nn.Module) -> nn.Module:
        """Wrap a student or teacher so that its forward(**inputs) returns `Outputs` and DDP sees every parameter used.

        It has `close()`, which leaves the wrapped module without hooks.
        """

    @abstractmethod
    def inputs(self, arrays: Mapping[str, Tensor], mask: Callable[[Tensor], Tensor] | None) -> dict[str, Tensor]:
        """Return the student's inputs; `mask` hides patches, for a loss that needs it."""

    @abstractmethod
    def teacher_inputs(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what a teacher that runs is shown."""

    @abstractmethod
    def batch(
        self,
        outputs: Outputs,
        teachers: Sequence[Outputs],
        arrays: Mapping[str, Tensor],
        projections: Mapping[str, nn.Module],
        gather: Gather,
    ) -> Batch:
        """Gather from the other processes what the losses read."""

    @abstractmethod
    def cached_outputs(self, arrays: Mapping[str, Tensor], teacher: int, scale: float | None) -> Outputs:
        """Return what a teacher's module would have returned, from the arrays that the loader read of its cache."""

    def momentum(
        self, slow: Outputs, batch: Batch, arrays: Mapping[str, Tensor], past: Mapping[str, Tensor], gather: Gather
    ) -> tuple[Momentum, dict[str, Tensor]]:
        """Return a slow copy's view of a batch and of `past`, and the rows of the batch to put in front of `past`."""
        raise NotImplementedError("a task that provides momentum defines this")

    def keep_in_range(self, module: nn.Module) -> None:  # noqa: B027
        """Bound what the task bounds after each update, such as a temperature."""
