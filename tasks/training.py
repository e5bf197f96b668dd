"""The interface between the training step, tasks and losses: features of a batch, sizes, and the `Lesson` class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from clipress.data.vocabulary import translation
from clipress.errors import RecipeError
from clipress.models import anatomy
from clipress.models.load import Model

TOKENS = "_tokens"
Outputs = Mapping[str, Tensor]
"""What a training module returns: rows [B, ...] by name, and a scalar `scale` if the model has one."""


@dataclass(frozen=True)
class Features:
    """One model's outputs for a batch. B: this process's rows; N: all processes' rows; D: embedding; C: classes.

    Fields that a task does not have or a step did not compute are None.
    """

    image: Tensor | None = None  # [B, D], L2-normalized
    text: Tensor | None = None  # [B, D]
    all_image: Tensor | None = None  # [N, D], gathered with gradients; row `offset + i` is image[i]
    all_text: Tensor | None = None  # [N, D]
    scale: Tensor | None = None  # (), exp(logit_scale)
    raw_image: Tensor | None = None  # [B, D], before normalization
    raw_text: Tensor | None = None
    tokens: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # [B, n, W] by tower: its last layer before pooling and projection
    masked_image: Tensor | None = None  # [B, D], L2-normalized, of images with most patches masked
    logits: Tensor | None = (
        None  # [B, C], a classifier's scores before softmax; of a Segmenter one row per patch, of texts per token
    )
    scores: Tensor | None = None  # [B, C, h, w], a Segmenter's scores of patches
    matches: Tensor | None = None  # [B, 3, 2], logits of a right pair and two wrong ones; class 1: it belongs together

    def similarities(self) -> tuple[Tensor, Tensor]:
        """Return scaled similarities, image -> text and text -> image: [B, N] each."""
        return self.scale * self.image @ self.all_text.T, self.scale * self.text @ self.all_image.T


@dataclass(frozen=True)
class Momentum:
    """The EMA model's features of a batch and of past batches. M = N + queue size. No gradients."""

    image: Tensor  # [B, D]
    text: Tensor  # [B, D]
    all_image: Tensor  # [M, D], EMA features of this batch, then past online features
    all_text: Tensor  # [M, D]
    teacher_image: Tensor | None  # [M, D], the teacher's features of the same pairs
    teacher_text: Tensor | None
    targets: Tensor  # [B, M], rows sum to one
    alpha: float  # weight of the EMA model's predictions in the targets


@dataclass(frozen=True)
class Batch:
    """Everything a loss can read."""

    student: Features
    teachers: tuple[Features, ...]  # no gradients
    targets: Tensor | None = None  # [B, N], rows sum to one, uniform over the positives
    groups: Tensor | None = None  # [N], pairs of the same group are positives of each other
    momentum: Momentum | None = None
    projected: Features | None = None
    """The student projected into the (first) teacher's space if the widths differ; see `matched`."""
    labels: Tensor | None = None  # [B], columns of `class_scores`; -1 for no label
    all_labels: Tensor | None = None  # [N]
    classes: Tensor | None = None  # [C, D], the first teacher's text classifier, L2-normalized
    masks_move: bool = False
    """Whether a pruning search updates its masks after this step."""
    sides: tuple[str, ...] = ()
    """The trained towers."""
    other_labels: Tensor | None = None  # [B], of the images that were mixed in
    masks: Tensor | None = None  # [B, S, S], the label of every pixel; 255 does not count
    all_masks: Tensor | None = None  # [N, S, S]
    shares: Tensor | None = None  # [B], of an image's own pixels in a mixed one
    match_weights: Tensor | None = (
        None  # [B, 3], of the student's `matches`: 0 for a pair that should be wrong and is right
    )
    all_match_weights: Tensor | None = None  # [N, 3]
    weights: Tensor | None = None  # [B], of the rows of logits where these are tokens, whose `labels` are the next ones

    @property
    def teacher(self) -> Features:
        """The first teacher."""
        return self.teachers[0]

    @property
    def matched(self) -> Features:
        """The student's embeddings to compare with the teacher's: projected if the widths differ."""
        return self.projected or self.student

    def class_scores(self, scale: float) -> Tensor:
        """Return class scores [B, C]: a classifier's logits, or `scale` times the similarities to `classes`."""
        if self.student.logits is not None:
            return self.student.logits
        return scale * self.matched.image @ self.classes.T


