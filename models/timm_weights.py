"""Weights of a timm checkpoint file for the image tower of a student."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import Tensor, nn

from clipress.errors import ArtifactError, first_line
from clipress.models import surgery
from clipress.models.weights_file import weights_from_file

TRUNK = "visual.trunk."


def load_timm_weights(model: nn.Module, path: Path) -> None:
    """Load a timm checkpoint into the trunk of a CLIP's image tower, in place. Nothing in the file is run.

    The classifier is left out, and position tables are resized where timm does it. Raises ArtifactError for a file of
    another model.
    """
    trunk = model.visual.trunk
    try:
        state = _converted(weights_from_file(path).state, trunk)
    except ArtifactError as error:
        raise ArtifactError(f"Checkpoint {path}: {error}") from None
    heads = _classifiers(trunk)
    stock = {name.removeprefix(TRUNK): t for name, t in surgery.stock_weights(model).items() if name.startswith(TRUNK)}
    given = {name: tensor for name, tensor in state.items() if not name.startswith(heads)}
    wanted = {name: tensor for name, tensor in stock.items() if not name.startswith(heads)}
    for name, tensor in wanted.items():
        found = "none" if name not in given else list(given[name].shape)
        if name not in given or given[name].shape != tensor.shape:
            raise ArtifactError(
                f"Checkpoint {path}: expected {name} {list(tensor.shape)} by its timm model, found {found}."
            )
    if unknown := sorted(given.keys() - wanted.keys()):
        raise ArtifactError(
            f"Checkpoint {path}: {len(unknown)} tensors have no place in its timm model: {', '.join(unknown[:5])}."
        )
    own = surgery.own_weights(model, {f"{TRUNK}{name}": tensor for name, tensor in given.items()})
    missing = trunk.load_state_dict({name.removeprefix(TRUNK): t for name, t in own.items()}, strict=False).missing_keys
    if lacking := [name for name in missing if not name.startswith(heads)]:
        raise ArtifactError(f"Checkpoint {path}: clipress cannot read the {lacking[0]} of this timm model from a file.")


def _converted(state: dict[str, Tensor], trunk: nn.Module) -> dict[str, Tensor]:
    """Apply the conversion of older layouts and other image sizes that timm keeps beside some of its models."""
    convert = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state
    try:
        return convert(dict(state), trunk)
    except Exception as error:  # It expects a checkpoint of its own model, and another can fail anywhere in it.
        raise ArtifactError(f"timm cannot convert it for its model: {first_line(error)}") from None


def _classifiers(trunk: nn.Module) -> tuple[str, ...]:
    names = trunk.pretrained_cfg.get("classifier") or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
