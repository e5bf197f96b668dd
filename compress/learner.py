"""Everything that takes part in a training step: student, teachers, slow copy, objective, optimisers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipress.compress.context import Context, Hook, Training, steps_of
from clipress.compress.fabric import everywhere, gather_shards, gathered, whole
from clipress.compress.losses import (
    MAX_LOG_SCALE,
    SIDES,
    Batch,
    Features,
    Loss,
    Momentum,
    Objective,
    Sizes,
    loss_type,
    needs_of,
    positives,
)
from clipress.errors import RecipeError
from clipress.metrics.evaluate import classifier
from clipress.models import anatomy
from clipress.models.load import Model
from clipress.models.students import rest

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Towers(nn.Module):
    """One forward for both towers, so that DDP and FSDP see every parameter used."""

    def __init__(self, model: nn.Module, tokens: Sequence[str] = (), frozen: Sequence[str] = ()) -> None:
        super().__init__()
        self.model, self.frozen = model, tuple(frozen)
        self.tokens: dict[str, Tensor] = {}
        layers = {side: anatomy.token_layer(model, side) for side in tokens}
        self.handles = [
            layer.register_forward_hook(lambda _, __, out, side=side: self.tokens.update({side: out}))
            for side, layer in layers.items()
        ]

    def forward(
        self, pixels: Tensor | None = None, ids: Tensor | None = None, hidden: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Encode what is given. Returns raw embeddings [B, D] per side, `masked` of `hidden`, tokens if asked, `scale`."""
        outputs = {"scale": self.model.logit_scale.exp().reshape(())}
        encode = {"image": (self.model.encode_image, pixels), "text": (self.model.encode_text, ids)}
        for side, (encoder, inputs) in encode.items():
            if inputs is not None:
                with torch.no_grad() if side in self.frozen else nullcontext():
                    outputs[side] = encoder(inputs).float()
        outputs |= {f"{side}_tokens": tokens.float() for side, tokens in self.tokens.items()}
        self.tokens.clear()
        if hidden is not None:
            outputs["masked"] = self.model.encode_image(hidden).float()
            self.tokens.clear()
        return outputs

    def close(self) -> None:
        """Leave the model without hooks."""
        for handle in self.handles:
            handle.remove()


class MomentumTwin:
    """A slow copy of the student and a queue of past features, as ALBEF, BLIP and UPop train with.

    The twin carries no gates. The queue holds online features (as UPop's code does) and starts empty.
    """

    DECAY, SHARE = 0.995, 0.4  # of the twin's weights; of the twin's opinion in the targets

    def __init__(self, model: nn.Module, config: Training, context: Context) -> None:
        self.model, self.fabric, self.size = model, context.fabric, config.queue
        self.local = context.runtime.local_loss
        self.twin = copy.deepcopy(model).eval().requires_grad_(False)
        for module in self.twin.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        self.towers = Towers(self.twin).to(self.fabric.device)
        self.rise = steps_of(config.model_copy(update={"steps": None, "epochs": 1.0}), context)  # steps of one pass
        self.past: dict[str, Tensor] = {}

    def state(self) -> dict[str, Any]:
        return {"twin": self.twin.state_dict(), "past": self.past}

    def load_state(self, state: dict[str, Any]) -> None:
        self.twin.load_state_dict(state["twin"])
        self.past = {name: rows.to(self.fabric.device) for name, rows in state["past"].items()}

    @torch.no_grad()
    def step(self, batch: Batch, arrays: Mapping[str, Tensor], step: int) -> Momentum:
        """Move the twin towards the student, look at the batch with it, and put the batch into the queue."""
        for slow, fast in zip(self.twin.parameters(), self.model.parameters(), strict=True):
            slow.lerp_(whole(fast).reshape(slow.shape).to(slow.dtype), 1 - self.DECAY)
        with self.fabric.autocast():
            slow = _features(self.towers(arrays["pixels"], arrays["ids"]), self.fabric, self.local)
        groups = gathered(arrays["group"], self.fabric)
        teacher = batch.teachers[0] if batch.teachers else None
        new = {"image": slow.all_image, "text": slow.all_text, "group": groups}
        new |= {"teacher_image": teacher.all_image, "teacher_text": teacher.all_text} if teacher else {}
        seen = {name: torch.cat([rows, self.past[name]]) if self.past else rows for name, rows in new.items()}
        result = Momentum(
            image=slow.image,
            text=slow.text,
            all_image=seen["image"],
            all_text=seen["text"],
            teacher_image=seen.get("teacher_image"),
            teacher_text=seen.get("teacher_text"),
            targets=positives(arrays["group"] if self.local else groups, seen["group"]),
            share=self.SHARE * min(step / self.rise, 1.0),
        )
        online = {**new, "image": batch.student.all_image.detach(), "text": batch.student.all_text.detach()}
        kept = {name: torch.cat([rows, self.past[name]]) if self.past else rows for name, rows in online.items()}
        self.past = {name: rows[: self.size] for name, rows in kept.items()} if self.size else {}
        return result


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices; leave norms, biases and scales alone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed, others = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


