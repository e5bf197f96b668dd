"""OpenAI's naming: shapes determine the architecture, heads are 64 wide, the activation is QuickGELU.

Other formats that keep these names use the functions of this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from clipress.data.tokens import check_spec, tokenizer_spec
from clipress.data.transforms import Preprocess
from clipress.errors import ArtifactError, ClipressError, RecipeError, first_line
from clipress.models import anatomy, surgery
from clipress.models.importers.base import IMPORTERS, Importer
from clipress.models.load import Model, build, refuse_absurd
from clipress.models.position_tables import fit_position_tables
from clipress.models.weightless import assign, build_weightless
from clipress.models.weights_file import NOTES, State
from clipress.recipe import checked

HEAD = 64
ROOTS = {
    *("visual", "transformer", "token_embedding", "positional_embedding"),
    *("ln_final", "text_projection", "logit_scale"),
}


@IMPORTERS.register("openai")
class OpenAI(Importer):
    """Detected by the numbers next to the weights; without them the file could equally be open_clip's."""

    priority = 40

    def recognises(self, state: State) -> bool:
        return not NOTES.isdisjoint(state) and "text_projection" in state

    def model_from_state(self, state: State, model_name: str | None) -> Model:
        """Build the model that the shapes describe; every name and shape has to fit."""
        refuse_name(model_name)
        weights = {name: tensor for name, tensor in state.items() if name not in NOTES}
        return model_from_weights(architecture_from_shapes(weights, quick_gelu=True), weights)


def refuse_name(model_name: str | None) -> None:
    """Raise RecipeError for a model name, where shapes determine the architecture."""
    if model_name is not None:
        raise RecipeError(
            f"expected no model name, found '{model_name}': the shapes determine the architecture. Leave it out."
        )


def root(name: str) -> str:
    """Return the first part of a tensor's name."""
    return name.partition(".")[0]


def shape(state: State, name: str, sides: int) -> tuple[int, ...]:
    """Return a tensor's shape. Raises ArtifactError when the tensor is missing or has another number of sides."""
    if name not in state:
        raise ArtifactError(f"tensor {name} is missing.")
    if state[name].ndim != sides:
        raise ArtifactError(f"tensor {name}: expected {sides} sides, found shape {list(state[name].shape)}.")
    return tuple(state[name].shape)


