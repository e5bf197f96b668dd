"""The one training loop. Every stage that learns calls `train`; launch, precision and distribution are Fabric's."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from clipress.compress.checkpoint import load_checkpoint, save_checkpoint, steps_saved
from clipress.compress.context import Context, steps_of
from clipress.compress.fabric import all_max, all_mean, all_true
from clipress.compress.hook import Hook
from clipress.compress.learner import Learner
from clipress.compress.losses import terms_from
from clipress.compress.settings import Training
from clipress.compress.signals import EXIT_CODES, leave_stops_to_the_parent, stop_requests
from clipress.data.bad_records import BadRecords
from clipress.data.dataset import TrainingSet
from clipress.data.sampler import Batches
from clipress.errors import ClipressError, Stopped
from clipress.models.load import Model
from clipress.progress import progress_bar
from clipress.storage import write_bytes_whole, writing

if TYPE_CHECKING:
    from lightning_fabric import Fabric

logger = logging.getLogger("clipress.train")
MAX_BAD_STEPS = 20  # so many non-finite steps in a row stop the run


class HoldZeros(Hook):
    """Keep the zeros of the named weights: this is how 2:4 survives any later training."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        parameters = dict(model.named_parameters())
        self.held = [(parameters[name], parameters[name].detach() != 0) for name in names]

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        for weight, mask in self.held:
            weight.mul_(mask)


class HoldRange(Hook):
    """Keep each output channel of the named weights within its largest magnitude of now.

    INT8 in 7 bits needs it: the quantisers clip at 8 bits only.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        parameters = dict(model.named_parameters())
        weights = [parameters[name] for name in names]
        self.held = [(w, w.detach().abs().amax(tuple(range(1, w.ndim)), keepdim=True)) for w in weights]

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        for weight, limit in self.held:
            weight.copy_(torch.maximum(torch.minimum(weight, limit), -limit))


def batches(model: Model, config: Training, context: Context, steps: int, start: int = 0) -> DataLoader:
    """Return the loader of a stage: step t's batch depends on the seed and t alone."""
    sources = context.sources()
    dataset = TrainingSet(
        sources,
        model.preprocess,
        model.tokenize(),
        context.data.augment,
        context.seed,
        context.caches,
        context.data.resize,
    )
    sampler = Batches(
        [len(source) for source in sources],
        [spec.share for spec in context.data.train],
        config.batch_size,
        steps,
        context.seed,
        start,
        context.fabric.global_rank,
        context.fabric.world_size,
    )
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=_tensors,
        num_workers=context.data.workers,
        worker_init_fn=leave_stops_to_the_parent,
    )


def _tensors(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {name: torch.from_numpy(a) if isinstance(a, np.ndarray) else a for name, a in arrays.items()}


def learning_rate(step: int, steps: int, config: Training) -> float:
    """Linear warm-up, then a half cosine to zero, or no change."""
    rising = max(round(config.warmup * steps), 1)
    if step < rising:
        return config.lr * (step + 1) / rising
    if config.decay == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1)))