@dataclass(frozen=True)
class Sizes:
    """Sizes that losses use to build their parameters and to validate their settings."""

    student: int
    """Width of the embedding, or number of classes of a classifier."""
    teachers: tuple[int, ...] = ()
    sides: tuple[str, ...] = ()  # the trained towers
    image: tuple[int, int] | None = None  # height and width in pixels
    student_tokens: Mapping[str, tuple[int, int]] | None = None  # per trained tower: number of tokens, and their width
    teacher_tokens: Mapping[str, tuple[int, int]] | None = None


@dataclass(frozen=True)
class TrainingJob:
    """The models and data of one training stage, and the requirements of its losses."""

    title: str
    student: Model
    teachers: tuple[Model, ...]
    needs: frozenset[str]
    """Requirements of the losses, see `losses.Loss.needs`."""
    same_width: tuple[str, ...]
    """Names of the losses that require teacher and student to have the same width."""
    towers: str
    """The setting `towers`: `both`, or the name of the tower to train."""
    sources: tuple[Any, ...]
    """The training sources."""
    cached: bool
    """Whether teacher outputs are read from caches."""
    rows_of_all: Callable[[Tensor], Tensor] = lambda rows: rows
    """Gathers rows from all processes, with gradients."""

    def refuse_other_inputs(self, teacher: Model) -> None:
        """Raise RecipeError if a teacher that runs needs other ids than the student, or a cache lacks what losses read."""
        if self.cached and "tokens" in self.needs:
            raise RecipeError(
                f"{self.title}: loss 'tokens' requires a teacher that runs, since its cache has no token features. Remove "
                "'tokens' or 'teacher.cache'."
            )
        own, other = self.student.tokenizer, teacher.tokenizer
        if own != other and self.ids_for(teacher) is None and not self.cached:
            raise RecipeError(
                f"{self.title}: expected the same tokenizer for teacher and student, found {other!s:.200} and "
                f"{own!s:.200}. Set 'teacher.cache' to use different ones."
            )

    def refuse_other_labels(self, teacher: Model) -> None:
        """Raise RecipeError if a teacher has other classes than the student, or the same in another order."""
        if teacher.architecture["labels"] != self.student.architecture["labels"]:
            raise RecipeError(
                f"{self.title}: expected the same classes in the same order for teacher and student, found different ones. "
                "Leave the student's labels out."
            )

    def refuse_other_classes(self, source: Any) -> None:
        """Raise RecipeError if a labeled source has other classes than the student, or the same in another order."""
        labels, names = self.student.architecture["labels"], source.classes.names
        if list(names) != labels:
            raise RecipeError(
                f"{self.title}: expected the student's {len(labels)} labels ({', '.join(labels[:3])}, ...) as the classes of "
                f"{source.name}, found {len(names)} ({', '.join(names[:3])}, ...). Use the same names in the same order."
            )

    def ids_for(self, teacher: Model) -> Tensor | None:
        """Return the teacher's id of each of the student's tokens, int64 [tokens], if the student's vocabulary is reduced."""
        if self.student.tokenizer is None or teacher.tokenizer is None:
            return None
        found = translation(self.student.tokenizer, teacher.tokenizer)
        return None if found is None else torch.from_numpy(found)

    def sizes(self, width: Callable[[Model], int], learning: Sequence[str]) -> Sizes:
        """Return the sizes that losses read; `width` gives a model's embedding width or number of classes."""

        def token_shapes(model: Model) -> dict[str, tuple[int, int]]:
            return {tower: anatomy.token_shape(model.module, tower) for tower in learning if "tokens" in self.needs}

        return Sizes(
            width(self.student),
            tuple(width(teacher) for teacher in self.teachers),
            tuple(learning),
            anatomy.image_size(self.student.module),
            student_tokens=token_shapes(self.student),
            teacher_tokens=token_shapes(self.teachers[0]) if self.teachers else None,
        )

    def sources_have(self, what: str) -> bool:
        """Return whether every training source has `images` or `texts`."""
        return all(getattr(source, f"has_{what}") for source in self.sources)


