"""Position tables of a checkpoint for another image size or context length."""

from __future__ import annotations

import logging
import math

from torch import Tensor, nn

MAX_POSITIONS = 1 << 26  # numbers in a position table that a file may be resized to
log = logging.getLogger("clipress.models")


def fit_position_tables(state: dict[str, Tensor], model: nn.Module) -> None:
    """Interpolate the position tables in a state dict to a model's image size and context length, in place, as open_clip does.

    A table of another width stays as it is: it belongs to another model. The model may be on the meta device.
    """
    from open_clip.model import resize_pos_embed, resize_text_pos_embed

    own = model.state_dict()
    for name, resize in (
        ("visual.positional_embedding", resize_pos_embed),
        ("positional_embedding", resize_text_pos_embed),
        ("text.positional_embedding", resize_text_pos_embed),
    ):
        found, wanted = state.get(name), own.get(name)
        if found is not None and wanted is not None and found.shape != wanted.shape and _resizable(name, found, wanted):
            state[name] = found.float()
            resize(state, model)
            log.info("%s: resized from %d positions to %d.", name, len(found), len(wanted))


def _resizable(name: str, found: Tensor, wanted: Tensor) -> bool:
    if found.ndim != 2 or wanted.ndim != 2 or found.shape[1] != wanted.shape[1] or not found.is_floating_point():
        return False
    is_image = name.startswith("visual.")
    grid = len(found) - 1  # beside the class token
    square = not is_image or (grid > 0 and math.isqrt(grid) ** 2 == grid)
    has_room = len(wanted) > is_image  # an image smaller than a patch has none
    return square and has_room and wanted.numel() <= MAX_POSITIONS
