"""A loaded teacher, and the teachers of a stage: run on each batch, or looked up in the caches that the loader reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipress.compress.context import Context
from clipress.compress.lineage import Lineage
from clipress.models.load import Model
from clipress.tasks.training import Lesson, Outputs


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher: the model, its lineage, and its validation figures if it has any."""

    model: Model
    lineage: Lineage
    metrics: dict[str, Any] | None

    @property
    def hash(self) -> str:
        """Identity of everything that made it."""
        return self.lineage[-1]["hash"]


class Teachers:
    """Answers for a batch, one per teacher, without gradients."""

    def __init__(self, teachers: tuple[Model, ...], lesson: Lesson, context: Context) -> None:
        self.lesson, self.fabric, self.caches = lesson, context.fabric, context.caches
        self.num_teachers = len(teachers)
        run = () if self.caches else teachers
        self.modules = [lesson.module(teacher.module).to(self.fabric.device).eval() for teacher in run]

    @torch.no_grad()
    def __call__(self, arrays: Mapping[str, Tensor]) -> list[Outputs]:
        """Return every teacher's raw outputs for a batch."""
        if self.caches:
            scales = [cache.manifest.logit_scale for cache in self.caches[0]]
            return [self.lesson.cached_outputs(arrays, n, scales[n]) for n in range(self.num_teachers)]
        with self.fabric.autocast():
            return [module(**self.lesson.teacher_inputs(arrays)) for module in self.modules]

    def close(self) -> None:
        """Leave the teachers without hooks."""
        for module in self.modules:
            module.close()