@dataclass(frozen=True)
class Gather:
    """Gathers rows from all processes. With `local`, each process computes the loss of its own rows only."""

    rows: Callable[[Tensor], Tensor]
    local: bool

    def own_tokens(self, outputs: Outputs) -> dict[str, Tensor]:
        """Return the token features among a module's outputs, by tower."""
        return {name.removesuffix(TOKENS): self.own(rows) for name, rows in outputs.items() if name.endswith(TOKENS)}

    def own(self, rows: Tensor) -> Tensor:
        """Return the rows that this process computes the loss for: its own, or all."""
        return rows if self.local else self.rows(rows)


def features_of_logits(outputs: Outputs, gather: Gather) -> Features:
    """Return the features of a module that gives one row of logits per item, and token features if they are hooked."""
    return Features(logits=gather.own(outputs["logits"]), tokens=gather.own_tokens(outputs))


class TrainingModule(nn.Module):
    """Base class of what a training step calls: a model, with hooks on the towers whose token features losses read."""

    def __init__(self, model: nn.Module, towers: Sequence[str] = ()) -> None:
        super().__init__()
        self.model, self._tokens = model, dict[str, Tensor]()
        layers = {tower: anatomy.token_layer(model, tower) for tower in towers}
        self._handles = [
            layer.register_forward_hook(lambda _, __, out, tower=tower: self._tokens.update({tower: out}))
            for tower, layer in layers.items()
        ]

    def take_tokens(self) -> dict[str, Tensor]:
        """Return the token features of the last forward pass, `<tower>_tokens` [B, n, W], and forget them."""
        tokens = {f"{tower}{TOKENS}": rows.float() for tower, rows in self._tokens.items()}
        self._tokens.clear()
        return tokens

    def close(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()


class Lesson(ABC):
    """How a task trains in one stage: the module that a step calls, and the batch that losses read."""

    needs: frozenset[str]
    """Requirements of the losses, plus what the task needs to satisfy them."""
    learning: tuple[str, ...]
    """The trained towers."""
    sizes: Sizes

    @abstractmethod
    def module(self, module: nn.Module) -> TrainingModule:
        """Wrap a student or teacher so that forward(**inputs) returns `Outputs` and DDP sees all parameters used."""

    @abstractmethod
    def inputs(self, arrays: Mapping[str, Tensor], mask: Callable[[Tensor], Tensor] | None) -> dict[str, Tensor]:
        """Return the student's inputs; `mask` masks patches for losses that need it."""

    def teacher_inputs(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the inputs of a teacher that is not cached: those of the student, unmasked."""
        return self.inputs(arrays, None)

    @abstractmethod
    def batch(
        self,
        outputs: Outputs,
        teachers: Sequence[Outputs],
        arrays: Mapping[str, Tensor],
        projections: Mapping[str, nn.Module],
        gather: Gather,
    ) -> Batch:
        """Build the batch that the losses read, gathering rows from all processes."""

    @abstractmethod
    def cached_outputs(self, arrays: Mapping[str, Tensor], teacher: int, scale: float | None) -> Outputs:
        """Rebuild the outputs of a teacher's module from the cached arrays in a batch."""

    def momentum(
        self,
        outputs: Outputs,
        batch: Batch,
        arrays: Mapping[str, Tensor],
        past: Mapping[str, Tensor],
        gather: Gather,
        alpha: float,
    ) -> tuple[Momentum, dict[str, Tensor]]:
        """Return the EMA model's features of a batch and of `past`, and the rows of the batch to prepend to `past`.

        `outputs` are the EMA model's outputs, `alpha` the weight of its predictions in the targets.
        """
        raise NotImplementedError("a task that provides momentum defines this")

    def keep_in_range(self, module: nn.Module) -> None:  # noqa: B027
        """Clamp parameters after each update, such as the logit scale."""
