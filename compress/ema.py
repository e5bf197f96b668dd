"""Momentum model: an exponential moving average (EMA) of the student, as used by ALBEF, BLIP and UPop."""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipress.compress.fabric import full_tensor
from clipress.tasks.training import Batch, Gather, Lesson, Momentum

if TYPE_CHECKING:
    from lightning_fabric import Fabric

DECAY = 0.995  # EMA decay per step
ALPHA = 0.4  # final weight of the EMA model's predictions in the targets


@dataclass(frozen=True)
class Queue:
    """How many rows of past features a momentum model keeps, and what they are before there are any."""

    size: int
    start: Literal["empty", "random"] = "empty"
    seed: int = 0

    def first_rows(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the queue before the first step, with columns like those of `rows`, a batch's.

        Every name has its own random unit rows, the same on every process. Their group is -1, which no item has.
        """
        if self.start == "empty" or not self.size:
            return {}
        generator = torch.Generator().manual_seed(self.seed)
        queue = {}
        for name, like in rows.items():
            shape = (self.size, *like.shape[1:])
            if like.is_floating_point():
                drawn = F.normalize(torch.randn(shape, generator=generator), dim=-1)
            else:
                drawn = torch.full(shape, -1)
            queue[name] = drawn.to(like)
        return queue


class EMAModel:
    """The EMA model and a queue of past features. The EMA model has no gates.

    Args:
        module: the student.
        lesson: turns its outputs into features.
        fabric: where it runs; every process holds a full copy.
        queue: how many past rows to keep.
        ramp_steps: steps over which the weight of its predictions rises to `ALPHA`.
    """

    def __init__(self, module: nn.Module, lesson: Lesson, fabric: Fabric, queue: Queue, ramp_steps: int) -> None:
        self.student, self.lesson, self.fabric = module, lesson, fabric
        self.queue, self.ramp_steps = queue, ramp_steps
        self.copy = copy.deepcopy(module).eval().requires_grad_(False)
        for inner in self.copy.modules():
            inner._forward_hooks.clear()
            inner._forward_pre_hooks.clear()
        self.encoder = lesson.module(self.copy).to(fabric.device)
        self.past: dict[str, Tensor] = {}

    def state(self, left_out: Container[str] = ()) -> dict[str, Any]:
        """Return the state for a checkpoint, without the named weights: those that are the student's."""
        weights = {name: weight for name, weight in self.copy.named_parameters() if name not in left_out}
        return {"copy": weights, "past": self.past}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.copy.load_state_dict({**self.copy.state_dict(), **state["copy"]})
        self.past = {name: rows.to(self.fabric.device) for name, rows in state["past"].items()}

    @torch.no_grad()
    def step(self, batch: Batch, arrays: Mapping[str, Tensor], step: int, gather: Gather) -> Momentum:
        """Update the EMA weights, run the batch through them, and add the batch to the queue."""
        for average, current in zip(self.copy.parameters(), self.student.parameters(), strict=True):
            average.lerp_(full_tensor(current).reshape(average.shape).to(average.dtype), 1 - DECAY)
        with self.fabric.autocast():
            outputs = self.encoder(**self.lesson.inputs(arrays, None))
        alpha = ALPHA * min(step / self.ramp_steps, 1.0)
        momentum, rows = self.lesson.momentum(outputs, batch, arrays, self.past, gather, alpha)
        if not self.past and (first := self.queue.first_rows(rows)):
            self.past = first
            momentum, rows = self.lesson.momentum(outputs, batch, arrays, self.past, gather, alpha)
        kept = {name: torch.cat([new, self.past[name]]) if self.past else new for name, new in rows.items()}
        self.past = {name: old[: self.queue.size] for name, old in kept.items()} if self.queue.size else {}
        return momentum
