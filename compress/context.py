"""What a training stage is given: its settings, what it may use besides its student, and where it may hook in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from torch import Tensor

from clipress.compress.fabric import Runtime
from clipress.data.pairs import DataSpec, open_source
from clipress.data.teacher_cache import TeacherCache
from clipress.errors import RecipeError
from clipress.models.load import Model
from clipress.recipe import Section

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Training(Section):
    """Settings every stage that learns has."""

    name: str | None = None
    """Name of the artefact; default: the stage's."""
    steps: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0)
    """Passes over the first training source, instead of steps."""
    batch_size: int = Field(128, ge=2)
    """Pairs per step, all processes together."""
    lr: float = Field(1e-4, ge=0)
    weight_decay: float = Field(0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.98)
    warmup: float = Field(0.1, ge=0, lt=1)
    """Part of the steps in which the rate rises."""
    decay: Literal["cosine", "constant"] = "cosine"
    """Then it falls to zero as a half cosine, or stays."""
    clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    queue: int = Field(0, ge=0)
    """Past pairs that losses with a momentum twin contrast with; UPop keeps 57,600."""
    towers: Literal["both", "image", "text"] = "both"
    """Which towers learn; the other one is frozen, and not even run where no loss looks at it."""

    def model_post_init(self, _: Any) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise RecipeError("A stage that trains needs either 'steps' or 'epochs'.")


@dataclass(frozen=True)
class Context:
    """What a stage may use besides its settings and its student."""

    fabric: Fabric
    data: DataSpec
    seed: int
    teachers: tuple[Model, ...] = ()
    runtime: Runtime = field(default_factory=Runtime)
    log: Path | None = None
    """JSON lines; None keeps none."""
    caches: tuple[tuple[TeacherCache, ...], ...] = ()
    """What teachers say of the training data, per source and teacher; empty: they are run."""
    checkpoints: Path | None = None
    """Folder of this stage's checkpoints; None writes and reads none."""
    title: str = ""
    say: Callable[[str], None] = lambda _: None
    """Where lines for the user go."""

    def sources(self) -> list[Any]:
        """Open the training sources."""
        return [open_source(spec) for spec in self.data.train]


class Hook:
    """What a stage may do at fixed points of a step."""

    def before(self, step: int, arrays: Mapping[str, Tensor]) -> None:
        """Called before the forward pass, with the batch."""

    def moves(self, step: int) -> bool:
        """Tell whether this hook changes masks after this step; some losses are told."""
        return False

    def after_part(self, step: int) -> None:
        """Called after each part's backward pass: once a step, unless the batch is worked through in parts."""

    def after_backward(self, step: int) -> None:
        """Called when all gradients are there and finite."""

    def after_update(self, step: int) -> None:
        """Called when the weights have moved."""

    def state(self) -> dict[str, Any]:
        """Return what the next step depends on, for a checkpoint."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""


def steps_of(config: Training, context: Context) -> int:
    """Return how many steps a stage takes."""
    if config.steps is not None:
        return config.steps
    shares = [spec.share for spec in context.data.train]
    per_step = config.batch_size * shares[0] / sum(shares)
    return max(math.ceil(config.epochs * len(context.sources()[0]) / per_step), 1)
