"""Teachers of a stage: run on each batch, or replaced by the cached outputs that the loader reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipress.compress.context import Context
from clipress.compress.fabric import compile_in_place
from clipress.compress.lineage import Lineage
from clipress.data.dataset import teacher_pixels
from clipress.models.load import Model
from clipress.tasks.training import Lesson, Outputs


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher: model, lineage, and validation metrics if available."""

    model: Model
    lineage: Lineage
    metrics: dict[str, Any] | None

    @property
    def hash(self) -> str:
        """Hash of everything that the teacher was made from."""
        return self.lineage[-1]["hash"]


class Teachers:
    """The outputs of all teachers for a batch, without gradients."""

    def __init__(self, teachers: tuple[Model, ...], lesson: Lesson, context: Context) -> None:
        self.lesson, self.fabric, self.caches = lesson, context.fabric, context.caches
        self.num_teachers = len(teachers)
        run = () if self.caches else teachers
        self.modules = [lesson.module(teacher.module).to(self.fabric.device).eval() for teacher in run]
        for module in self.modules if context.runtime.compile else ():
            compile_in_place(module)

    @torch.no_grad()
    def __call__(self, arrays: Mapping[str, Tensor]) -> list[Outputs]:
        """Return every teacher's raw outputs for a batch."""
        if self.caches:
            scales = [cache.manifest.logit_scale for cache in self.caches[0]]
            return [self.lesson.cached_outputs(arrays, n, scales[n]) for n in range(self.num_teachers)]
        with self.fabric.autocast():
            return [module(**self.lesson.teacher_inputs(_seen_by(n, arrays))) for n, module in enumerate(self.modules)]

    def close(self) -> None:
        """Remove the hooks from the teachers."""
        for module in self.modules:
            module.close()


def _seen_by(teacher: int, arrays: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a batch with the images as a teacher sees them."""
    own = arrays.get(teacher_pixels(teacher))
    return arrays if own is None else {**arrays, "pixels": own}
