"""One training step on tensors with shapes and no values: what it would keep in memory, counted before anything runs.

The step itself is the real one, of `learner.py`. torch's FakeTensorMode computes shapes and types of every tensor in it and
allocates nothing, so a large model is counted within seconds on any machine. What the host reads of values is answered: a step
is finite, and no scale of a quantizer is below zero.
"""

from __future__ import annotations

import copy
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clipress.compress.context import Context
from clipress.compress.fabric import precision_of
from clipress.compress.hook import Hook
from clipress.compress.learner import Learner
from clipress.compress.losses import Loss
from clipress.compress.prune.gates import Gates, Kind
from clipress.compress.settings import Runtime, Training
from clipress.compress.train import holds_of
from clipress.models import anatomy
from clipress.models.load import Model

aten = torch.ops.aten
SCORE_BYTES = 12  # of a unit in a search's checkpoint: its mask in float32 and its sum in float64


@dataclass(frozen=True)
class StepNeeds:
    """What a step needs: bytes on one device, but for `trained` and `checkpoint`."""

    weights: int
    """The student's parameters and buffers, what the losses learn, and masks that hold zeros."""
    teachers: int
    """Teachers that run; those with a cache do not."""
    ema: int
    """The EMA model and its queue."""
    optimizer: int
    gradients: int
    batch: int
    activations: int
    """What autograd keeps for the backward pass, at most at one time."""
    peak: int
    """The most that is in use at one time, temporary tensors included: usually at the end of the forward pass, when there
    are no gradients yet. A GPU's allocator and libraries take more."""
    checkpoint: int
    """Bytes of a checkpoint on disk."""
    trained: int
    """Parameters that the optimizer updates, those of the losses included."""


