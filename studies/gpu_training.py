"""Training steps on a GPU: alone, with a teacher, with a cached teacher, and a search; see gpu.py."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from clipress.compress.context import Context
from clipress.compress.fabric import start_fabric
from clipress.compress.hook import Hook
from clipress.compress.learner import Learner
from clipress.compress.losses import terms_from
from clipress.compress.prune.budget import Budget
from clipress.compress.prune.gates import Gates
from clipress.compress.prune.search import Prune, Search
from clipress.compress.settings import Runtime, Training
from clipress.compress.train import Loop
from clipress.data.spec import DataSpec, SourceSpec
from clipress.models.load import Model, new_model

SEARCH_LOSSES = ("contrastive", "affinity", "feature", "interactive")
WARM_UP = 5


def training_row(kind: str, ids: int, compiled: bool, wanted: dict[str, Any]) -> dict[str, Any]:
    """Time the steps of one kind, with texts of so many ids, on a batch that is on the device already."""
    gc.collect()  # what earlier rows hold in cycles would count as this one's memory
    loop, arrays = _loop(kind, ids, compiled, wanted)

    def take(step: int) -> None:
        loop.take_step(step, dict(arrays), 1e-5, lambda row: None)

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for step in range(WARM_UP):
        take(step)
    waits = host_waits(lambda: take(WARM_UP)) if torch.cuda.is_available() else None
    wait()
    warm_up, began = time.perf_counter() - began, time.perf_counter()
    steps = wanted["steps"]
    for step in range(WARM_UP + 1, WARM_UP + 1 + steps):
        take(step)
    wait()
    ms = 1000 * (time.perf_counter() - began) / steps
    loop.learner.finish()
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return {
        "ms_per_step": round(ms, 3),
        "images_per_s": round(1000 * wanted["batch"] / ms, 1),
        "peak_gib": round(peak, 2),
        "host_waits_per_step": waits,
        "warm_up_s": round(warm_up, 1),
    }


def _loop(kind: str, ids: int, compiled: bool, wanted: dict[str, Any]) -> tuple[Loop, dict[str, Tensor]]:
    """Return a training run of one kind, and its batch."""
    runtime = Runtime(compile=compiled)
    fabric = start_fabric(runtime)
    student, teacher = (new_model(wanted["student"], seed) for seed in (0, 1))
    data = DataSpec(train=(SourceSpec(format="scenes", limit=8),))
    arrays = random_batch(student, wanted["batch"], ids, fabric.device)
    caches: tuple = ()
    if "cached" in kind:
        caches = ((SimpleNamespace(manifest=SimpleNamespace(logit_scale=100.0)),),)
        arrays |= cached_answers(wanted, fabric.device)
    losses = ("contrastive",) if "alone" in kind else SEARCH_LOSSES
    teachers = () if "alone" in kind else (teacher,)
    context = Context(fabric, data, 0, teachers, caches=caches, title=kind, runtime=runtime)
    total = wanted["steps"] + WARM_UP + 1
    settings: Training = Training(steps=total, batch_size=wanted["batch"])
    hooks: list[Hook] = []
    if "search" in kind:
        # Updates of the masks, which wait for the device, come every ten steps in a search of a hundred and more.
        settings = Prune(
            budget=Budget(params=0.5), steps=total, batch_size=wanted["batch"], rotate=False, update_every=10
        )
        student.module.to(fabric.device)
        hooks = [Search(student, Gates(student.module, "separate"), settings, total, 0, lambda total: total)]
    return Loop(Learner(student, settings, terms_from(losses, kind), context), hooks, settings, context), arrays


def random_batch(model: Model, size: int, length: int, where: torch.device) -> dict[str, Tensor]:
    """Return a batch as the loader gives it, of random images and texts."""
    generator = torch.Generator().manual_seed(0)
    side = model.preprocess.size
    ids = torch.randint(1, 400, (size, length), generator=generator)
    ids[:, -1] = 49407
    arrays = {
        "pixels": torch.randn(size, 3, side, side, generator=generator),
        "ids": ids,
        "group": torch.arange(size),
        "label": torch.full((size,), -1),
    }
    return {name: rows.to(where) for name, rows in arrays.items()}


def cached_answers(wanted: dict[str, Any], where: torch.device) -> dict[str, Tensor]:
    """Return what a loader reads from a teacher cache."""
    rows, dim = wanted["batch"], wanted["student"]["embed_dim"]
    found = {}
    for graph in ("image", "text"):
        unit = torch.nn.functional.normalize(torch.randn(rows, dim), dim=1)
        found |= {f"teacher_{graph}_0": unit, f"teacher_{graph}_norm_0": torch.full((rows,), 10.0)}
    return {name: values.to(where) for name, values in found.items()}


def host_waits(call: Callable[[], Any]) -> int:
    """Count how often the host waits for the device during a call."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in seen)


def wait() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
