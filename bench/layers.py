"""What each block of a model costs: parameters and multiply-accumulates, exactly, from the shapes it really has.

The rows of a tower are its transformer blocks, or the parts of a convolutional trunk, and one last row for all else
(patches, embeddings, projection). They add up to the model; only `logit_scale` belongs to no tower.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clipress.models import anatomy
from clipress.models.load import Model

ELSE = "all else"


def layer_costs(model: Model) -> list[dict[str, Any]]:
    """Return `{tower, name, params, macs}` per layer; macs are those of one image or one text.

    Attention's products are counted with torch's own counter; INT8 and 2:4 do the same products and count as dense.
    """
    rows = []
    for tower in anatomy.TOWERS:
        parts = dict(_parts(model.module, tower))
        counted = _macs(model, tower, parts)
        params = {name: sum(p.numel() for p in module.parameters()) for name, module in parts.items()}
        params[ELSE] = sum(p.numel() for p in anatomy.tower_parameters(model.module, tower)) - sum(params.values())
        rows += [{"tower": tower, "name": name, "params": params[name], "macs": counted[name]} for name in params]
    return rows


def _parts(model: nn.Module, tower: str) -> Iterator[tuple[str, nn.Module]]:
    found = [(block.name, block.module) for block in anatomy.blocks(model) if block.tower == tower]
    if not found and tower == "image":  # a convolutional trunk: its children, sequences of them taken apart
        prefix, trunk = (
            ("visual.trunk", model.visual.trunk) if hasattr(model.visual, "trunk") else ("visual", model.visual)
        )
        for name, child in trunk.named_children():
            inner = child.named_children() if isinstance(child, nn.Sequential) else ()
            found += [(f"{prefix}.{name}.{n}", part) for n, part in inner] or [(f"{prefix}.{name}", child)]
    yield from found


def _macs(model: Model, tower: str, parts: dict[str, nn.Module]) -> dict[str, int]:
    counted = dict.fromkeys([*parts, ELSE], 0)
    entered: dict[str, int] = {}
    # plain products: not every release of the counter knows the fused kernels
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:

        def enter(name: str) -> None:
            entered[name] = counter.get_total_flops()

        def leave(name: str) -> None:
            counted[name] += (counter.get_total_flops() - entered[name]) // 2

        hooks = []
        for name, module in parts.items():
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: enter(name)))
            hooks.append(module.register_forward_hook(lambda *_, name=name: leave(name)))
        try:
            if tower == "image":
                model.module.encode_image(torch.zeros(1, 3, *anatomy.image_size(model.module)))
            else:
                model.module.encode_text(torch.ones(1, anatomy.context_length(model.module), dtype=torch.int64))
        finally:
            for hook in hooks:
                hook.remove()
    counted[ELSE] = counter.get_total_flops() // 2 - sum(counted.values())
    return counted
