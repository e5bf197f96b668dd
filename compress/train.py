"""The one training loop. Every stage that learns calls `train`; launch, precision and distribution are Fabric's."""

from __future__ import annotations

import copy
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from clipress.compress.losses import Batch, Features, Momentum, compute, needs_momentum, needs_teacher
from clipress.data.pairs import Batches, DataSpec, TrainingSet, open_source
from clipress.errors import ClipressError, RecipeError
from clipress.models import anatomy
from clipress.models.load import Clip
from clipress.models.students import rest
from clipress.recipe import Section

if TYPE_CHECKING:
    from lightning_fabric import Fabric

MAX_BAD_STEPS = 20  # so many non-finite steps in a row stop the run
MAX_LOG_SCALE = math.log(100)  # CLIP's clamp


class Runtime(Section):
    """The `runtime` section. Several processes: start the same command with torchrun."""

    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on a GPU that has it, else fp32."""
    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"
    """auto: DDP when there are several processes."""


class Training(Section):
    """Settings every stage that learns has."""

    name: str | None = None
    """Name of the artefact; default: the stage's."""
    steps: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0)
    """Passes over the first training source, instead of steps."""
    batch_size: int = Field(128, ge=2)
    """Pairs per step, all processes together."""
    lr: float = Field(1e-4, ge=0)
    weight_decay: float = Field(0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.98)
    warmup: float = Field(0.1, ge=0, lt=1)
    """Part of the steps in which the rate rises."""
    decay: Literal["cosine", "constant"] = "cosine"
    """Then it falls to zero as a half cosine, or stays."""
    clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    queue: int = Field(0, ge=0)
    """Past pairs that losses with a momentum twin contrast with; UPop keeps 57,600."""

    def model_post_init(self, _: Any) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise RecipeError("A stage that trains needs either 'steps' or 'epochs'.")


@dataclass(frozen=True)
class Context:
    """What a stage may use besides its settings and its student."""

    fabric: Fabric
    data: DataSpec
    seed: int
    teacher: Clip | None = None
    log: Path | None = None
    """JSON lines; None keeps none."""
    title: str = ""

    def sources(self) -> list[Any]:
        """Open the training sources."""
        return [open_source(spec) for spec in self.data.train]


class Hook:
    """What a stage may do at fixed points of a step."""

    def before(self, step: int, arrays: Mapping[str, Tensor]) -> None:
        """Called before the forward pass, with the batch."""

    def after_backward(self, step: int) -> None:
        """Called when gradients are there and the loss was finite."""

    def after_update(self, step: int) -> None:
        """Called when the weights have moved."""


class HoldZeros(Hook):
    """Keep the zeros of the named weights: this is how 2:4 survives any later training."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        parameters = dict(model.named_parameters())
        self.held = [(parameters[name], parameters[name].detach() != 0) for name in names]

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        for weight, mask in self.held:
            weight.mul_(mask)


class Towers(nn.Module):
    """One forward for both towers, so that DDP and FSDP see every parameter used."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image = self.model.encode_image(pixels, normalize=True)
        text = self.model.encode_text(ids, normalize=True)
        return image.float(), text.float(), self.model.logit_scale.exp().reshape(())


class MomentumTwin:
    """A slow copy of the student and a queue of past features, as ALBEF, BLIP and UPop train with.

    The twin carries no gates. The queue holds online features (as UPop's code does) and starts empty.
    """

    DECAY, SHARE = 0.995, 0.4  # of the twin's weights; of the twin's opinion in the targets

    def __init__(self, model: nn.Module, config: Training, context: Context) -> None:
        self.model, self.fabric, self.size = model, context.fabric, config.queue
        self.twin = copy.deepcopy(model).eval().requires_grad_(False)
        for module in self.twin.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        self.towers = Towers(self.twin).to(self.fabric.device)
        self.rise = steps_of(config.model_copy(update={"steps": None, "epochs": 1.0}), context)  # steps of one pass
        self.past: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self, batch: Batch, arrays: Mapping[str, Tensor], step: int) -> Momentum:
        """Move the twin towards the student, look at the batch with it, and put the batch into the queue."""
        for slow, fast in zip(self.twin.parameters(), self.model.parameters(), strict=True):
            slow.lerp_(_whole(fast).reshape(slow.shape).to(slow.dtype), 1 - self.DECAY)
        with self.fabric.autocast():
            slow = _features(self.towers(arrays["pixels"], arrays["ids"]), self.fabric)
        group, groups = arrays["group"], _gathered(arrays["group"], self.fabric)
        teacher = batch.teacher
        new = {"image": slow.all_image, "text": slow.all_text, "group": groups}
        new |= {"teacher_image": teacher.all_image, "teacher_text": teacher.all_text} if teacher else {}
        seen = {name: torch.cat([rows, self.past[name]]) if self.past else rows for name, rows in new.items()}
        same = group[:, None] == seen["group"][None, :]
        result = Momentum(
            image=slow.image,
            text=slow.text,
            all_image=seen["image"],
            all_text=seen["text"],
            teacher_image=seen.get("teacher_image"),
            teacher_text=seen.get("teacher_text"),
            targets=same.float() / same.sum(1, keepdim=True),
            share=self.SHARE * min(step / self.rise, 1.0),
        )
        online = {**new, "image": batch.student.all_image.detach(), "text": batch.student.all_text.detach()}
        kept = {name: torch.cat([rows, self.past[name]]) if self.past else rows for name, rows in online.items()}
        self.past = {name: rows[: self.size] for name, rows in kept.items()} if self.size else {}
        return result


