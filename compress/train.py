"""The training loop that all stages share. Fabric handles launch, precision and distribution."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clipress.compress.checkpoint import Checkpoints, load_checkpoint, steps_saved
from clipress.compress.context import Context, steps_of
from clipress.compress.fabric import Agreement, HostCopy, all_mean, all_true, on_one_process
from clipress.compress.hook import Hook
from clipress.compress.learner import Learner
from clipress.compress.loader import batches
from clipress.compress.losses import terms_from
from clipress.compress.random import random_state, seeded, set_random_state
from clipress.compress.settings import Training
from clipress.compress.signals import EXIT_CODES, stop_requests
from clipress.errors import ClipressError, Stopped
from clipress.models.load import Model
from clipress.progress import progress_bar
from clipress.storage import write_bytes_whole, writing

if TYPE_CHECKING:
    from lightning_fabric import Fabric

logger = logging.getLogger("clipress.train")
Log = Callable[[Mapping[str, Any]], None]
MAX_BAD_STEPS = 20  # consecutive non-finite steps that stop the run


class HoldZeros(Hook):
    """Keep the zeros of the named weights, so that 2:4 sparsity survives later training."""

    only_finite = False

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        parameters = dict(model.named_parameters())
        self.held = [(parameters[name], parameters[name].detach() != 0) for name in names]

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        for weight, mask in self.held:
            weight.mul_(mask)


class HoldRange(Hook):
    """Keep each output channel of the named weights within its initial maximum magnitude.

    7-bit weights require it, since the quantizers only clip to 8 bits.
    """

    only_finite = False

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        parameters = dict(model.named_parameters())
        weights = [parameters[name] for name in names]
        self.held = [(w, w.detach().abs().amax(tuple(range(1, w.ndim)), keepdim=True)) for w in weights]

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        for weight, limit in self.held:
            weight.copy_(torch.maximum(torch.minimum(weight, limit), -limit))


POLY = 0.9  # as in Segmenter and most of semantic segmentation since DeepLab


def learning_rate(step: int, steps: int, config: Training) -> float:
    """Return the learning rate of a step: linear warmup, then decay to `min_lr`, or constant."""
    warmup = max(round(config.warmup_ratio * steps), 1)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.lr_schedule == "constant":
        return config.lr
    done = (step - warmup) / max(steps - warmup, 1)
    share = (1 - done) ** POLY if config.lr_schedule == "poly" else 0.5 * (1 + math.cos(math.pi * done))
    return config.min_lr + (config.lr - config.min_lr) * share


def train(
    model: Model,
    config: Training,
    losses: Mapping[str, Any] | tuple[str, ...],
    context: Context,
    hooks: Sequence[Hook] = (),
) -> dict[str, Any]:
    """Train `model.module` in place with the weighted loss terms. Returns steps, seconds and the last losses.

    Dropout and whatever else is drawn follow from the context's seed. When any process receives SIGTERM or Ctrl-C, finishes the
    current step, saves a checkpoint and raises Stopped.
    """
    with seeded(context.seed, context.fabric):
        return _train(model, config, losses, context, hooks)


def _train(
    model: Model,
    config: Training,
    losses: Mapping[str, Any] | tuple[str, ...],
    context: Context,
    hooks: Sequence[Hook],
) -> dict[str, Any]:
    fabric, steps = context.fabric, steps_of(config, context.data)
    learner = Learner(model, config, terms_from(losses, context.title), context)
    # The hooks need the final parameters, so they come after Fabric has moved or sharded the model.
    loop = Loop(learner, [*hooks, *holds_of(model)], config, context)
    start, agreement = loop.step, Agreement(fabric)
    with (
        stop_requests() as requested,
        loop.checkpoints as checkpoints,
        _log_to(context.log, fabric, start) as log,
        progress_bar(steps, context.title, "step", initial=start, disable=not fabric.is_global_zero) as bar,
    ):
        if loop.saved_by != fabric.world_size:
            _report_other_processes(start, loop.saved_by, context, log)
        loader = batches(model, config, context, steps, start, whole_texts="tokens" in learner.lesson.needs, mixed=True)
        for step, arrays in enumerate(loader, start):
            for item in arrays.pop("bad"):
                log({"step": step, "bad_record": asdict(item)})
            rate = learning_rate(step, steps, config)
            loop.take_step(step, arrays, rate, log)
            if loop.record:
                bar.set_postfix(loss=f"{loop.record['loss']:.3f}", refresh=False)
            bar.update()
            is_last, due = step + 1 == steps, checkpoints.is_due(step + 1)
            stop, any_due = agreement.on(requested.signal, due, now=is_last)
            if checkpoints.every == "auto":  # clocks differ, numbers of steps do not
                due = any_due
            if stop:
                loop.settle(log)
            if checkpoints.every and (stop or (due and not is_last)):
                loop.save(step + 1, log)
            if stop:
                checkpoints.wait()
                fabric.barrier()  # torchrun kills the other processes as soon as one exits
                raise _stopped(stop, step + 1, steps, bool(checkpoints.every), context.title)
        loop.settle(log)
    learner.finish()
    seconds = round(time.perf_counter() - loop.began, 2)
    return {"steps": steps, "seconds": seconds, "skipped_steps": loop.skipped, "last": loop.record}


def holds_of(model: Model) -> list[Hook]:
    """Return the hooks that keep 2:4 zeros at zero and 7-bit weights in range."""
    holds: list[Hook] = []
    if model.sparsity:
        holds.append(HoldZeros(model.module, model.sparsity["weights"]))
    if model.quantization and model.quantization.get("portable"):
        holds.append(HoldRange(model.module, [f"{name}.weight" for name in model.quantization["modules"]]))
    return holds


@dataclass(frozen=True)
class Outcome:
    """What a step computed, on its way to the host."""

    step: int
    rate: float
    names: tuple[str, ...]
    values: HostCopy
    """Whether all gradients are finite, then the mean loss and its terms."""


class Loop:
    """A training run in progress: takes steps, counts bad ones and saves checkpoints.

    A step's outcome is read after the next one has been queued, so that the device is never idle while the host reads.
    """

    def __init__(self, learner: Learner, hooks: Sequence[Hook], config: Training, context: Context) -> None:
        self.learner, self.hooks, self.config, self.context = learner, hooks, config, context
        progress = _resume(learner, hooks, context)
        self.step: int = progress["step"]
        self.saved_by: int = progress["processes"]
        self.skipped: int = progress["skipped"]
        self.record: dict[str, Any] = progress["record"]
        self.seconds: float = progress["seconds"]
        self.began = time.perf_counter() - self.seconds
        self.outcome: Outcome | None = None
        self.bad_in_a_row = 0
        every, rank = context.runtime.checkpoint_every, context.fabric.global_rank
        self.checkpoints = Checkpoints(context.checkpoints, every, rank)

    def take_step(self, step: int, arrays: dict[str, Tensor], rate: float, log: Log) -> None:
        """Take one step, which changes nothing if it is not finite, and log the previous one.

        Raises ClipressError after `MAX_BAD_STEPS` non-finite steps in a row.
        """
        for hook in self.hooks:
            hook.before(step, arrays)
        total, terms, finite = self.learner.gradients(step, arrays, self.hooks)
        waits = any(hook.only_finite or hook.moves(step) for hook in self.hooks)
        if not waits or finite:
            for hook in self.hooks:
                hook.after_backward(step)
            self.learner.update(rate)
            for hook in self.hooks:
                hook.after_update(step)
        self.learner.clear_gradients()
        values = torch.cat([finite.float()[None], all_mean([total, *terms.values()], self.context.fabric)])
        outcome = Outcome(step, rate, ("loss", *terms), HostCopy(values))
        self.settle(log)
        self.outcome = outcome

    def settle(self, log: Log) -> None:
        """Read and log the outcome of the last step, if that has not been done."""
        outcome, self.outcome = self.outcome, None
        if outcome is None:
            return
        finite, *means = outcome.values.read().tolist()
        values = dict(zip(outcome.names, means, strict=True))
        if finite:
            self.bad_in_a_row, self.record = 0, values
        else:
            self._skip(outcome.step, values, log)
        self.seconds = round(time.perf_counter() - self.began, 3)
        log({"step": outcome.step, "lr": outcome.rate, "seconds": self.seconds, **self.record})

    def _skip(self, step: int, values: Mapping[str, float], log: Log) -> None:
        self.skipped, self.bad_in_a_row = self.skipped + 1, self.bad_in_a_row + 1
        bad = [name for name, value in values.items() if name != "loss" and not math.isfinite(value)]
        bad = bad or ["the gradient"]
        log({"step": step, "skipped": bad})
        if self.bad_in_a_row == MAX_BAD_STEPS:
            raise ClipressError(
                f"{self.context.title}: {', '.join(bad)} was not finite for {MAX_BAD_STEPS} steps in a row (last step "
                f"{step}). Lower 'lr' (now {self.config.lr}) or check the data. Earlier checkpoints are kept."
            )

    def save(self, step: int, log: Log) -> None:
        """Save a checkpoint after `step` steps, unless the last step was bad: it must not replace a good checkpoint."""
        self.settle(log)
        if self.bad_in_a_row:
            return
        fabric = self.context.fabric
        self.checkpoints.wait()
        fabric.barrier()  # so that the files of two processes are never two checkpoints apart
        hooks = [hook.state() for hook in self.hooks]
        state = {
            "progress": {"step": step, "skipped": self.skipped, "record": self.record, "seconds": self.seconds},
            "world": fabric.world_size,
            "hooks": hooks,
            "random": random_state(),
        }
        # A search changes frozen weights too before it starts, and its scores hold for those it then had.
        learner = on_one_process(self.learner.state(with_frozen=any(hooks)), fabric.is_global_zero)
        if fabric.is_global_zero:
            state["learner"] = learner
        self.checkpoints.save(step, state)


def _stopped(number: float, step: int, steps: int, kept: bool, title: str) -> Stopped:
    name = signal.Signals(int(number)).name
    how = "from the last checkpoint" if kept else "from the start of this stage, which saves no checkpoints"
    message = f"{title}: stopped by {name} after {step} of {steps} steps. Run the same command to continue {how}."
    return Stopped(message, EXIT_CODES[signal.Signals[name]])


def _resume(learner: Learner, hooks: Sequence[Hook], context: Context) -> dict[str, Any]:
    """Restore the newest checkpoint that every process can read. Returns the progress it holds."""
    fabric = context.fabric
    for step in reversed(steps_saved(context.checkpoints, 0) if context.checkpoints else []):
        shared = load_checkpoint(context.checkpoints, step, 0)
        is_new = shared is not None and fabric.global_rank >= shared["world"]  # this process did not exist then
        is_own = not (fabric.is_global_zero or is_new)
        state = load_checkpoint(context.checkpoints, step, fabric.global_rank) if is_own else shared
        if state is not None and state["world"] != fabric.world_size and any(state["hooks"]):
            logger.warning(
                "%s: the checkpoint was saved by %d processes, whose pruning scores cannot be redistributed over %d. "
                "Starting from the beginning.",
                *(context.title, state["world"], fabric.world_size),
            )
            state = None
        if all_true(state is not None and shared is not None, fabric):
            learner.load_state(shared["learner"])
            for hook, kept in zip(hooks, state["hooks"], strict=True):
                hook.load_state(kept)
            if not is_new:
                set_random_state(state["random"])
            return {**state["progress"], "processes": state["world"]}
    return {"step": 0, "skipped": 0, "record": {}, "seconds": 0, "processes": fabric.world_size}


def _report_other_processes(step: int, before: int, context: Context, log: Log) -> None:
    """Report that the processes are not as many as those that saved the checkpoint."""
    if context.fabric.is_global_zero:
        logger.warning(
            "%s: resumed at step %d on another number of processes (%d, before: %d). Sums are rounded in another order, so the weights "
            "will differ slightly from those of a run on the same number.",
            *(context.title, step, context.fabric.world_size, before),
        )
    log({"step": step, "processes": context.fabric.world_size, "processes_before": before})


@contextmanager
def _log_to(path: Path | None, fabric: Fabric, start: int) -> Iterator[Log]:
    """Open the JSON lines log of a stage, keeping the lines of the first `start` steps."""
    if path is None or not fabric.is_global_zero:
        yield lambda row: None
        return
    with writing(path):
        kept = path.read_bytes().splitlines(True) if start and path.is_file() else []
        write_bytes_whole(path, b"".join(line for line in kept if _is_before(start, line)))
        file = path.open("ab", buffering=0)  # unbuffered, so that closing does not retry a line that failed to write

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
    except (ValueError, LookupError, TypeError):  # a truncated line
        return False
