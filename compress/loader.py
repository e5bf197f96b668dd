"""The batches of a stage: read, decoded and augmented by worker processes, normalised on the device."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from clipress.compress.context import Context
from clipress.compress.fabric import to_device
from clipress.compress.mixing import Mixing
from clipress.compress.settings import Training
from clipress.compress.signals import ignore_stop_signals
from clipress.data.bad_records import BadRecords
from clipress.data.dataset import TrainingSet
from clipress.data.padding import without_padding
from clipress.data.sampler import Batches
from clipress.data.transforms import Preprocess, normalised
from clipress.errors import RecipeError
from clipress.models.load import Model
from clipress.models.text_length import text_ends
from clipress.runtime.cpu import usable_cores
from clipress.tasks import task_named

MOST_WORKERS = 16  # per process: each holds a copy of what was read of the sources
PREFETCH = 2  # batches that each worker has ready
SHARED = Path("/dev/shm")  # where torch's workers put them


class Loader:
    """Batches on a device: arrays of `TrainingSet` as tensors, with pixels float32 [B, 3, S, S].

    Records that could not be read are counted; the list `bad` has those that are met for the first time. Raises DataError for too
    many.
    """

    def __init__(
        self,
        loader: DataLoader,
        forms: Mapping[str, Preprocess],
        device: torch.device,
        bad_records: BadRecords,
        mixing: Mixing | None = None,
        start: int = 0,
    ) -> None:
        self.loader, self.forms, self.device, self.mixing, self.start = loader, forms, device, mixing, start
        self.bad_records = bad_records

    def __iter__(self) -> Iterator[dict[str, Any]]:
        normalise = {name: normaliser(form, self.device) for name, form in self.forms.items()}
        for step, arrays in enumerate(self.loader, self.start):
            arrays["bad"] = self.bad_records.count(len(arrays["group"]), arrays["bad"])
            batch = {
                name: to_device(rows, self.device) if isinstance(rows, Tensor) else rows
                for name, rows in arrays.items()
            }
            batch = {name: normalise[name](rows) if name in normalise else rows for name, rows in batch.items()}
            yield batch if self.mixing is None else self.mixing(step, batch)


def batches(
    model: Model,
    config: Training,
    context: Context,
    steps: int,
    start: int = 0,
    whole_texts: bool = False,
    mixed: bool = False,
) -> Loader:
    """Return the batches of a stage, on its device. The batch of step t depends only on the seed and t.

    Texts come without the padding that neither the model nor a running teacher reads, unless `whole_texts`. With `mixed`, images
    are erased in part and mixed as `data.augment` says, which calibration does without.
    """
    sources = context.sources()
    ends = None if whole_texts else text_ends(model, () if context.caches else context.teachers)
    dataset = TrainingSet(
        sources,
        model.preprocess,
        model.tokenize(),
        context.data.augment,
        context.seed,
        context.caches,
        context.data.resize,
        needed_ids=ends and partial(without_padding, ends=ends),
        of_teachers=() if context.caches else [teacher.preprocess for teacher in context.teachers],
    )
    sampler = Batches(
        [len(source) for source in sources],
        [spec.weight for spec in context.data.train],
        config.batch_size,
        steps,
        context.seed,
        start,
        context.fabric.global_rank,
        context.fabric.world_size,
        context.data.repeats,
    )
    mixing = _mixing(model, context) if mixed else None
    device = context.fabric.device
    image_bytes = sum(form.size**2 * 3 for form in dataset.forms.values())
    batch_bytes = config.batch_size // context.fabric.world_size * image_bytes
    workers = number_of_workers(context.data.workers, device, batch_bytes)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=_tensors,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=ignore_stop_signals,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # a start draws from it instead of torch's own, which a checkpoint has restored
    )
    return Loader(loader, dataset.forms, device, context.bad_records, mixing, start)


def _mixing(model: Model, context: Context) -> Mixing | None:
    augment = context.data.augment
    if augment.mixes and not task_named(model.task).mixes:
        raise RecipeError(
            f"data.augment: mixup and cutmix mix the labels of a classifier, which task {model.task} has none of. Leave them out."
        )
    if not (augment.mixes or augment.random_erase):
        return None
    return Mixing(augment, context.seed, context.fabric.global_rank)


def number_of_workers(wanted: int | str, device: torch.device, batch_bytes: int) -> int:
    """Return how many processes decode for this one. `auto`: none where training itself fills the cores, a core each beside a GPU.

    Batches of `batch_bytes` are handed over in shared memory, of which a container may have very little.
    """
    if wanted != "auto":
        return wanted
    if device.type != "cuda":
        return 0
    cores = usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1
    fit = shutil.disk_usage(SHARED).free // (2 * PREFETCH * batch_bytes) if SHARED.is_dir() else cores
    return min(max(cores, 1), fit, MOST_WORKERS)


def normaliser(preprocess: Preprocess, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return a function from pixels uint8 [B, S, S, 3] on a device to float32 [B, 3, S, S]: the same bits on every device."""
    if device.type == "cpu":
        return lambda pixels: torch.from_numpy(normalised(pixels.numpy(), preprocess))
    # A number instead of a tensor would be multiplied by its reciprocal on a GPU, which rounds otherwise.
    whole, mean, std = (
        torch.tensor(values, device=device)[:, None, None] for values in ((255.0,), preprocess.mean, preprocess.std)
    )
    return lambda pixels: pixels.permute(0, 3, 1, 2).float().contiguous().div_(whole).sub_(mean).div_(std)


def _tensors(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {name: torch.from_numpy(a) if isinstance(a, np.ndarray) else a for name, a in arrays.items()}
