"""The one training loop. Every stage that learns calls `train`; launch, precision and distribution are Fabric's."""

from __future__ import annotations

import json
import math
import sys
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
from tqdm import tqdm

from clipress.compress.checkpoint import load_checkpoint, save_checkpoint, steps_saved
from clipress.compress.context import Context, Hook, Training, steps_of
from clipress.compress.fabric import everywhere, means
from clipress.compress.learner import Learner
from clipress.compress.losses import terms_from
from clipress.data.broken import BrokenRecords
from clipress.data.pairs import Batches
from clipress.data.training import TrainingSet
from clipress.errors import ClipressError
from clipress.models.load import Clip

if TYPE_CHECKING:
    from lightning_fabric import Fabric


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


def batches(clip: Clip, config: Training, context: Context, steps: int, start: int = 0) -> DataLoader:
    """Return the loader of a stage: step t's batch depends on the seed and t alone."""
    sources = context.sources()
    dataset = TrainingSet(
        sources,
        clip.preprocess,
        clip.tokenize(),
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
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=_tensors, num_workers=context.data.workers)


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
    clip: Clip,
    config: Training,
    losses: Mapping[str, Any] | tuple[str, ...],
    context: Context,
    hooks: Sequence[Hook] = (),
) -> dict[str, Any]:
    """Train `clip.model` in place with the weighted loss terms. Returns steps, seconds and the last losses."""
    fabric, steps = context.fabric, steps_of(config, context)
    terms = terms_from(losses, context.title)
    learner = Learner(clip, config, terms, context)
    if clip.sparsity:  # only now are the weights where they stay, on a device or in shards
        hooks = [*hooks, HoldZeros(clip.model, clip.sparsity["weights"])]
    progress = _continued(learner, hooks, context)
    every = context.runtime.checkpoint if context.checkpoints and context.runtime.strategy != "fsdp2" else 0
    start, bad_in_a_row, skipped = progress["step"], progress["bad_in_a_row"], progress["skipped"]
    record: dict[str, Any] = progress["record"]
    unreadable = BrokenRecords()
    began = time.perf_counter() - progress["seconds"]
    with _log_to(context.log, fabric, start) as log, _bar(steps, context.title, fabric, start) as bar:
        for step, arrays in enumerate(batches(clip, config, context, steps, start), start):
            for item in unreadable.see(len(arrays["group"]), arrays.pop("broken")):
                log({"step": step, "broken": asdict(item)})
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
                record = dict(zip(("loss", *parts), means([total, *parts.values()], fabric), strict=True))
                bar.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)
            else:
                skipped, bad_in_a_row = skipped + 1, bad_in_a_row + 1
                broken = [name for name, part in parts.items() if not torch.isfinite(part)] or ["the gradient"]
                log({"step": step, "skipped": broken})
                if bad_in_a_row == MAX_BAD_STEPS:
                    raise ClipressError(
                        f"{context.title}: {', '.join(broken)} was not finite for {MAX_BAD_STEPS} steps in a row "
                        f"(last step {step}). Lower 'lr' (now {config.lr}) or look at the data."
                    )
            learner.forget_gradients()
            bar.update()
            seconds = round(time.perf_counter() - began, 3)
            log({"step": step, "lr": rate, "seconds": seconds, **record})
            if every and (step + 1) % every == 0 and step + 1 < steps:
                progress = {"step": step + 1, "bad_in_a_row": bad_in_a_row, "skipped": skipped, "record": record}
                state = {"progress": progress | {"seconds": seconds}, "learner": learner.state()}
                state["hooks"] = [hook.state() for hook in hooks]
                save_checkpoint(context.checkpoints, step + 1, state, fabric.global_rank)
    learner.finish()
    seconds = round(time.perf_counter() - began, 2)
    replaced = {"broken_records": unreadable.broken} if unreadable.broken else {}
    return {"steps": steps, "seconds": seconds, "skipped_steps": skipped, "last": record, **replaced}


def _continued(learner: Learner, hooks: Sequence[Hook], context: Context) -> dict[str, Any]:
    """Put everything back to the newest checkpoint that every process can read. Returns how far the training was."""
    fabric = context.fabric
    for step in reversed(steps_saved(context.checkpoints, 0) if context.checkpoints else []):
        state = load_checkpoint(context.checkpoints, step, fabric.global_rank)
        if everywhere(state is not None, fabric):
            learner.load_state(state["learner"])
            for hook, kept in zip(hooks, state["hooks"], strict=True):
                hook.load_state(kept)
            return state["progress"]
    return {"step": 0, "bad_in_a_row": 0, "skipped": 0, "record": {}, "seconds": 0}


@contextmanager
def _bar(steps: int, title: str, fabric: Fabric, start: int) -> Iterator[tqdm]:
    """A progress bar with an ETA; one line now and then where nobody watches."""
    shown = {"mininterval": 0.2 if sys.stderr.isatty() else 15.0, "disable": not fabric.is_global_zero}
    with tqdm(total=steps, initial=start, desc=title, unit="step", **shown) as bar:
        yield bar


@contextmanager
def _log_to(path: Path | None, fabric: Fabric, start: int) -> Iterator[Any]:
    """Open the machine-readable log of a stage, one JSON object per line; what `start` steps wrote is kept."""
    if path is None or not fabric.is_global_zero:
        yield lambda row: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = path.read_text(encoding="utf-8").splitlines(True) if start and path.is_file() else []
    with path.open("w", encoding="utf-8") as file:
        file.writelines(line for line in kept if line.endswith("\n") and json.loads(line)["step"] < start)
        yield lambda row: print(json.dumps(row), file=file, flush=True)
