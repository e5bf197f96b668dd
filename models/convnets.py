"""Convolutional image towers: their layers, the sizes of the layers, and restoring the sizes of a cut tower.

Only convolutions and batch norms ever change. The features that an attention pool, a projection or a classifier reads keep
their width, so no other layer has a size to record.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from clipress.errors import ArtifactError
from clipress.models.anatomy import blocks

TOWER = "image"  # The only tower that may be convolutional.


def is_convnet(model: nn.Module) -> bool:
    """Return whether the image tower is convolutional and has no blocks that clipress supports: its channels are cut."""
    return is_convolutional(model) and not any(block.tower == TOWER for block in blocks(model))


def is_convolutional(model: nn.Module) -> bool:
    """Return whether the image tower convolves and has no blocks with attention that clipress supports."""
    attends = any(block.tower == TOWER and block.attends for block in blocks(model))
    return not attends and any(isinstance(module, nn.Conv2d) for module in model.visual.modules())


def layers(model: nn.Module) -> dict[str, nn.Conv2d | nn.BatchNorm2d]:
    """Return the image tower's convolutions and norms by module path."""
    return {
        f"visual.{name}": module
        for name, module in model.visual.named_modules()
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d)
    }


def is_depthwise(conv: nn.Conv2d) -> bool:
    """Return whether every channel has its own filter."""
    return 1 < conv.groups == conv.in_channels == conv.out_channels


def conv_shapes(model: nn.Module) -> dict[str, dict[str, int]]:
    """Return the sizes that the architecture no longer determines once channels have been cut."""
    return {name: _sizes(layer) for name, layer in layers(model).items()}


def reshape_convs(model: nn.Module, wanted: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Give every layer of the image tower its recorded sizes, in place; the weights must be loaded afterwards.

    Raises ArtifactError for sizes that are missing, or that cutting this tower cannot produce.
    """
    found = layers(model)
    unknown = [name for name in wanted if name.startswith("visual.") and name not in found]
    if unknown:
        raise ArtifactError(f"The artifact's shapes name layer {unknown[0]}, which its architecture does not have.")
    for name, layer in found.items():
        now = _sizes(layer)
        try:
            sizes = {key: int(wanted[name][key]) for key in now}
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ArtifactError(f"The artifact's shapes do not describe layer {name}: {error!r}.") from None
        if any(not 1 <= sizes[key] <= now[key] for key in now) or not _divides(layer, sizes):
            raise ArtifactError(f"The artifact's shapes for {name} make no sense: {wanted[name]}; uncut it has {now}.")
        if sizes != now:
            _resize(layer, sizes)
    return model


def _sizes(layer: nn.Conv2d | nn.BatchNorm2d) -> dict[str, int]:
    if isinstance(layer, nn.Conv2d):
        return {"out": layer.out_channels, "in": layer.in_channels, "groups": layer.groups}
    return {"features": layer.num_features}


def _divides(layer: nn.Conv2d | nn.BatchNorm2d, sizes: dict[str, int]) -> bool:
    if isinstance(layer, nn.BatchNorm2d):
        return True
    if is_depthwise(layer):  # It has as many groups as channels.
        return sizes["groups"] == sizes["out"] == sizes["in"]
    return sizes["groups"] == layer.groups and sizes["out"] % layer.groups == sizes["in"] % layer.groups == 0


def _resize(layer: nn.Conv2d | nn.BatchNorm2d, sizes: dict[str, int]) -> None:
    if isinstance(layer, nn.Conv2d):
        layer.out_channels, layer.in_channels, layer.groups = sizes["out"], sizes["in"], sizes["groups"]
        shapes = {"weight": (sizes["out"], sizes["in"] // sizes["groups"], *layer.kernel_size), "bias": (sizes["out"],)}
    else:
        layer.num_features = sizes["features"]
        shapes = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (sizes["features"],))
    for name, shape in shapes.items():
        old = getattr(layer, name)
        if old is not None:
            new = old.new_empty(shape)
            setattr(layer, name, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
