"""Device and process setup with Lightning Fabric, and the collectives that training uses."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from clipress.compress.settings import Runtime
from clipress.models import anatomy

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over processes."""


def uses_bf16(precision: str, device: str) -> bool:
    """Return whether `precision` means bf16 on a device: `auto` does on GPUs that support it."""
    return precision == "bf16" or (precision == "auto" and device == "cuda" and torch.cuda.is_bf16_supported())


def accelerator_of(runtime: Runtime) -> str:
    """Return the accelerator that a run would use on this machine: cpu or cuda."""
    if runtime.accelerator != "auto":
        return runtime.accelerator
    return "cuda" if torch.cuda.is_available() else "cpu"


def precision_of(runtime: Runtime) -> Any:
    """Return the precision of training in Fabric's words. FSDP2 has weights in bf16, all others only compute in it."""
    if not uses_bf16(runtime.precision, accelerator_of(runtime)):
        return "32-true"
    return "bf16-true" if runtime.strategy == "fsdp2" else "bf16-mixed"


def start_fabric(runtime: Runtime) -> Fabric:
    """Start Fabric on the available hardware: one CPU, one GPU, or the processes that torchrun started."""
    from lightning_fabric import Fabric

    local, world = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), int(os.environ.get("WORLD_SIZE", 1))
    accelerator = accelerator_of(runtime)
    strategy: Any = runtime.strategy if runtime.strategy != "auto" else ("ddp" if world > 1 else "auto")
    if strategy == "fsdp2":
        from lightning_fabric.strategies import ModelParallelStrategy

        strategy = ModelParallelStrategy(_shard, data_parallel_size=world, tensor_parallel_size=1)
    fabric = Fabric(
        accelerator=accelerator,
        devices=local,
        num_nodes=max(world // local, 1),
        strategy=strategy,
        precision=precision_of(runtime),
    )
    fabric.launch()
    return fabric


def _shard(module: nn.Module, mesh: Any) -> nn.Module:
    """Shard every block with FSDP2, then the remaining parameters."""
    from torch.distributed.fsdp import fully_shard

    mesh = mesh["data_parallel"]
    for owner, name in _scalars(module):  # FSDP2 rejects zero-dimensional parameters
        setattr(owner, name, nn.Parameter(getattr(owner, name).detach().reshape(1)))
        owner.scalars_given_a_dimension = {*getattr(owner, "scalars_given_a_dimension", ()), name}
    for block in anatomy.blocks(module.model):
        fully_shard(block.module, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def _scalars(module: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(m, name) for m in module.modules() for name, p in m.named_parameters(recurse=False) if p.ndim == 0]


def shut_down_distributed() -> None:
    """Destroy the process group: no collectives may follow. Without this call the processes may abort on exit.

    What DDP wrapped is garbage that holds the group, whose threads live as long. One that is busy when the interpreter ends
    may abort the process, and torchrun then stops the others.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        gc.collect()


def compile_in_place(module: nn.Module) -> None:
    """Compile what a call of a module runs, for every shape it is called with: texts have few lengths, batches one size."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    module.compile(dynamic=False)


def full_tensor(parameter: Tensor) -> Tensor:
    """Return a parameter unchanged, or gathered from its FSDP2 shards."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def on_one_process(state: Any, keeps: bool) -> Any:
    """Return nested containers with every shard gathered on the host, one tensor at a time, where `keeps`; all processes must call it."""

    def gather(leaf: Any) -> Any:
        if not hasattr(leaf, "full_tensor"):
            return leaf
        whole = leaf.detach().full_tensor()
        return whole.cpu() if keeps else None

    return tree_map(gather, state)


def as_stored(whole: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor in the shape of `like`, and in shards on its device if that is. All processes must call it."""
    from torch.distributed.tensor import distribute_tensor

    whole = whole.reshape(like.shape)  # a scalar, or the one row that FSDP2 makes of it
    if not hasattr(like, "full_tensor"):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)


@torch.no_grad()
def gather_shards(model: nn.Module) -> None:
    """Convert an FSDP2 model back into plain modules with full parameters, in place."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            # FSDP2's hooks would gather again and wait for processes that have already finished.
            module._forward_pre_hooks.clear()
            module._forward_hooks.clear()
            module.__class__ = type(module).__bases__[1]
        for name, parameter in list(module._parameters.items()):
            if hasattr(parameter, "full_tensor"):
                module._parameters[name] = nn.Parameter(full_tensor(parameter))
    for module in model.modules():
        for name in module.__dict__.pop("scalars_given_a_dimension", ()):
            setattr(module, name, nn.Parameter(getattr(module, name).detach().reshape(())))


def gathered(local: Tensor, fabric: Fabric) -> Tensor:
    """Gather the rows of all processes [N, ...]; gradients flow back to the process that owns a row."""
    if fabric.world_size == 1:
        return local
    return fabric.all_gather(local, sync_grads=local.requires_grad).flatten(0, 1)


def all_reduce(rows: Tensor, how: Literal["max", "sum"], fabric: Fabric) -> Tensor:
    """Return the maximum or the sum of a tensor over processes."""
    return rows if fabric.world_size == 1 else fabric.all_reduce(rows, reduce_op=how)


def all_sum(total: Tensor, fabric: Fabric) -> Tensor:
    """Sum a tensor over processes."""
    return total if fabric.world_size == 1 else fabric.all_reduce(total, reduce_op="sum")


def all_mean(values: Sequence[Tensor], fabric: Fabric) -> Tensor:
    """Average scalars over processes, float32 [values]; each process has the loss of its own rows."""
    stacked = torch.stack([value.detach().float() for value in values])
    return stacked if fabric.world_size == 1 else fabric.all_reduce(stacked, reduce_op="mean")


def all_finite(values: Sequence[Tensor], fabric: Fabric) -> Tensor:
    """Return whether scalars are finite on every process, a bool () that stays on the device."""
    finite = torch.stack([full_tensor(value.detach()).isfinite() for value in values]).all()
    if fabric.world_size == 1:
        return finite
    return fabric.all_reduce(finite.float(), reduce_op="sum") == fabric.world_size


class HostCopy:
    """A copy of a tensor on the host, made without waiting for the device."""

    def __init__(self, values: Tensor) -> None:
        self.copied = None
        if values.is_cuda:
            self.rows = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.rows.copy_(values, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()
        else:
            self.rows = values.detach()

    def read(self) -> np.ndarray:
        """Return the values, after waiting for the copy alone: the device goes on with what was queued later."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.rows.numpy()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the host without waiting for the device, which only pinned memory allows."""
    return (tensor.pin_memory() if device.type == "cuda" and not tensor.is_pinned() else tensor).to(
        device, non_blocking=True
    )


def all_true(value: bool, fabric: Fabric) -> bool:
    """Return whether `value` is true on every process, so that all make the same decision."""
    if fabric.world_size == 1:
        return value
    return bool(
        fabric.all_reduce(torch.tensor(float(value), device=fabric.device), reduce_op="sum") == fabric.world_size
    )


class Agreement:
    """The maximum of values over processes, which all of them act on in the same step.

    Several processes learn it a step later, so that no device waits for the host.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric
        self.under_way: HostCopy | None = None

    def on(self, *values: float, now: bool = False) -> list[float]:
        """Return the maximum of each value in the step before, or with `now` of these."""
        if self.fabric.world_size == 1:
            return list(values)
        before = self.under_way
        rows = to_device(torch.tensor([*map(float, values)]), self.fabric.device)
        self.under_way = HostCopy(self.fabric.all_reduce(rows, reduce_op="max"))
        past = [0.0] * len(values) if before is None else before.read().tolist()
        return [max(pair) for pair in zip(past, self.under_way.read().tolist(), strict=True)] if now else past
