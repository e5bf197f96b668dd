"""Where training runs: one process or many, through Lightning Fabric; and the few collectives the losses need."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clipress.compress.settings import Runtime
from clipress.models import anatomy

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def uses_bf16(precision: str, device: str) -> bool:
    """Tell what a `precision` means on a device: auto is bf16 on a GPU that has it."""
    return precision == "bf16" or (precision == "auto" and device == "cuda" and torch.cuda.is_bf16_supported())


def start_fabric(runtime: Runtime) -> Fabric:
    """Start Fabric on what is there: one CPU, one GPU, or the processes torchrun started."""
    from lightning_fabric import Fabric

    local, world = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), int(os.environ.get("WORLD_SIZE", 1))
    accelerator = runtime.accelerator
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    bf16 = uses_bf16(runtime.precision, accelerator)
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


def _shard(module: nn.Module, mesh: Any) -> nn.Module:
    """FSDP2: shard every block, then what is left."""
    from torch.distributed.fsdp import fully_shard

    mesh = mesh["data_parallel"]
    for owner, name in _scalars(module):  # FSDP2 refuses parameters without dimensions
        setattr(owner, name, nn.Parameter(getattr(owner, name).detach().reshape(1)))
        owner.scalars_given_a_dimension = {*getattr(owner, "scalars_given_a_dimension", ()), name}
    for block in anatomy.blocks(module.model):
        fully_shard(block.module, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def _scalars(module: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(m, name) for m in module.modules() for name, p in m.named_parameters(recurse=False) if p.ndim == 0]


def shut_down_distributed() -> None:
    """Let the processes go their ways: nothing is gathered from here on. Without it, leaving may abort."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def full_tensor(parameter: Tensor) -> Tensor:
    """Return a parameter as it is, or gathered from FSDP2's shards."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


@torch.no_grad()
def gather_shards(model: nn.Module) -> None:
    """Turn FSDP2's shards back into plain parameters of plain modules, in place."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            # its hooks would gather again, and wait for processes that are done
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
    """Stack all processes' rows [N, ...]; gradients flow back to the process a row came from."""
    if fabric.world_size == 1:
        return local
    return fabric.all_gather(local, sync_grads=local.requires_grad).flatten(0, 1)


def all_mean(values: Sequence[Tensor], fabric: Fabric) -> list[float]:
    """Average scalars over processes: each has the loss of its own rows."""
    stacked = torch.stack([value.detach() for value in values])
    return (stacked if fabric.world_size == 1 else fabric.all_reduce(stacked, reduce_op="mean")).tolist()


def all_true(value: bool, fabric: Fabric) -> bool:
    """Tell whether something holds on every process; all must decide alike."""
    if fabric.world_size == 1:
        return value
    return bool(
        fabric.all_reduce(torch.tensor(float(value), device=fabric.device), reduce_op="sum") == fabric.world_size
    )


def all_max(value: float, fabric: Fabric) -> float:
    """Return the largest of all processes' values."""
    if fabric.world_size == 1:
        return value
    return fabric.all_reduce(torch.tensor(float(value), device=fabric.device), reduce_op="max").item()
