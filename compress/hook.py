"""Fixed points of a training step at which a stage may act."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


class Hook:
    """Base of every hook; what a subclass does not define does nothing."""

    def before(self, step: int, arrays: Mapping[str, Tensor]) -> None:
        """Called before the forward pass, with the batch."""

    def moves(self, step: int) -> bool:
        """Return whether this hook changes masks after this step; some losses depend on it."""
        return False

    def after_part(self, step: int) -> None:
        """Called after each chunk's backward pass: once a step, unless the batch is processed in chunks."""

    def after_backward(self, step: int) -> None:
        """Called when all gradients are there and finite."""

    def after_update(self, step: int) -> None:
        """Called when the weights have been updated."""

    def state(self) -> dict[str, Any]:
        """Return what the next step depends on, for a checkpoint."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