def start_fabric(runtime: Runtime) -> Fabric:
    """Start Fabric on what is there: one CPU, one GPU, or the processes torchrun started."""
    from lightning_fabric import Fabric

    local, world = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), int(os.environ.get("WORLD_SIZE", 1))
    accelerator = runtime.accelerator
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    bf16 = runtime.precision == "bf16" or (
        runtime.precision == "auto" and accelerator == "cuda" and torch.cuda.is_bf16_supported()
    )
    strategy: Any = runtime.strategy if runtime.strategy != "auto" else ("ddp" if world > 1 else "auto")
    if strategy == "fsdp2":
        from lightning_fabric.strategies import ModelParallelStrategy

        strategy = ModelParallelStrategy(_shard, data_parallel_size=world, tensor_parallel_size=1)
    precision = "bf16-mixed" if bf16 and strategy in ("auto", "ddp") else "bf16-true" if bf16 else "32-true"
    fabric = Fabric(
        accelerator=accelerator, devices=local, num_nodes=max(world // local, 1), strategy=strategy, precision=precision
    )
    fabric.launch()
    return fabric


def _shard(towers: Towers, mesh: Any) -> Towers:
    """FSDP2: shard every block, then what is left."""
    from torch.distributed.fsdp import fully_shard

    mesh = mesh["data_parallel"]
    scale = towers.model.logit_scale  # FSDP2 refuses parameters without dimensions
    if scale.ndim == 0:
        towers.model.logit_scale = nn.Parameter(scale.detach().reshape(1))
    for block in anatomy.blocks(towers.model):
        fully_shard(block.module, mesh=mesh)
    return fully_shard(towers, mesh=mesh)


def _whole(parameter: Tensor) -> Tensor:
    """Return a parameter as it is, or gathered from FSDP2's shards."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


@torch.no_grad()
def _gather_shards(model: nn.Module) -> None:
    """Turn FSDP2's shards back into plain parameters, in place."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if hasattr(parameter, "full_tensor"):
                module._parameters[name] = nn.Parameter(_whole(parameter))
    if model.logit_scale.ndim == 1:
        model.logit_scale = nn.Parameter(model.logit_scale.detach().reshape(()))


def steps_of(config: Training, context: Context) -> int:
    """Return how many steps a stage takes."""
    if config.steps is not None:
        return config.steps
    shares = [spec.share for spec in context.data.train]
    per_step = config.batch_size * shares[0] / sum(shares)
    return max(math.ceil(config.epochs * len(context.sources()[0]) / per_step), 1)


def batches(clip: Clip, config: Training, context: Context, steps: int, start: int = 0) -> DataLoader:
    """Return the loader of a stage: step t's batch depends on the seed and t alone."""
    sources = context.sources()
    dataset = TrainingSet(sources, clip.preprocess, clip.tokenize(), context.data.augment, context.seed)
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


def _tensors(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def learning_rate(step: int, steps: int, config: Training) -> float:
    """Linear warm-up, then a half cosine to zero, or no change."""
    rising = max(round(config.warmup * steps), 1)
    if step < rising:
        return config.lr * (step + 1) / rising
    if config.decay == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices; leave norms, biases and scales alone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed, others = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def train(
    clip: Clip, config: Training, weights: Mapping[str, float], context: Context, hooks: Sequence[Hook] = ()
) -> dict[str, Any]:
    """Train `clip.model` in place with the weighted loss terms. Returns steps, seconds and the last losses."""
    fabric, teacher = context.fabric, context.teacher
    if needs_teacher(weights) and teacher is None:
        raise RecipeError(f"{context.title}: losses {sorted(weights)} compare with a teacher, and the recipe has none.")
    if needs_teacher(weights):
        _refuse_strangers(clip, teacher, weights, context.title)
    steps = steps_of(config, context)
    clip.model.train()
    rest(clip.model)  # a tower that a recipe takes from the teacher stays as it is
    twin = MomentumTwin(clip.model, config, context) if needs_momentum(weights) else None  # whole on each process
    module = fabric.setup_module(Towers(clip.model))
    if clip.sparsity:  # only now are the weights where they stay, on a device or in shards
        hooks = [*hooks, HoldZeros(clip.model, clip.sparsity["weights"])]
    optimizer = fabric.setup_optimizers(
        torch.optim.AdamW(parameter_groups(module, config.weight_decay), lr=config.lr, betas=config.betas, fused=True)
    )
    mentor = None
    if needs_teacher(weights):
        mentor = Towers(teacher.model).to(fabric.device).eval()
    bad_in_a_row = skipped = 0
    record: dict[str, Any] = {}
    began = time.perf_counter()
    with _log_to(context.log, fabric) as log, _bar(steps, context.title, fabric) as bar:
        for step, arrays in enumerate(batches(clip, config, context, steps)):
            arrays = {name: tensor.to(fabric.device, non_blocking=True) for name, tensor in arrays.items()}
            rate = learning_rate(step, steps, config)
            for group in optimizer.param_groups:
                group["lr"] = rate
            for hook in hooks:
                hook.before(step, arrays)
            batch = _batch(module, mentor, arrays, fabric)
            if twin is not None:
                batch = replace(batch, momentum=twin.step(batch, arrays, step))
            total, parts = compute(weights, batch)
            finite = _everywhere(bool(torch.isfinite(total)), fabric)
            if finite:
                fabric.backward(total)
                norm = fabric.clip_gradients(module, optimizer, max_norm=config.clip, error_if_nonfinite=False)
                finite = bool(torch.isfinite(norm))
            if finite:
                for hook in hooks:
                    hook.after_backward(step)
                optimizer.step()
                _clamp_scale(clip.model)
                for hook in hooks:
                    hook.after_update(step)
                bad_in_a_row = 0
                record = dict(zip(("loss", *parts), _mean([total, *parts.values()], fabric), strict=True))
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
            optimizer.zero_grad()
            bar.update()
            log({"step": step, "lr": rate, "seconds": round(time.perf_counter() - began, 3), **record})
    _gather_shards(clip.model)
    clip.model.eval()
    seconds = round(time.perf_counter() - began, 2)
    return {"steps": steps, "seconds": seconds, "skipped_steps": skipped, "last": record}


def _refuse_strangers(student: Clip, teacher: Clip, weights: Mapping[str, float], title: str) -> None:
    """Teacher and student are shown the same pixels and ids; embeddings that are compared have one width."""
    for what, own, other in (
        ("preprocessing", student.preprocess.model_dump(), teacher.preprocess.model_dump()),
        ("tokenizer", student.tokenizer, teacher.tokenizer),
    ):
        if own != other:
            raise RecipeError(f"{title}: teacher and student must share their {what}; found {other} and {own}.")
    widths = [clip.architecture["embed_dim"] for clip in (teacher, student)]
    compared = sorted({"feature", "interactive", "upop-kd"} & weights.keys())
    if compared and widths[0] != widths[1]:
        raise RecipeError(
            f"{title}: losses {compared} compare embeddings; the teacher's have {widths[0]} dims, the student's {widths[1]}. "
            "Give the student the same embed_dim, or use affinity."
        )


def _batch(module: nn.Module, mentor: nn.Module | None, arrays: Mapping[str, Tensor], fabric: Fabric) -> Batch:
    """Run both models on a batch and gather what the losses need from the other processes."""
    group, pixels, ids = arrays["group"], arrays["pixels"], arrays["ids"]
    student = _features(module(pixels, ids), fabric)
    wanted = None
    if mentor is not None:
        with torch.no_grad(), fabric.autocast():
            wanted = _features(mentor(pixels, ids), fabric)
    same = group[:, None] == _gathered(group, fabric)[None, :]  # [B, N]
    return Batch(student, wanted, same.float() / same.sum(1, keepdim=True))


def _features(outputs: tuple[Tensor, Tensor, Tensor], fabric: Fabric) -> Features:
    image, text, scale = outputs
    return Features(image, text, _gathered(image, fabric), _gathered(text, fabric), scale)


def _gathered(local: Tensor, fabric: Fabric) -> Tensor:
    """Stack all processes' rows [N, ...]; gradients flow back to the process a row came from."""
    if fabric.world_size == 1:
        return local
    return fabric.all_gather(local, sync_grads=local.requires_grad).flatten(0, 1)


def _mean(values: Sequence[Tensor], fabric: Fabric) -> list[float]:
    """Average scalars over processes: each has the loss of its own rows."""
    stacked = torch.stack([value.detach() for value in values])
    return (stacked if fabric.world_size == 1 else fabric.all_reduce(stacked, reduce_op="mean")).tolist()


def _everywhere(value: bool, fabric: Fabric) -> bool:
    """Tell whether something holds on every process; all must decide alike."""
    if fabric.world_size == 1:
        return value
    return bool(
        fabric.all_reduce(torch.tensor(float(value), device=fabric.device), reduce_op="sum") == fabric.world_size
    )


@torch.no_grad()
def _clamp_scale(model: nn.Module) -> None:
    model.logit_scale.clamp_(0, MAX_LOG_SCALE)


@contextmanager
def _bar(steps: int, title: str, fabric: Fabric) -> Iterator[tqdm]:
    """A progress bar with an ETA; one line now and then where nobody watches."""
    interval = 0.2 if sys.stderr.isatty() else 15.0
    with tqdm(total=steps, desc=title, unit="step", mininterval=interval, disable=not fabric.is_global_zero) as bar:
        yield bar


@contextmanager
def _log_to(path: Path | None, fabric: Fabric) -> Iterator[Any]:
    """Open the machine-readable log of a stage: one JSON object per line."""
    if path is None or not fabric.is_global_zero:
        yield lambda row: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        yield lambda row: print(json.dumps(row), file=file, flush=True)
