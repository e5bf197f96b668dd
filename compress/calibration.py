"""Calibration: run training samples through a model without gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from clipress.compress.context import Context
from clipress.compress.fabric import to_device
from clipress.compress.loader import batches
from clipress.compress.settings import Training
from clipress.errors import DataError
from clipress.models.load import Model
from clipress.tasks import Task, task_named

Samples = dict[str, dict[str, Tensor]]
"""One batch: the inputs of every graph that the data can feed, graph -> input -> rows [B, ...]."""


class Calibration:
    """The first `items` training items, rounded up to full batches. Call it with a module to run them through it."""

    def __init__(self, model: Model, config: Training, context: Context, items: int) -> None:
        self.device, self.title, self.task = context.fabric.device, context.title, task_named(model.task)
        self.loader = batches(model, config, context, -(-items // config.batch_size))

    def __iter__(self) -> Iterator[Samples]:
        """Yield `Samples` on the model's device. Raises DataError if all images are identical."""
        first, varied, seen = None, False, 0
        for arrays in self.loader:
            tensors = {name: a for name, a in arrays.items() if isinstance(a, Tensor)}
            seen += len(arrays["group"])
            if "pixels" in tensors:
                first = tensors["pixels"][0] if first is None else first
                varied = varied or bool((tensors["pixels"] != first).any())
            yield self.task.inputs_of(tensors)
        if first is not None and seen > 1 and not varied:
            raise DataError(
                f"{self.title}: expected different calibration images, found {seen} identical ones. Scales set on a single "
                "image do not fit any other. Use different images in data.train."
            )

    @torch.no_grad()
    def __call__(self, module: nn.Module) -> None:
        """Run every graph on all samples."""
        module.eval()
        for samples in self:
            outputs_of(self.task, module, samples)


class StoredSamples:
    """Calibration batches in files, so that they can be read several times and are decoded once."""

    def __init__(self, batches: Iterable[Samples], folder: Path, device: torch.device) -> None:
        self.device = device
        self.batches = [
            {
                graph: {name: mapped(rows, folder / f"{graph}-{name}-{number}.npy") for name, rows in inputs.items()}
                for graph, inputs in batch.items()
            }
            for number, batch in enumerate(batches)
        ]

    def __iter__(self) -> Iterator[Samples]:
        for batch in self.batches:
            yield {
                graph: {name: rows.to(self.device) for name, rows in inputs.items()} for graph, inputs in batch.items()
            }


def mapped(rows: Tensor, path: Path) -> Tensor:
    """Return a copy that lives in a file: float32, or integers as they are."""
    dtype = np.float32 if rows.is_floating_point() else rows.cpu().numpy().dtype
    tensor = torch.from_numpy(np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=tuple(rows.shape)))
    tensor.copy_(rows)
    return tensor


def random_projection(y: Tensor, generator: torch.Generator) -> Tensor:
    """Return the sum of a tensor's entries with random signs; its squared gradient estimates that of every output."""
    return (y * to_device(torch.randint(0, 2, y.shape, generator=generator) * 2 - 1, y.device).to(y.dtype)).sum()


@torch.no_grad()
def layers_reached(model: Model, names: Sequence[str]) -> list[str]:
    """Return those of the named layers that some graph runs. An attention pool may read a Linear's weights and never call it."""
    task, device, reached = task_named(model.task), next(model.module.parameters()).device, set()
    handles = [
        model.module.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: reached.add(name))
        for name in names
    ]
    was_training = model.module.training
    model.module.eval()
    for name, graph in task.graphs(model).items():
        inputs = {key: torch.from_numpy(rows).to(device) for key, rows in graph.example(1).items()}
        task.call(model.module, name, inputs)
    model.module.train(was_training)
    for handle in handles:
        handle.remove()
    return [name for name in names if name in reached]


def outputs_of(task: Task, module: nn.Module, samples: Samples) -> dict[str, Tensor]:
    """Return the first output of every graph: rows [B, ...] by graph."""
    return {name: next(iter(task.call(module, name, inputs).values())) for name, inputs in samples.items()}
