"""A slow copy of the student, an exponential moving average of its weights, as ALBEF, BLIP and UPop train with."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clipress.compress.fabric import full_tensor
from clipress.tasks.training import Batch, Gather, Lesson, Momentum

if TYPE_CHECKING:
    from lightning_fabric import Fabric

DECAY = 0.995  # of the copy's weights at each step
ALPHA = 0.4  # largest weight of the copy's opinion in the targets


class EMAModel:
    """The slow copy and a queue of past features. It carries no gates, and the queue starts empty.

    Args:
        module: the student.
        lesson: how its outputs become features.
        fabric: where it runs; the copy is whole on each process.
        queue_size: past rows that are kept.
        rise: steps in which the weight of its opinion rises to `ALPHA`.
    """

    def __init__(self, module: nn.Module, lesson: Lesson, fabric: Fabric, queue_size: int, rise: int) -> None:
        self.student, self.lesson, self.fabric, self.queue_size, self.rise = module, lesson, fabric, queue_size, rise
        self.copy = copy.deepcopy(module).eval().requires_grad_(False)
        for inner in self.copy.modules():
            inner._forward_hooks.clear()
            inner._forward_pre_hooks.clear()
        self.encoder = lesson.module(self.copy).to(fabric.device)
        self.past: dict[str, Tensor] = {}

    def state(self) -> dict[str, Any]:
        """Return what the next step depends on."""
        return {"copy": self.copy.state_dict(), "past": self.past}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.copy.load_state_dict(state["copy"])
        self.past = {name: rows.to(self.fabric.device) for name, rows in state["past"].items()}

    @torch.no_grad()
    def step(self, batch: Batch, arrays: Mapping[str, Tensor], step: int, gather: Gather) -> Momentum:
        """Move the copy towards the student, run the batch through it, and put the batch into the queue."""
        for slow, fast in zip(self.copy.parameters(), self.student.parameters(), strict=True):
            slow.lerp_(full_tensor(fast).reshape(slow.shape).to(slow.dtype), 1 - DECAY)
        with self.fabric.autocast():
            outputs = self.encoder(**self.lesson.inputs(arrays, None))
        momentum, rows = self.lesson.momentum(outputs, batch, arrays, self.past, gather)
        kept = {name: torch.cat([new, self.past[name]]) if self.past else new for name, new in rows.items()}
        self.past = {name: old[: self.queue_size] for name, old in kept.items()} if self.queue_size else {}
        return replace(momentum, alpha=ALPHA * min(step / self.rise, 1.0))
