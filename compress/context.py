"""What a stage needs besides its settings and student: devices, data, teachers, folders."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipress.compress.settings import Runtime, Training
from clipress.data.bad_records import BadRecords
from clipress.data.sources import num_captions, open_source
from clipress.data.spec import DataSpec
from clipress.data.teacher_cache import TeacherCache
from clipress.models.load import Model
from clipress.progress import Say

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Context:
    """The devices, data, teachers and folders of one stage."""

    fabric: Fabric
    data: DataSpec
    seed: int
    teachers: tuple[Model, ...] = ()
    runtime: Runtime = field(default_factory=Runtime)
    log: Path | None = None
    """JSON lines file; None writes no log."""
    caches: tuple[tuple[TeacherCache, ...], ...] = ()
    """Cached teacher outputs, per source and teacher; empty if the teachers run."""
    checkpoints: Path | None = None
    """Folder of this stage's checkpoints; None reads and writes none."""
    title: str = ""
    say: Say = lambda _: None
    """Receives lines for the user."""

    @cached_property
    def bad_records(self) -> BadRecords:
        """Counts the training records of this stage that cannot be read, in this process."""
        return BadRecords(self.data.max_replaced, setting="'data.max_replaced'")

    def sources(self) -> list[Any]:
        """Open the training sources."""
        return [open_source(spec) for spec in self.data.train]


def steps_of(config: Training, data: DataSpec) -> int:
    """Return the number of steps of a stage."""
    if config.steps is not None:
        return config.steps
    first, weights = data.train[0], [spec.weight for spec in data.train]
    size = num_captions(first) if config.epoch_counts == "captions" else len(open_source(first))
    per_step = config.batch_size * weights[0] / sum(weights)
    return max(math.ceil(config.epochs * size / per_step), 1)
