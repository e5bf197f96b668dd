"""One training step: a pass through the losses, gradients and optimizers."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clipress.compress.context import Context
from clipress.compress.fabric import all_finite, as_stored, compile_in_place, gather_shards
from clipress.compress.grad_cache import backward_in_chunks, batch_norms, encode_in_chunks
from clipress.compress.hook import Hook
from clipress.compress.loss_pass import LossPass
from clipress.compress.losses import Loss
from clipress.compress.settings import Training
from clipress.models import anatomy
from clipress.models.drop_path import set_drop_path
from clipress.models.load import Model
from clipress.models.students import eval_frozen_modules
from clipress.tasks import task_named


def parameter_groups(model: nn.Module, config: Training, kept: Container[str] = ()) -> list[dict[str, Any]]:
    """Apply weight decay to matrices, and to norms, biases and scales only with `decay_vectors`.

    `kept` are last parts of the names of parameters that never decay.
    """
    trained = [(name.rpartition(".")[2], p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trained if p.ndim >= 2 and name not in kept]
    vectors = [p for name, p in trained if p.ndim < 2 and name not in kept]
    groups = [(matrices, config.weight_decay), (vectors, config.weight_decay if config.decay_vectors else 0.0)]
    if still := [p for name, p in trained if name in kept]:
        groups.append((still, 0.0))
    return [{"params": params, "weight_decay": decay} for params, decay in groups]


def optimizer_for(groups: Sequence[Mapping[str, Any]], config: Training) -> torch.optim.Optimizer:
    """Return the fused optimizer of a stage."""
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=True, fused=True)
    for parameter in (parameter for group in groups for parameter in group["params"]):
        # A first step that is skipped would leave what torch itself allocates unset.
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


class Learner(LossPass):
    """Everything a training step uses."""

    def __init__(self, student: Model, config: Training, terms: Mapping[str, Loss.Settings], context: Context) -> None:
        super().__init__(student, config, terms, context)
        frozen = [tower for tower in task_named(student.task).towers if tower not in self.lesson.learning]
        self.held = [p for t in frozen for p in anatomy.tower_parameters(student.module, t) if p.requires_grad]
        for parameter in self.held:
            parameter.requires_grad_(False)
        student.module.train()
        eval_frozen_modules(student.module)
        if context.runtime.grad_checkpointing:
            student.module.set_grad_checkpointing(True)
        if config.drop_path:
            set_drop_path(student.module, config.drop_path)
        self.module, self.uncompiled = self.fabric.setup_module(self.encoder), context.runtime.compile
        own = student.module  # timm's classifiers say what must not decay, such as positions
        kept = () if anatomy.is_clip(own) else own.no_weight_decay()
        groups = parameter_groups(self.module, config, kept)
        self.optimizer = self.fabric.setup_optimizers(optimizer_for(groups, config))
        self.finite: Tensor | None = None  # whether the gradients are: a bool () on the device
        learned = parameter_groups(self.objective, config)
        learns = any(group["params"] for group in learned)
        self.own = optimizer_for(learned, config) if learns else None

    def gradients(
        self, step: int, arrays: dict[str, Tensor], hooks: Sequence[Hook]
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Run forward and backward. Returns the loss, its terms, and whether everything is finite on every process.

        The last is a bool () on the device, and nothing here waits for it. A non-finite step leaves batch norm statistics and
        the EMA queue as they were before it.
        """
        if (
            self.uncompiled and self.finite is not None
        ):  # the first step makes what gates and hooks keep, which no graph can hold
            compile_in_place(self.encoder)
            self.uncompiled = False
        statistics = [(b, b.clone()) for norm in batch_norms(self.student.module) for b in norm.buffers()]
        past = self.ema.past if self.ema is not None else {}
        total, terms, finite = self._gradients(step, arrays, hooks)
        for buffer, before in statistics:
            buffer.copy_(torch.where(finite, buffer, before))
        if self.ema is not None:
            self.ema.past = _chosen(finite, self.ema.past, past)
        self.finite = finite
        return total, terms, finite

    def _gradients(
        self, step: int, arrays: dict[str, Tensor], hooks: Sequence[Hook]
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        inputs = self.inputs(step, arrays)
        moving = any(hook.moves(step) for hook in hooks)
        chunks = self.context.runtime.grad_cache_chunks
        outputs, states = (self.module(**inputs), []) if chunks == 1 else encode_in_chunks(self.module, inputs, chunks)
        total, terms = self.loss(outputs, arrays, step, moving)
        finite = all_finite([total], self.fabric)
        if self.fabric.world_size > 1:  # DDP requires a gradient for every parameter, even a zero one
            total = total + 0.0 * sum(out.sum() for out in outputs.values() if out.requires_grad)
        self.fabric.backward(total)

        def after_chunk() -> None:
            for hook in hooks:
                hook.after_part(step, finite)

        if chunks == 1:
            after_chunk()
        else:
            backward_in_chunks(self.module, inputs, outputs, states, self.fabric, after_chunk)
        own = self._reduce_own_gradients()
        norm = self.fabric.clip_gradients(
            self.module, self.optimizer, max_norm=self.config.grad_clip_norm, error_if_nonfinite=False
        )
        return total, terms, finite & all_finite([norm, own], self.fabric)

    def update(self, rate: float) -> None:
        """Update the weights with the gradients of the last batch, or leave everything as it is if they are not finite."""
        sharded = self.context.runtime.strategy == "fsdp2"
        if sharded and not self.finite:  # the fused update of shards has no such switch
            return
        for optimizer in (self.optimizer, self.own):
            if optimizer is not None:
                if not sharded:  # a fused optimizer skips the update on the device, as torch's GradScaler makes it do
                    getattr(optimizer, "optimizer", optimizer).found_inf = (~self.finite).float()
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
        self.lesson.keep_in_range(self.student.module)
        self.objective.clamp_scales()

    def clear_gradients(self) -> None:
        """Clear every gradient."""
        self.optimizer.zero_grad()
        self.objective.zero_grad()

    def state(self, with_frozen: bool = False) -> dict[str, Any]:
        """Return the state for a checkpoint that all processes have in common: what training changes.

        `with_frozen` adds the weights that it does not change.
        """
        named = self.student.module.named_parameters(remove_duplicate=False)
        left_out = set() if with_frozen else {name for name, p in named if not p.requires_grad}
        state = {
            "student": _without(self.student.module.state_dict(), left_out),
            "optimizer": self.optimizer.state_dict(),
            "objective": self.objective.state_dict(),
        }
        if self.own is not None:
            state["own"] = self.own.state_dict()
        if self.ema is not None:
            state["ema"] = self.ema.state(left_out)
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        own = self.student.module.state_dict()
        self.student.module.load_state_dict(
            {**own, **{name: as_stored(saved, own[name]) for name, saved in state["student"].items()}}
        )
        self.optimizer.load_state_dict(_in_shards(state["optimizer"], self.optimizer.param_groups))
        self.objective.load_state_dict(state["objective"])
        if self.own is not None:
            self.own.load_state_dict(state["own"])
        if self.ema is not None:
            self.ema.load_state(state["ema"])

    def finish(self) -> None:
        """Return the student to a plain model in evaluation mode, without hooks or parameters frozen for this stage."""
        self.close()
        if self.context.runtime.compile:
            torch.compiler.reset()  # what was compiled holds on to the models
        gather_shards(self.student.module)
        for parameter in self.held:
            parameter.requires_grad_(True)
        if self.context.runtime.grad_checkpointing:
            self.student.module.set_grad_checkpointing(False)
        if self.config.drop_path:
            set_drop_path(self.student.module, 0.0)
        self.student.module.eval()

    def _reduce_own_gradients(self) -> Tensor:
        """Average the gradients of the losses' own parameters over processes and clip them. Returns their norm."""
        learned = [p for p in self.objective.parameters() if p.grad is not None]
        if not learned:
            return torch.zeros((), device=self.fabric.device)
        if self.fabric.world_size > 1:
            for parameter in learned:
                parameter.grad = self.fabric.all_reduce(parameter.grad, reduce_op="mean")
        return nn.utils.clip_grad_norm_(learned, self.config.grad_clip_norm)


def _without(state: Mapping[str, Tensor], left_out: Container[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name not in left_out}


def _in_shards(state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return an optimizer's state with what it keeps of every parameter stored as that is."""
    parameters = [parameter for group in groups for parameter in group["params"]]

    def stored(number: int, kept: Any) -> Any:
        is_like = isinstance(kept, Tensor) and kept.numel() == parameters[number].numel() and kept.ndim
        return as_stored(kept, parameters[number]) if is_like else kept

    rows = {
        number: {name: stored(number, kept) for name, kept in row.items()} for number, row in state["state"].items()
    }
    return {**state, "state": rows}


def _chosen(finite: Tensor, new: dict[str, Tensor], old: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the rows of `new` if `finite`, else those of `old`. Waits for the device only while a queue still grows."""
    if all(name in old and old[name].shape == rows.shape for name, rows in new.items()):
        return {name: torch.where(finite, rows, old[name]) for name, rows in new.items()}
    return new if finite else old