class Learner:
    """Everything that takes part in a step: student, teachers, objective, optimisers."""

    def __init__(self, model: Model, config: Training, terms: Mapping[str, Loss.Settings], context: Context) -> None:
        self.student, self.config, self.context, self.fabric = model, config, context, context.fabric
        needs = needs_of(terms)
        teachers = context.teachers if "teacher" in needs else ()
        if "teacher" in needs and not teachers:
            raise RecipeError(
                f"{context.title}: losses {sorted(terms)} compare with a teacher, and the recipe has none."
            )
        for number, teacher in enumerate(teachers):
            _refuse_strangers(model, teacher, terms if number == 0 else (), context)
        self.sides = _learning(model, config, needs, context)
        self.shown = SIDES if "pairs" in needs else self.sides
        tokens = self.sides if "tokens" in needs else ()
        sizes = _sizes(model, teachers, self.sides, tokens)
        self.objective = Objective(terms, sizes, context.seed).to(self.fabric.device)
        frozen = [side for side in SIDES if side not in self.sides]
        self.held = [p for side in frozen for p in anatomy.tower_parameters(model.module, side) if p.requires_grad]
        for parameter in self.held:
            parameter.requires_grad_(False)
        model.module.train()
        rest(model.module)
        if context.runtime.checkpointing:
            model.module.set_grad_checkpointing(True)
        # the slow copy is whole on each process
        self.twin = MomentumTwin(model.module, config, context) if "momentum" in needs else None
        self.towers = Towers(model.module, tokens, frozen)
        self.module = self.fabric.setup_module(self.towers)
        groups = parameter_groups(self.module, config.weight_decay)
        self.optimizer = self.fabric.setup_optimizers(
            torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
        )
        learned = parameter_groups(self.objective, config.weight_decay)
        learns = any(group["params"] for group in learned)
        self.own = torch.optim.AdamW(learned, lr=config.lr, betas=config.betas) if learns else None
        self.taught = len(teachers)
        run = () if context.caches else teachers
        self.mentors = [Towers(t.module, tokens).to(self.fabric.device).eval() for t in run]
        self.classes = _classifier(teachers[0], context) if "labels" in needs else None

    def gradients(
        self, step: int, arrays: dict[str, Tensor], hooks: Sequence[Hook]
    ) -> tuple[Tensor, dict[str, Tensor], bool]:
        """Run forward and backward. Returns the loss, its terms, and whether all of it is finite on every process.

        When it is not, nothing of the step is left in what later steps look at.
        """
        statistics = [
            (buffer, buffer.clone()) for norm in _batch_norms(self.student.module) for buffer in norm.buffers()
        ]
        past = self.twin.past if self.twin is not None else {}
        total, terms, finite = self._gradients(step, arrays, hooks)
        if not finite:
            for buffer, before in statistics:
                buffer.copy_(before)
            if self.twin is not None:
                self.twin.past = past
        return total, terms, finite

    def _gradients(
        self, step: int, arrays: dict[str, Tensor], hooks: Sequence[Hook]
    ) -> tuple[Tensor, dict[str, Tensor], bool]:
        inputs = {"pixels": arrays["pixels"]} if "image" in self.shown else {}
        inputs |= {"ids": arrays["ids"]} if "text" in self.shown else {}
        if "masked" in self.objective.needs and "image" in self.sides:
            inputs["hidden"] = self.objective.hide(arrays["pixels"], self._noise(step))
        moving = any(hook.moves(step) for hook in hooks)
        parts = self.context.runtime.accumulate
        if parts == 1:
            outputs = self.module(**inputs)
        else:
            outputs = self._without_graph(inputs, parts)
        batch = self._batch(outputs, arrays)
        if self.twin is not None:
            batch = replace(batch, momentum=self.twin.step(batch, arrays, step))
        total, terms = self.objective(replace(batch, masks_move=moving))
        if not everywhere(bool(torch.isfinite(total)), self.fabric):
            return total, terms, False
        if self.fabric.world_size > 1:  # DDP wants a gradient for every parameter, if it is zero
            total = total + 0.0 * sum(out.sum() for out in outputs.values() if out.requires_grad)
        self.fabric.backward(total)
        if parts == 1:
            for hook in hooks:
                hook.after_part(step)
        else:
            self._backward_in_parts(inputs, outputs, parts, hooks, step)
        own = self._share_own_gradients()
        norm = self.fabric.clip_gradients(
            self.module, self.optimizer, max_norm=self.config.clip, error_if_nonfinite=False
        )
        return total, terms, everywhere(bool(torch.isfinite(norm) and torch.isfinite(own)), self.fabric)

    def update(self, rate: float) -> None:
        """Take the step."""
        for optimizer in (self.optimizer, self.own):
            if optimizer is not None:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
        _clamp_scale(self.student.module)
        self.objective.clamp_scales()

    def forget_gradients(self) -> None:
        """Clear every gradient."""
        self.optimizer.zero_grad()
        self.objective.zero_grad()

    def state(self) -> dict[str, Any]:
        """Return what the next step depends on."""
        state = {
            "student": self.student.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "objective": self.objective.state_dict(),
            "rng": torch.get_rng_state(),
        }
        if self.own is not None:
            state["own"] = self.own.state_dict()
        if self.twin is not None:
            state["twin"] = self.twin.state()
        if torch.cuda.is_available():
            state["cuda_rng"] = torch.cuda.get_rng_state()
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.student.module.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.objective.load_state_dict(state["objective"])
        if self.own is not None:
            self.own.load_state_dict(state["own"])
        if self.twin is not None:
            self.twin.load_state(state["twin"])
        torch.set_rng_state(state["rng"])
        if "cuda_rng" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda_rng"])

    def finish(self) -> None:
        """Leave the student as a plain model in evaluation mode, nothing frozen, nothing hooked."""
        for towers in (self.towers, *self.mentors):
            towers.close()
        gather_shards(self.student.module)
        for parameter in self.held:
            parameter.requires_grad_(True)
        if self.context.runtime.checkpointing:
            self.student.module.set_grad_checkpointing(False)
        self.student.module.eval()

    def _without_graph(self, inputs: Mapping[str, Tensor], parts: int) -> dict[str, Tensor]:
        """Encode a batch part by part, keeping outputs only: leaves [B, ...] the loss is differentiated to (GradCache).

        Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup".
        """
        with torch.no_grad(), _still_statistics(self.student.module):
            seen = [self.module(**part) for part in _split(inputs, parts)]
        outputs = {name: torch.cat([one[name] for one in seen]) for name in seen[0] if name != "scale"}
        return {name: rows.requires_grad_() for name, rows in (outputs | {"scale": seen[0]["scale"]}).items()}

    def _backward_in_parts(
        self, inputs: Mapping[str, Tensor], leaves: Mapping[str, Tensor], parts: int, hooks: Sequence[Hook], step: int
    ) -> None:
        """Encode once more with a graph, part by part, and hand on the gradients the loss left on the leaves."""
        scale = leaves["scale"].grad
        rows = {name: leaf.grad for name, leaf in leaves.items() if name != "scale" and leaf.grad is not None}
        pieces = list(zip(_split(inputs, parts), _split(rows, parts), strict=True))
        for number, (part, grads) in enumerate(pieces):
            last = number == len(pieces) - 1
            with self.fabric.no_backward_sync(self.module, enabled=not last):
                outputs = self.module(**part)
                linear = sum(
                    (outputs[name] * grad).sum() for name, grad in grads.items() if outputs[name].requires_grad
                )
                # the scale's gradient is whole already: it goes in once
                linear = linear + outputs["scale"] * (scale if last and scale is not None else 0.0)
                self.fabric.backward(linear)
            for hook in hooks:
                hook.after_part(step)

    def _noise(self, step: int) -> Callable[..., Tensor]:
        """Return a source of noise that gives a pair the same values on any number of processes."""
        generator = torch.Generator().manual_seed(self.context.seed * 1_000_003 + step)
        rank, world = self.fabric.global_rank, self.fabric.world_size
        rows = self.config.batch_size

        def draw(*shape: int) -> Tensor:
            return torch.rand(rows, *shape, generator=generator)[rank::world].to(self.fabric.device)

        return draw

    def _batch(self, outputs: Mapping[str, Tensor], arrays: Mapping[str, Tensor]) -> Batch:
        """Gather from the other processes what the losses need."""
        fabric, local = self.fabric, self.context.runtime.local_loss
        student = _features(outputs, fabric, local)
        projected = None
        if self.objective.projections:
            maps = self.objective.projections
            own = {side: maps[side](outputs[side]) for side in self.sides}
            if "masked" in outputs:
                own["masked"] = maps["image"](outputs["masked"])
            projected = _features({**own, "scale": outputs["scale"]}, fabric, local)
        wanted = tuple(_features(self._taught(number, arrays), fabric, local) for number in range(self.taught))
        groups, labels = gathered(arrays["group"], fabric), gathered(arrays["label"], fabric)
        return Batch(
            student,
            wanted,
            positives(arrays["group"] if local else groups, groups),
            groups,
            projected=projected,
            labels=arrays["label"] if local else labels,
            all_labels=labels,
            classes=self.classes,
            sides=self.sides,
        )

    @torch.no_grad()
    def _taught(self, number: int, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a teacher's raw embeddings: those the loader brought from a cache, else a forward pass."""
        if caches := self.context.caches:
            raw = {
                side: arrays[f"teacher_{side}_{number}"] * arrays[f"teacher_{side}_norm_{number}"][:, None]
                for side in SIDES
                if f"teacher_{side}_{number}" in arrays
            }
            scale = caches[0][number].manifest.logit_scale
            return raw | {"scale": torch.tensor(scale, device=self.fabric.device)}
        mentor = self.mentors[number]
        shown = SIDES if {"pairs", "keys"} & self.objective.needs else self.sides
        with self.fabric.autocast():
            return mentor(arrays["pixels"] if "image" in shown else None, arrays["ids"] if "text" in shown else None)

    def _share_own_gradients(self) -> Tensor:
        """Average over processes the gradients of what the losses learn, and clip them by themselves; returns their norm."""
        learned = [p for p in self.objective.parameters() if p.grad is not None]
        if self.fabric.world_size > 1:
            for parameter in learned:
                parameter.grad = self.fabric.all_reduce(parameter.grad, reduce_op="mean")
        return nn.utils.clip_grad_norm_(learned, self.config.clip)


def _learning(model: Model, config: Training, needs: frozenset[str], context: Context) -> tuple[str, ...]:
    """Return the towers that learn: asked for, not the teacher's own, and with data to learn from."""
    sources = context.sources()
    there = {"image": all(s.has_images for s in sources), "text": all(s.has_texts for s in sources)}
    lacking = [side for side in SIDES if not there[side]]
    if lacking and {"pairs", "keys"} & needs:
        raise RecipeError(
            f"{context.title}: its losses look at pairs, and the training data have no {lacking[0]}s. Use losses that look "
            "at one tower alone, such as feature, or data with both."
        )
    trainable = [side for side in SIDES if any(p.requires_grad for p in anatomy.tower_parameters(model.module, side))]
    sides = tuple(side for side in trainable if config.towers in ("both", side) and there[side])
    if not sides:
        raise RecipeError(
            f"{context.title}: nothing can learn: 'towers: {config.towers}' was asked for, trainable are {trainable}, "
            f"the data have {[side for side in SIDES if there[side]]}."
        )
    return sides


def _refuse_strangers(student: Model, teacher: Model, terms: Iterable[str], context: Context) -> None:
    """A teacher that is run sees the student's pixels and ids; some losses want embeddings of one width."""
    title = context.title
    if context.caches and "tokens" in needs_of(terms):
        raise RecipeError(
            f"{title}: token features are not in a teacher's cache. Leave out 'tokens' or 'teacher.cache'."
        )
    for what, own, other in (
        ("preprocessing", student.preprocess.model_dump(), teacher.preprocess.model_dump()),
        ("tokenizer", student.tokenizer, teacher.tokenizer),
    ):
        if own != other and not context.caches:
            raise RecipeError(
                f"{title}: teacher and student must share their {what}; found {other} and {own}. "
                "With 'teacher.cache' they need not."
            )
    widths = [model.architecture["embed_dim"] for model in (teacher, student)]
    strict = sorted(name for name in terms if "width" in loss_type(name, title).needs)
    if strict and widths[0] != widths[1]:
        raise RecipeError(
            f"{title}: losses {strict} compare embeddings; the teacher's have {widths[0]} dims, the student's {widths[1]}. "
            "Give the student the same embed_dim, or use affinity or feature."
        )


def _sizes(student: Model, teachers: Sequence[Model], sides: Sequence[str], tokens: Sequence[str]) -> Sizes:
    def shapes(model: Model) -> dict[str, tuple[int, int]]:
        return {side: anatomy.token_shape(model.module, side) for side in tokens}

    return Sizes(
        student.architecture["embed_dim"],
        tuple(teacher.architecture["embed_dim"] for teacher in teachers),
        tuple(sides),
        anatomy.image_size(student.module),
        student_tokens=shapes(student),
        teacher_tokens=shapes(teachers[0]) if teachers else None,
    )


def _split(rows: Mapping[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    pieces = {name: tensor.chunk(parts) for name, tensor in rows.items()}
    count = len(next(iter(pieces.values())))
    return [{name: chunks[number] for name, chunks in pieces.items()} for number in range(count)]


def _classifier(teacher: Model, context: Context) -> Tensor:
    """Return the teacher's text classifier of all labelled sources, one after the other: unit rows [C, D]."""
    _, encode = teacher.encoders()
    found = []
    for source in context.sources():
        if classes := getattr(source, "classes", None):
            found.append(classifier(encode, teacher.tokenize(), classes))
    if not found:
        raise RecipeError(f"{context.title}: a loss on labels was asked for, and no training source has classes.")
    return torch.from_numpy(np.concatenate(found)).float().to(context.fabric.device)


def _batch_norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@contextmanager
def _still_statistics(model: nn.Module) -> Iterator[None]:
    """Keep the running statistics of batch norms as they are: the pass that counts comes later."""
    norms = _batch_norms(model)
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    yield
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum


def _features(outputs: Mapping[str, Tensor], fabric: Fabric, local: bool) -> Features:
    """Normalise a model's outputs and gather them; not local: every process takes all rows for its own."""
    unit = {side: F.normalize(outputs[side], dim=-1) if side in outputs else None for side in SIDES}
    everyone = {side: None if rows is None else gathered(rows, fabric) for side, rows in unit.items()}
    own = unit if local else everyone
    aside = {name: outputs.get(name) for name in (*SIDES, "masked", "image_tokens", "text_tokens")}
    if not local:
        aside = {name: None if rows is None else gathered(rows, fabric) for name, rows in aside.items()}
    return Features(
        own["image"],
        own["text"],
        everyone["image"],
        everyone["text"],
        outputs["scale"],
        raw_image=aside["image"],
        raw_text=aside["text"],
        image_tokens=aside["image_tokens"],
        text_tokens=aside["text_tokens"],
        masked_image=None if aside["masked"] is None else F.normalize(aside["masked"], dim=-1),
    )


@torch.no_grad()
def _clamp_scale(model: nn.Module) -> None:
    model.logit_scale.clamp_(0, MAX_LOG_SCALE)
