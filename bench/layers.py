"""Exact costs of each block: parameters and multiply-accumulates, from its actual shapes.

The rows of a tower are its transformer blocks, or the children of a convolutional trunk, and a last row for everything
else (patches, embeddings, projection). They add up to the model, except for `logit_scale`, which belongs to no tower.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from clipress.models import anatomy, convnets
from clipress.models.flops import counting_flops
from clipress.models.load import Model
from clipress.tasks import graphs_of, task_named

ELSE = "all else"


def layer_costs(model: Model) -> list[dict[str, Any]]:
    """Return `{tower, name, params, macs}` per layer; macs are those of one sample.

    torch's own counter counts attention's products. INT8 and 2:4 compute the same products and count as dense.
    """
    rows = []
    for tower in anatomy.towers(model.module):
        layers = _layers(model.module, tower)
        counted = _macs(model, tower, layers)
        params = {name: sum(p.numel() for p in module.parameters()) for name, module in layers.items()}
        params[ELSE] = sum(p.numel() for p in anatomy.tower_parameters(model.module, tower)) - sum(params.values())
        rows += [{"tower": tower, "name": name, "params": params[name], "macs": counted[name]} for name in params]
    return rows


def _layers(model: nn.Module, tower: str) -> dict[str, nn.Module]:
    found = {block.name: block.module for block in anatomy.blocks(model) if block.tower == tower}
    if found or tower != convnets.TOWER:
        return found
    # a convolutional trunk: its children, or the members of those that are sequences
    prefix, trunk = ("visual.trunk", model.visual.trunk) if hasattr(model.visual, "trunk") else ("visual", model.visual)
    for name, child in trunk.named_children():
        members = dict(child.named_children()) if isinstance(child, nn.Sequential) else {}
        inside = {f"{prefix}.{name}.{member}": module for member, module in members.items()}
        found |= inside or {f"{prefix}.{name}": child}
    return found


def _macs(model: Model, tower: str, layers: dict[str, nn.Module]) -> dict[str, int]:
    counted = dict.fromkeys([*layers, ELSE], 0)
    entered: dict[str, int] = {}
    with counting_flops(model.module) as counter:

        def enter(name: str) -> None:
            entered[name] = counter.get_total_flops()

        def leave(name: str) -> None:
            counted[name] += (counter.get_total_flops() - entered[name]) // 2

        hooks = []
        for name, module in layers.items():
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: enter(name)))
            hooks.append(module.register_forward_hook(lambda *_, name=name: leave(name)))
        try:
            _run_one_sample(model, tower)
        finally:
            for hook in hooks:
                hook.remove()
    counted[ELSE] = counter.get_total_flops() // 2 - sum(counted.values())
    return counted


def _run_one_sample(model: Model, tower: str) -> None:
    """Run one sample through every graph of a tower."""
    task, graphs = task_named(model.task), graphs_of(model)
    for name in task.graphs_of_tower(tower):
        example = graphs[name].example(1)
        inputs = {key: torch.zeros_like(torch.from_numpy(rows)) for key, rows in example.items()}  # id 0 always exists
        task.call(model.module, name, inputs)