def architecture_from_shapes(state: State, quick_gelu: bool) -> dict[str, Any]:
    """Return the open_clip config of a CLIP with a plain ViT or OpenAI's ResNet, heads 64 wide."""
    context, width = shape(state, "positional_embedding", 2)
    text = {
        "context_length": context,
        "vocab_size": shape(state, "token_embedding.weight", 2)[0],
        "width": width,
        "heads": heads_of("positional_embedding", width),
        "layers": count_of(state, "transformer.resblocks."),
    }
    vision = (_resnet if "visual.layer1.0.conv1.weight" in state else _vit)(state)
    embed_dim = shape(state, "text_projection", 2)[1]
    return {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": text, "quick_gelu": quick_gelu}


def _vit(state: State) -> dict[str, Any]:
    width, _, _, patch = shape(state, "visual.conv1.weight", 4)
    heads_of("visual.conv1.weight", width)
    grid = grid_of(state, "visual.positional_embedding")
    layers = count_of(state, "visual.transformer.resblocks.")
    return {"image_size": grid * patch, "patch_size": patch, "width": width, "layers": layers, "head_width": HEAD}


def _resnet(state: State) -> dict[str, Any]:
    width = shape(state, "visual.layer1.0.conv1.weight", 4)[0]
    heads_of("visual.layer1.0.conv1.weight", 32 * width)  # of the pooling attention
    grid = grid_of(state, "visual.attnpool.positional_embedding")
    layers = [count_of(state, f"visual.layer{stage}.") for stage in (1, 2, 3, 4)]
    return {"image_size": 32 * grid, "width": width, "layers": layers, "head_width": HEAD}


def heads_of(name: str, width: int) -> int:
    """Return the number of heads of a width, which a tensor `name` has; they are 64 wide."""
    if width % HEAD:
        raise ArtifactError(
            f"tensor {name}: expected a width that is a multiple of {HEAD}, the head width; found {width}."
        )
    return width // HEAD


def grid_of(state: State, name: str, sides: int = 2) -> int:
    """Return the patches in a row, from the positions of a square of patches and one class token."""
    positions = shape(state, name, sides)[-2]
    side = math.isqrt(positions - 1)
    if side < 1 or side * side + 1 != positions:
        raise ArtifactError(f"tensor {name}: expected a square number of positions plus one, found {positions}.")
    return side


def head_dim_of(state: State, name: str, heads: int) -> int:
    """Return the dims of every head, from a weight with the rows of q, k and v, each head after head."""
    rows = shape(state, name, 2)[0]
    if rows % (3 * heads):
        raise ArtifactError(f"tensor {name}: expected rows of q, k and v for {heads} equal heads, found {rows} rows.")
    return rows // (3 * heads)


def count_of(state: State, prefix: str) -> int:
    """Return how many numbers, such as of layers, follow a prefix in tensor names."""
    return len({name[len(prefix) :].partition(".")[0] for name in state if name.startswith(prefix)})


def model_from_weights(
    architecture: dict[str, Any],
    weights: State,
    preprocess: Mapping[str, Any] | None = None,
    shapes: dict[str, dict[str, Any]] | None = None,
    resizes: bool = False,
) -> Model:
    """Put weights in stock naming into the model of an architecture, whose parts may be narrower (`shapes`).

    Every name and shape is compared before memory is taken; with `resizes`, position tables are fitted first. Raises
    ArtifactError naming the first tensor that is wrong.
    """

    def made() -> nn.Module:
        model = build(architecture)
        return surgery.reshape(model, shapes) if shapes else model

    refuse_absurd(architecture)
    model = module_from_weights(made, weights, resizes)
    tokenizer = tokenizer_spec(architecture)
    check_spec(tokenizer)
    height, width = anatomy.image_size(model)
    if height != width:
        raise ArtifactError(f"expected a model for square images, found {height} x {width} pixels.")
    known = checked(Preprocess, {"size": height, **(preprocess or {})}, "preprocess")
    return Model(model, architecture, known, tokenizer)


def module_from_weights(made: Callable[[], nn.Module], weights: State, resizes: bool = False) -> nn.Module:
    """Put weights in stock naming into the module that `made` returns, with our attention; as `model_from_weights` does."""
    try:
        with torch.device("meta"):
            empty = made()
            wanted = surgery.stock_weights(empty)
    except ClipressError:
        raise
    except Exception as error:  # a config can fail anywhere in a library
        reason = first_line(error)
        raise ArtifactError(f"open_clip cannot build its architecture: {reason}.") from None
    scalars = {name for name, tensor in wanted.items() if not tensor.ndim}  # older versions saved them as [1]
    weights = {
        name: tensor.reshape(()) if name in scalars and tensor.shape == (1,) else tensor
        for name, tensor in weights.items()
    }
    if resizes:
        fit_position_tables(weights, empty)
    _compare(wanted, weights)
    model = build_weightless(made)
    weights = {name: tensor.to(wanted[name].dtype).contiguous() for name, tensor in weights.items()}
    assign(model, surgery.own_weights(model, weights))
    return model.eval()


def _compare(wanted: State, weights: State) -> None:
    for name, tensor in wanted.items():
        if name not in weights:
            raise ArtifactError(f"tensor {name} is missing; its architecture needs it.")
        found = weights[name]
        if found.shape != tensor.shape or found.is_floating_point() != tensor.is_floating_point():
            raise ArtifactError(
                f"tensor {name}: expected {tensor.dtype} {list(tensor.shape)} by its architecture, found {found.dtype} "
                f"{list(found.shape)}."
            )
        if not all(map(math.isfinite, found.aminmax())):  # takes no memory, as a sum in double precision does
            raise ArtifactError(f"tensor {name} has values that are not finite: its training diverged.")
    if unknown := sorted(weights.keys() - wanted.keys()):
        raise ArtifactError(f"{len(unknown)} tensors have no place in its architecture: {', '.join(unknown[:5])}.")
