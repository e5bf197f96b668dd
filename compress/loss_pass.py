"""One batch through the student, its teachers and the losses. The task's lesson provides the forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from clipress.compress.context import Context, steps_of
from clipress.compress.ema import EMAModel, Queue
from clipress.compress.fabric import gathered, to_device
from clipress.compress.losses import Loss, Objective, check_losses, loss_type, needs_of
from clipress.compress.settings import Training
from clipress.compress.teachers import Teachers
from clipress.errors import RecipeError
from clipress.models.load import Model
from clipress.tasks import task_named
from clipress.tasks.training import Gather, Lesson, Outputs, TrainingJob


class LossPass:
    """What the losses of a stage need: the task's lesson, teachers, EMA model and the losses' own parameters."""

    def __init__(self, student: Model, config: Training, terms: Mapping[str, Loss.Settings], context: Context) -> None:
        self.student, self.config, self.context, self.fabric = student, config, context, context.fabric
        self.lesson, teachers = _lesson(student, config, terms, context)
        self.objective = Objective(terms, self.lesson.sizes, context.seed).to(self.fabric.device)
        self.gather = Gather(lambda rows: gathered(rows, self.fabric), context.runtime.local_loss)
        self.ema = self._ema_model() if "momentum" in self.lesson.needs else None
        self.encoder = self.lesson.module(student.module)
        self.teachers = Teachers(teachers, self.lesson, context)

    def _ema_model(self) -> EMAModel:
        epoch_steps = steps_of(self.config.model_copy(update={"steps": None, "epochs": 1.0}), self.context.data)
        queue = Queue(self.config.queue_size, self.config.queue_start, self.context.seed)
        return EMAModel(self.student.module, self.lesson, self.fabric, queue, epoch_steps)

    def inputs(self, step: int, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the student's inputs for a batch."""
        return self.lesson.inputs(arrays, self._mask(step) if "masked" in self.objective.needs else None)

    def loss(
        self, outputs: Outputs, arrays: dict[str, Tensor], step: int, masks_move: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the student's outputs, and its terms."""
        batch = self.lesson.batch(outputs, self.teachers(arrays), arrays, self.objective.projections, self.gather)
        if self.ema is not None:
            batch = replace(batch, momentum=self.ema.step(batch, arrays, step, self.gather))
        return self.objective(replace(batch, masks_move=masks_move))

    def close(self) -> None:
        """Remove the hooks from student and teachers."""
        self.encoder.close()
        self.teachers.close()

    def _mask(self, step: int) -> Callable[[Tensor], Tensor]:
        """Return a function that masks patches; a row gets the same noise on any number of processes."""
        generator = torch.Generator().manual_seed(self.context.seed * 1_000_003 + step)
        rank, world, rows = self.fabric.global_rank, self.fabric.world_size, self.config.batch_size

        def draw(*shape: int) -> Tensor:
            noise = torch.rand(rows, *shape, generator=generator)[rank::world]
            return to_device(noise, self.fabric.device)

        return lambda pixels: self.objective.mask_patches(pixels, draw)


def _lesson(
    student: Model, config: Training, terms: Mapping[str, Loss.Settings], context: Context
) -> tuple[Lesson, tuple[Model, ...]]:
    """Return the task's lesson for these losses, and the teachers they need."""
    title, task = context.title, task_named(student.task)
    needs = task.needs(needs_of(terms))
    check_losses(terms, task, title)
    teachers = context.teachers if "teacher" in needs else ()
    if "teacher" in needs and not teachers:
        raise RecipeError(f"{title}: losses {sorted(terms)} require a teacher, the recipe has none. Set 'teacher'.")
    if any(teacher.task != student.task for teacher in teachers):
        raise RecipeError(f"{title}: expected teachers of task {student.task}, found {teachers[0].task}.")
    job = TrainingJob(
        title=title,
        student=student,
        teachers=teachers,
        needs=needs,
        same_width=tuple(name for name in terms if "width" in loss_type(name, title).needs),
        towers=config.towers,
        sources=tuple(context.sources()),
        cached=bool(context.caches),
        rows_of_all=partial(gathered, fabric=context.fabric),
    )
    return task.lesson(job), teachers
