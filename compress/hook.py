"""Hooks that a stage can run at fixed points of a training step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor


class Hook:
    """Base class of hooks; every method does nothing by default."""

    only_finite: ClassVar[bool] = True
    """Whether `after_backward` and `after_update` must not be called after a step that is not finite. Such a hook makes
    every step wait for the device; one that sets this to False waits only where it `moves`."""

    def before(self, step: int, arrays: Mapping[str, Tensor]) -> None:
        """Called before the forward pass, with the batch."""

    def moves(self, step: int) -> bool:
        """Return whether this hook will change masks after this step; some losses depend on it."""
        return False

    def after_part(self, step: int, finite: Tensor) -> None:
        """Called after the backward pass of each chunk; once per step if the batch is not split.

        `finite`, a bool () on the device, says whether the loss is. If not, the step must leave no trace.
        """

    def after_backward(self, step: int) -> None:
        """Called when all gradients are complete and finite."""

    def after_update(self, step: int) -> None:
        """Called after the weights are updated."""

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
