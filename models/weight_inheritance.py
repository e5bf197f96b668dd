"""A smaller student that inherits the teacher's weights: TinyCLIP's manual inheritance (Wu et al. 2023), with a criterion.

TinyCLIP takes the first channels and heads of each tensor. Here the student gets those with the largest weights:

- layers: student layer i of n is the teacher's floor(i * N / n): evenly spaced, the first one always included;
- heads: largest ||V|| * ||O|| of each layer, the Frobenius norms of the head's rows of v and its columns of out;
- ffn: largest product of the norms of a unit's row of the first and its column of the second Linear;
- width: one set of channels for the whole tower, with the largest sum over all matrices of the remaining layers,
  embeddings and projections. Each matrix adds the norms of its slices along the residual axis, times the gain of the
  norm it is read through, divided by their mean, so that every matrix counts alike.

Heads keep their width and softmax scale.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from clipress.errors import ArtifactError, RecipeError
from clipress.models import anatomy, residual, surgery
from clipress.models.anatomy import Attn, Block, Ffn, Part
from clipress.models.load import Model, build
from clipress.recipe import Section


class Size(Section):
    """The sizes of one student tower; a missing key keeps the teacher's size."""

    layers: int | None = Field(None, ge=1)
    heads: int | None = Field(None, ge=1)
    """Per layer, as wide as the teacher's."""
    width: int | None = Field(None, ge=1)
    """Residual channels."""
    ffn: int | None = Field(None, ge=1)
    """Hidden units of each feed-forward."""


def inherited(teacher: Model, sizes: Mapping[str, Size]) -> Model:
    """Return a student with the given sizes of the teacher's towers, and everything else unchanged.

    It is an ordinary open_clip architecture wherever every layer's heads fill the width; otherwise its parts have recorded
    shapes, as after pruning. Raises RecipeError for sizes that the teacher does not have.
    """
    model = teacher.copy()
    module, architecture = model.module, copy.deepcopy(model.architecture)
    for tower, size in sizes.items():
        _check(module, tower, size)
        for block in _take_layers(module, tower, size.layers):
            for part in block.parts:
                _take_units(part, size)
    weights = module.state_dict()
    for tower, size in sizes.items():
        if residual.transformer(module, tower) is not None:
            architecture[anatomy.CONFIG_KEYS[tower]].update(_config(module, tower, size.width))
        if size.width is not None:
            axes = residual.residual_axes(module, tower)
            kept = _largest(_channel_scores(weights, axes), size.width)
            weights |= {name: weights[name].index_select(axis, kept) for name, (axis, _) in axes.items()}
    student = surgery.reshape(build(architecture), surgery.shapes(module))
    student.load_state_dict(weights)
    return Model(student.eval(), architecture, model.preprocess, model.tokenizer)


def _check(model: nn.Module, tower: str, size: Size) -> None:
    where, found = f"student.inherit.{tower}", _blocks(model, tower)
    if not found:
        raise RecipeError(f"{where}: the teacher's {tower} tower has no transformer blocks to inherit from.")
    if (size.layers or size.width) and residual.transformer(model, tower) is None:
        raise RecipeError(f"{where}: timm's name fixes layers and width of this tower. Set only heads and ffn.")
    inside = [part for block in found for part in block.parts]
    has = {
        "layers": len(found),
        "heads": min(part.module.heads for part in inside if isinstance(part, Attn)),
        "width": found[0].width,
        "ffn": min(part.hidden for part in inside if isinstance(part, Ffn)),
    }
    for key, wanted in size.model_dump(exclude_none=True).items():
        if wanted > has[key]:
            raise RecipeError(f"{where}.{key}: expected at most the teacher's {has[key]}, found {wanted}.")
    if size.width is not None:
        try:
            projected = "proj" if tower == "image" else "text_projection"
            axes = residual.residual_axes(model, tower)
        except ArtifactError as error:
            raise RecipeError(f"{where}.width: {error} Leave out 'width'.") from None
        if not any(projected in name.split(".") for name in axes):
            raise RecipeError(f"{where}.width: without a projection the width is the embedding's. Leave out 'width'.")


def _blocks(model: nn.Module, tower: str) -> list[Block]:
    return [block for block in anatomy.blocks(model) if block.tower == tower and block.attends]


def _take_layers(model: nn.Module, tower: str, count: int | None) -> list[Block]:
    if count is not None:
        holder = residual.transformer(model, tower)
        layers = list(holder.resblocks)
        holder.resblocks = nn.ModuleList(layers[i * len(layers) // count] for i in range(count))
    return _blocks(model, tower)


def _take_units(part: Part, size: Size) -> None:
    if isinstance(part, Attn):
        surgery.cut(part, surgery.AttnMask(heads=_mask_of_largest(_head_scores(part), size.heads)))
    else:
        scores = _norms(torch.cat([linear.weight for linear in part.linears_in], 1), 0) * _norms(
            part.linear_out.weight, 1
        )
        surgery.cut(part, surgery.FfnMask(_mask_of_largest(scores, size.ffn)))


def _mask_of_largest(scores: Tensor, count: int | None) -> Tensor:
    kept = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    kept[_largest(scores, len(scores) if count is None else count)] = True
    return kept


def _head_scores(part: Attn) -> Tensor:
    attn = part.module
    heads = (attn.heads, attn.v_dim)
    return _norms(attn.v.weight.unflatten(0, heads), 0) * _norms(attn.out.weight.unflatten(1, heads), 1)


def _channel_scores(weights: Mapping[str, Tensor], axes: Mapping[str, tuple[int, str | None]]) -> Tensor:
    total: Tensor | float = 0.0
    for name, (axis, gain) in axes.items():
        if weights[name].ndim < 2:  # Norms, biases and the class embedding.
            continue
        norms = _norms(weights[name], axis)
        if gain is not None:
            norms = norms * weights[gain].double().abs()
        total = total + norms / norms.mean().clamp_min(1e-30)
    return total


def _norms(tensor: Tensor, axis: int) -> Tensor:
    """Return the norm of every slice along an axis, in double precision."""
    return tensor.detach().double().movedim(axis, 0).flatten(1).norm(dim=1)


def _largest(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` largest in ascending order; among equal scores the first wins."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _config(model: nn.Module, tower: str, width: int | None) -> dict[str, Any]:
    """Return open_clip's settings of a tower; whatever they cannot express is in its recorded shapes."""
    first, *_ = found = _blocks(model, tower)
    attn, ffn = first.parts
    width, hidden = width or first.width, ffn.hidden
    ratio = hidden / width
    ratio = ratio if int(width * ratio) == hidden else (hidden + 0.5) / width  # open_clip rounds down.
    head = math.gcd(width, attn.module.qk_dim)
    heads = {"head_width": head} if tower == "image" else {"heads": width // head}
    return {"layers": len(found), "width": width, "mlp_ratio": ratio, **heads}