class PlannedFabric(Fabric):
    """As many processes as a run will have, of which only this one exists; nothing is moved anywhere."""

    def __init__(self, runtime: Runtime, processes: int) -> None:
        super().__init__(accelerator="cpu", devices=1, precision=precision_of(runtime))
        self.processes = processes

    @property
    def world_size(self) -> int:
        return self.processes

    def all_gather(self, data: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        return data[None].repeat(self.processes, *[1] * data.ndim)

    def all_reduce(self, data: Tensor, group: Any = None, reduce_op: Any = None) -> Tensor:
        return data.clone()


@contextmanager
def shapes_only() -> Iterator[None]:
    """Within, new tensors have shapes and no needs. Modules of such tensors change their type in `to`, and never move."""
    to = nn.Module.to

    def change_type(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        _, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        for owner in module.modules():
            for name, one in owner._parameters.items():
                if one is not None and dtype is not None and one.is_floating_point() and one.dtype != dtype:
                    owner._parameters[name] = nn.Parameter(one.detach().to(dtype), one.requires_grad)
        return module

    def copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        memo[id(tensor)] = _like(tensor, torch.empty_like(tensor))
        return memo[id(tensor)]

    nn.Module.to = change_type
    FakeTensor.numpy = lambda tensor: np.ones(tensor.shape, np.float32)  # embeddings of class names
    # torch's own copy takes the whole mode along, and frees what that refers to twice.
    FakeTensor.__deepcopy__ = copied
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        nn.Module.to = to
        del FakeTensor.numpy, FakeTensor.__deepcopy__


def shapes_of(model: Model) -> Model:
    """Return a copy of a model on the meta device whose tensors have shapes only; call it within `shapes_only`."""
    return _filled(model, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))


def random_values_of(model: Model) -> Model:
    """Return a copy of a model on the meta device with small random weights, none of them negative, as scales must be."""
    return _filled(model, lambda tensor: torch.rand(tensor.shape).mul_(0.02).to(tensor.dtype))


def _filled(model: Model, fill: Callable[[Tensor], Tensor]) -> Model:
    module = model.module
    held = [value for inner in module.modules() for value in vars(inner).values() if isinstance(value, Tensor)]

    # deepcopy takes the copy of a tensor from its memo.
    memo = {id(tensor): _like(tensor, fill(tensor)) for tensor in dict.fromkeys((*_held(module), *held))}
    return replace(model, module=copy.deepcopy(module, memo))


def _like(tensor: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


class Ledger:
    """Bytes of storages that exist at a time, and the most there ever were."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        """Storages of `tensors` are not counted."""
        self.known = {tensor.untyped_storage()._cdata for tensor in tensors}
        self.now = self.peak = 0

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage from now on until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


class _Made(TorchDispatchMode):
    """Enter every tensor that is made into a ledger."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return not hasattr(args[0], "is_below")
        made = function(*args, **(kwargs or {}))
        if function is aten.lt.Scalar:
            made.is_below = True
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.ledger.add(tensor)
        return made


@dataclass(frozen=True)
class Rehearsal:
    """A stage ready to take a step: its models have shapes, or random values, and its batch is of one process."""

    student: Model
    config: Training
    terms: Mapping[str, Loss.Settings]
    context: Context
    arrays: Mapping[str, Tensor]
    gates: tuple[str, Mapping[str, Sequence[Kind]]] | None = None
    """Space and kinds of the gates of a search, see `prune/gates.py`."""

    def start(self) -> tuple[Learner, Gates | None]:
        """Build what takes the steps."""
        gates = Gates(self.student.module, *self.gates) if self.gates is not None else None
        return Learner(self.student, self.config, self.terms, self.context), gates


def step_needs(stage: Rehearsal) -> StepNeeds:
    """Count what a step of a stage keeps. Call it within `shapes_only`, with models of shapes and a `PlannedFabric`."""
    student, arrays = stage.student, stage.arrays
    with _Made(Ledger(())):
        learner, gates = stage.start()
        hooks = holds_of(student)
        _take_step(learner, arrays)  # the second step has an optimizer state and a queue, as all that follow
    own = [*_held(learner.encoder), *_held(learner.objective), *_masks(hooks)]
    teachers = [tensor for one in learner.teachers.modules for tensor in _held(one)]
    ema = [] if learner.ema is None else [*_held(learner.ema.encoder), *learner.ema.past.values()]
    optimizers = [one for one in (learner.optimizer, learner.own) if one is not None]
    states = [t for one in optimizers for state in one.state_dict()["state"].values() for t in state.values()]
    base = {"weights": own, "teachers": teachers, "ema": ema, "optimizer": states, "batch": list(arrays.values())}
    made, saved = (Ledger(tensor for part in base.values() for tensor in part) for _ in range(2))
    gradients = _take_step(learner, arrays, made, saved)
    sizes = {name: bytes_of(part) for name, part in base.items()}
    scores = 0 if gates is None else sum(SCORE_BYTES * site.mask.numel() for site in gates.sites)
    needs = StepNeeds(
        **sizes,
        gradients=gradients,
        activations=saved.peak,
        peak=sum(sizes.values()) + made.peak,
        checkpoint=bytes_of(tensors_in(learner.state(with_frozen=gates is not None))) + scores,
        trained=sum(p.numel() for one in optimizers for group in one.param_groups for p in group["params"]),
    )
    return _distributed(needs, stage.context, student.module)


@dataclass(frozen=True)
class StepTime:
    """A step that was taken on this machine."""

    seconds: float
    peak_bytes: int
    """The most that torch's allocator held for tensors on a GPU; 0 on a CPU."""


def timed_step(stage: Rehearsal) -> StepTime:
    """Take three steps with random values on the device of the stage's fabric; time the last one."""
    fabric, (learner, gates) = stage.context.fabric, stage.start()
    on_gpu = fabric.device.type == "cuda"
    arrays = {name: rows.to(fabric.device) for name, rows in stage.arrays.items()}
    for _ in range(3):
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        learner.gradients(1, dict(arrays), ())
        learner.update(0.0)
        learner.clear_gradients()
        if gates is not None:
            gates.clear()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    return StepTime(round(seconds, 4), torch.cuda.max_memory_allocated() if on_gpu else 0)


def _take_step(
    learner: Learner, arrays: Mapping[str, Tensor], made: Ledger | None = None, saved: Ledger | None = None
) -> int:
    """Take a step; return the bytes of the gradients."""
    made, saved = made or Ledger(()), saved or Ledger(())

    def pack(tensor: Tensor) -> Tensor:
        saved.add(tensor)
        return tensor.detach()  # a node that keeps its own output would otherwise never be freed

    with _Made(made):
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            learner.gradients(1, dict(arrays), ())
        gradients = [p.grad for module in (learner.module, learner.objective) for p in module.parameters()]
        size = bytes_of(gradient for gradient in gradients if gradient is not None)
        learner.update(0.0)
        learner.clear_gradients()
    return size


def _distributed(needs: StepNeeds, context: Context, module: nn.Module) -> StepNeeds:
    """Return what one of several processes keeps: DDP copies gradients into buckets, FSDP2 shards and gathers by block."""
    processes = context.fabric.world_size
    if processes == 1:
        return needs
    if context.runtime.strategy != "fsdp2":
        return replace(needs, gradients=2 * needs.gradients, peak=needs.peak + needs.gradients)
    names = ("weights", "gradients", "optimizer")
    shards = {name: -(-getattr(needs, name) // processes) for name in names}
    saved = sum(getattr(needs, name) - size for name, size in shards.items())
    largest = max((bytes_of(block.module.parameters()) for block in anatomy.blocks(module)), default=0)
    gathered = 2 * largest  # the next block is gathered while one computes
    return replace(needs, **shards, peak=needs.peak - saved + gathered)


def _held(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _masks(hooks: Sequence[Hook]) -> list[Tensor]:
    return [held for hook in hooks for _, held in hook.held]


def tensors_in(state: Any) -> list[Tensor]:
    """Return every tensor in nested containers."""
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages of tensors, each counted once."""
    storages = {s._cdata: s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())