def train(
    model: Model,
    config: Training,
    losses: Mapping[str, Any] | tuple[str, ...],
    context: Context,
    hooks: Sequence[Hook] = (),
) -> dict[str, Any]:
    """Train `clip.module` in place with the weighted loss terms. Returns steps, seconds and the last losses.

    Raises Stopped, after the step in hand and with a checkpoint of it, when SIGTERM or Ctrl-C came to any process.
    """
    fabric, steps = context.fabric, steps_of(config, context)
    terms = terms_from(losses, context.title)
    learner = Learner(model, config, terms, context)
    if model.sparsity:  # only now are the weights where they stay, on a device or in shards
        hooks = [*hooks, HoldZeros(model.module, model.sparsity["weights"])]
    if model.quantization and model.quantization.get("portable"):
        hooks = [*hooks, HoldRange(model.module, [f"{name}.weight" for name in model.quantization["modules"]])]
    progress = _continued(learner, hooks, context)
    every = context.runtime.checkpoint if context.checkpoints and context.runtime.strategy != "fsdp2" else 0
    start, bad_in_a_row, skipped = progress["step"], 0, progress["skipped"]
    record: dict[str, Any] = progress["record"]
    bad_records = BadRecords()
    began = time.perf_counter() - progress["seconds"]
    with (
        stop_requests() as asked,
        _log_to(context.log, fabric, start) as log,
        progress_bar(steps, context.title, "step", initial=start, disable=not fabric.is_global_zero) as bar,
    ):
        for step, arrays in enumerate(batches(model, config, context, steps, start), start):
            for item in bad_records.count(len(arrays["group"]), arrays.pop("bad")):
                log({"step": step, "bad_record": asdict(item)})
            arrays = {name: tensor.to(fabric.device, non_blocking=True) for name, tensor in arrays.items()}
            rate = learning_rate(step, steps, config)
            for hook in hooks:
                hook.before(step, arrays)
            total, parts, finite = learner.gradients(step, arrays, hooks)
            if finite:
                for hook in hooks:
                    hook.after_backward(step)
                learner.update(rate)
                for hook in hooks:
                    hook.after_update(step)
                bad_in_a_row = 0
                record = dict(zip(("loss", *parts), all_mean([total, *parts.values()], fabric), strict=True))
                bar.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)
            else:
                skipped, bad_in_a_row = skipped + 1, bad_in_a_row + 1
                broken = [name for name, part in parts.items() if not torch.isfinite(part)] or ["the gradient"]
                log({"step": step, "skipped": broken})
                if bad_in_a_row == MAX_BAD_STEPS:
                    raise ClipressError(
                        f"{context.title}: {', '.join(broken)} was not finite for {MAX_BAD_STEPS} steps in a row "
                        f"(last step {step}). Lower 'lr' (now {config.lr}) or look at the data. Checkpoints "
                        "from before are kept."
                    )
            learner.clear_gradients()
            bar.update()
            seconds = round(time.perf_counter() - began, 3)
            log({"step": step, "lr": rate, "seconds": seconds, **record})
            stop = all_max(asked.signal, fabric)
            due = every and (((step + 1) % every == 0 and step + 1 < steps) or stop)
            if due and not bad_in_a_row:  # what led into trouble must not take the place of what is good
                progress = {"step": step + 1, "skipped": skipped, "record": record, "seconds": seconds}
                state = {"progress": progress, "learner": learner.state(), "world": fabric.world_size}
                state["hooks"] = [hook.state() for hook in hooks]
                save_checkpoint(context.checkpoints, step + 1, state, fabric.global_rank)
            if stop:
                fabric.barrier()  # the first to end makes torchrun end the others
                raise _stopped(stop, step + 1, steps, bool(every), context.title)
    learner.finish()
    seconds = round(time.perf_counter() - began, 2)
    replaced = {"bad_records": bad_records.bad} if bad_records.bad else {}
    return {"steps": steps, "seconds": seconds, "skipped_steps": skipped, "last": record, **replaced}


def _stopped(number: float, step: int, steps: int, kept: bool, title: str) -> Stopped:
    name = signal.Signals(int(number)).name
    how = "from its last checkpoint" if kept else "from this stage's beginning: it keeps no checkpoints"
    told = f"{title}: stopped by {name} after {step} of {steps} steps. The same command goes on {how}."
    return Stopped(told, EXIT_CODES[signal.Signals[name]])


def _continued(learner: Learner, hooks: Sequence[Hook], context: Context) -> dict[str, Any]:
    """Put everything back to the newest checkpoint that every process can read. Returns how far the training was."""
    fabric = context.fabric
    for step in reversed(steps_saved(context.checkpoints, 0) if context.checkpoints else []):
        state = load_checkpoint(context.checkpoints, step, fabric.global_rank)
        if state is not None and state["world"] != fabric.world_size and any(state["hooks"]):
            logger.warning("%s starts over: its scores were spread over %d processes.", context.title, state["world"])
            state = None
        if all_true(state is not None, fabric):
            learner.load_state(state["learner"])
            for hook, kept in zip(hooks, state["hooks"], strict=True):
                hook.load_state(kept)
            return state["progress"]
    return {"step": 0, "skipped": 0, "record": {}, "seconds": 0}


@contextmanager
def _log_to(path: Path | None, fabric: Fabric, start: int) -> Iterator[Any]:
    """Open the machine-readable log of a stage, one JSON object per line; what `start` steps wrote is kept."""
    if path is None or not fabric.is_global_zero:
        yield lambda row: None
        return
    with writing(path):
        kept = path.read_bytes().splitlines(True) if start and path.is_file() else []
        write_bytes_whole(path, b"".join(line for line in kept if _is_before(start, line)))
        file = path.open("ab", buffering=0)  # a line that did not fit must not turn up again when the file is closed

    def write(row: Mapping[str, Any]) -> None:
        line = json.dumps(row).encode() + b"\n"
        with writing(path):
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with file:
        yield write


def _is_before(start: int, line: bytes) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] < start
    except (ValueError, LookupError, TypeError):  # a line that was cut off
        return False
