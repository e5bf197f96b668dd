"""Cut units out of parts, record a model's shapes and restore them. Pure: no scores, no budgets here."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clipress.errors import ArtifactError
from clipress.models import convnets, token_table
from clipress.models.anatomy import TEXT_MODULES, Attn, Ffn, Part, attentions, is_eva_attention, parts, stock_attentions
from clipress.models.attention import Attention, TimmAttention
from clipress.models.eva_attention import EvaAttention
from clipress.models.hf_config import own_name, stock_name
from clipress.models.hf_text import encoder_kind
from clipress.models.partial_norm import resized_norm, slice_norm

MAX_SIZE = 1 << 20


@dataclass(frozen=True)
class AttnMask:
    """What to keep of one attention; None keeps all.

    Every head keeps as many dims as the others, though not necessarily the same ones.
    """

    qk: Tensor | None = None
    """Bool [heads, qk_dim]."""
    v: Tensor | None = None
    """Bool [heads, v_dim]."""
    heads: Tensor | None = None
    """Bool [heads]."""


@dataclass(frozen=True)
class FfnMask:
    """What to keep of one feed-forward: bool [hidden]."""

    ffn: Tensor


Mask = AttnMask | FfnMask


def use_own_attention(model: nn.Module) -> nn.Module:
    """Replace PyTorch's or timm's attention with ours in every block, in place; outputs do not change."""
    for block, stock in list(stock_attentions(model)):
        if is_eva_attention(stock):
            own = EvaAttention.from_stock(stock, block.rotary)
        else:
            own = (Attention if isinstance(stock, nn.MultiheadAttention) else TimmAttention).from_stock(stock)
        block.module.attn = own.train(stock.training)
    for part in attentions(model):
        if not isinstance(part.module, Attention):
            kind = type(part.module).__name__
            raise ArtifactError(f"{part.name}: expected plain attention, found {kind}, which clipress cannot cut.")
    return model


def cut(part: Part, mask: Mask) -> None:
    """Cut one part in place; its outputs equal those of the masked part, because the softmax scale is kept.

    All heads or all hidden units may be cut; the output bias remains.
    """
    if isinstance(part, Attn):
        _cut_attention(part, mask)
    else:
        _cut_ffn(part, mask)


def rescale(part: Part) -> None:
    """Set the softmax scale of an attention to that of its present width, which changes what a cut one computes."""
    if isinstance(part, Attn) and part.module.qk_dim:
        part.module.scale = part.module.qk_dim**-0.5


def lose_biases(part: Part, generator: torch.Generator) -> None:
    """Give q, k and v of an attention the random biases of new Linears, in place: uniform up to 1 / sqrt(inputs)."""
    if not isinstance(part, Attn):
        return
    for linear in (part.module.q, part.module.k, part.module.v):
        if linear.bias is not None and linear.bias.numel():
            random = torch.rand(linear.bias.shape, generator=generator) * 2 - 1
            with torch.no_grad():
                linear.bias.copy_(random * linear.in_features**-0.5)


def _cut_attention(part: Attn, mask: AttnMask) -> None:
    attn = part.module
    heads = _mask_or_all(mask.heads, attn, attn.heads)
    qk, v = _mask_or_all(mask.qk, attn, attn.heads, attn.qk_dim), _mask_or_all(mask.v, attn, attn.heads, attn.v_dim)
    qk_dim, v_dim = _dims_per_head(qk[heads], part, "qk"), _dims_per_head(v[heads], part, "v")
    if not qk_dim or not v_dim:
        heads = torch.zeros_like(heads)
    qk, v = qk & heads[:, None], v & heads[:, None]
    if isinstance(attn, EvaAttention):
        attn.cut_inside(qk, v)
    qk, v = qk.flatten(), v.flatten()
    attn.q, attn.k, attn.v = slice_linear(attn.q, qk), slice_linear(attn.k, qk), slice_linear(attn.v, v)
    attn.out = slice_linear(attn.out, columns=v)
    attn.heads = int(heads.sum())
    attn.qk_dim, attn.v_dim = (qk_dim, v_dim) if attn.heads else (0, 0)


def _mask_or_all(mask: Tensor | None, attn: Attention, *shape: int) -> Tensor:
    device = attn.q.weight.device
    return torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask.to(device)


def _dims_per_head(mask: Tensor, part: Attn, kind: str) -> int:
    dims = mask.sum(1)
    if len(dims) and not bool((dims == dims[0]).all()):
        raise ValueError(f"{part.name}: heads keep different numbers of {kind} dims: {dims.tolist()}")
    return int(dims[0]) if len(dims) else 0


def _cut_ffn(part: Ffn, mask: FfnMask) -> None:
    for name in part.names.ins:
        setattr(part.parent, name, slice_linear(getattr(part.parent, name), mask.ffn))
    setattr(part.parent, part.names.out, slice_linear(part.linear_out, columns=mask.ffn))
    if part.norm is not None:
        setattr(part.parent, part.names.norm, slice_norm(part.norm, mask.ffn))


def slice_linear(linear: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> nn.Linear:
    """Return a Linear with only the chosen output rows and input columns (bool masks); biases are cut too."""
    weight, bias = linear.weight.detach(), linear.bias
    if rows is not None:
        weight, bias = weight[rows], bias if bias is None else bias[rows]
    if columns is not None:
        weight = weight[:, columns]
    new = _empty_linear(linear, weight.shape[1], weight.shape[0])
    with torch.no_grad():
        new.weight.copy_(weight)
        if bias is not None:
            new.bias.copy_(bias)
    return new


def _empty_linear(like: nn.Linear, columns: int, rows: int) -> nn.Linear:
    """Return a Linear of another size, uninitialised, that is otherwise like this one."""
    where = {"device": like.weight.device, "dtype": like.weight.dtype}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # A part without units has Linears without elements.
        new = nn.utils.skip_init(nn.Linear, columns, rows, bias=like.bias is not None, **where)
    return new.train(like.training)


def shapes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the shapes that the architecture no longer determines once parts, or channels, have been cut.

    A block's parts share one record under the block's name, `{heads, qk_dim, v_dim, scale, ffn}`; a second part of the
    same kind has a record under its own name. So does a token embedding of two factors, `{rank}`.
    """
    found: dict[str, dict[str, Any]] = convnets.conv_shapes(model) if convnets.is_convnet(model) else {}
    found |= token_table.table_shape(model)
    for part in parts(model):
        shared = found.setdefault(part.block, {})
        if shared.keys() & part.shape.keys():
            found[part.name] = part.shape
        else:
            shared |= part.shape
    return found


def shape_after(part: Part, mask: Mask) -> dict[str, Any]:
    """Return the shape that a part would have after `cut`. Its weights may be on the meta device; the mask may not."""
    if not isinstance(part, Attn):
        return {"ffn": int(mask.ffn.sum())}
    attn = part.module
    heads = torch.ones(attn.heads, dtype=torch.bool) if mask.heads is None else mask.heads
    qk_dim = attn.qk_dim if mask.qk is None else _dims_per_head(mask.qk[heads], part, "qk")
    v_dim = attn.v_dim if mask.v is None else _dims_per_head(mask.v[heads], part, "v")
    if not (qk_dim and v_dim and heads.any()):
        return part.shape | {"heads": 0, "qk_dim": 0, "v_dim": 0}
    return part.shape | {"heads": int(heads.sum()), "qk_dim": qk_dim, "v_dim": v_dim}


def reshape(model: nn.Module, wanted: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Give every part, or convolution, its recorded shape, in place; the weights must be loaded afterwards.

    A part's record is found under its own name, or under its block's. Raises ArtifactError for shapes that are missing or
    impossible.
    """
    if convnets.is_convnet(model):
        convnets.reshape_convs(model, wanted)
    if record := wanted.get(token_table.path_of(model)):
        token_table.reshape_table(model, record)
    for part in parts(model):
        shape = _recorded_shape(part, wanted)
        if isinstance(part, Attn):
            _resize_attention(part, shape)
        else:
            _resize_ffn(part, shape["ffn"])
    return model


def _recorded_shape(part: Part, wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    record = wanted.get(part.name, wanted.get(part.block))
    types = {key: float if key == "scale" else int for key in part.shape}
    try:
        shape = {key: convert(record[key]) for key, convert in types.items()}
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ArtifactError(
            f"The artifact's shapes do not describe {part.name}: expected {', '.join(types)}, found {record}."
        ) from None
    sizes = [size for key, size in shape.items() if key != "scale"]
    halved = isinstance(part, Attn) and shape["qk_dim"] % part.qk_unit
    if min(sizes) < 0 or max(sizes) > MAX_SIZE or not math.isfinite(shape.get("scale", 0.0)) or halved:
        raise ArtifactError(f"The artifact's shapes for {part.name} make no sense: {shape}.")
    return shape


def _resize_attention(part: Attn, shape: dict[str, Any]) -> None:
    attn = part.module
    attn.heads, attn.qk_dim, attn.v_dim, attn.scale = (shape[key] for key in ("heads", "qk_dim", "v_dim", "scale"))
    qk, v = attn.heads * attn.qk_dim, attn.heads * attn.v_dim
    attn.q, attn.out = _empty_linear(attn.q, part.width, qk), _empty_linear(attn.out, v, part.width)
    attn.k, attn.v = _empty_linear(attn.k, part.memory_width, qk), _empty_linear(attn.v, part.memory_width, v)
    if isinstance(attn, EvaAttention):
        attn.resize_inside()


def _resize_ffn(part: Ffn, hidden: int) -> None:
    for name in part.names.ins:
        setattr(part.parent, name, _empty_linear(getattr(part.parent, name), part.width, hidden))
    setattr(part.parent, part.names.out, _empty_linear(part.linear_out, hidden, part.width))
    if part.norm is not None:
        setattr(part.parent, part.names.norm, resized_norm(part.norm, hidden))


def copy_tower(model: nn.Module, donor: nn.Module, tower: str) -> nn.Module:
    """Copy a whole tower from another CLIP, in place. Both must have the same config for that tower."""
    if tower == "image":
        model.visual = copy.deepcopy(donor.visual)
    elif hasattr(donor, "text"):
        model.text = copy.deepcopy(donor.text)
    else:
        for name in TEXT_MODULES:
            setattr(model, name, copy.deepcopy(getattr(donor, name)))
    return model


def stock_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return an uncut model's weights under the names of plain open_clip, timm or transformers; the inverse of `own_weights`."""
    weights = dict(model.state_dict())
    for part in attentions(model):
        _replace(weights, f"{part.name}.", part.module.stock_state)
    if kind := encoder_kind(model):
        _replace(weights, "text.", lambda own: {stock_name(kind, name): tensor for name, tensor in own.items()})
    return weights


def own_weights(model: nn.Module, stock: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a model from weights under the names of plain open_clip, timm or transformers."""
    weights = dict(stock)
    if kind := encoder_kind(model):
        _replace(weights, "text.", lambda theirs: {own_name(kind, name): tensor for name, tensor in theirs.items()})
    for part in attentions(model):
        _replace(weights, f"{part.name}.", part.module.own_state)
    return weights


def _replace(
    weights: dict[str, Tensor], prefix: str, change: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
) -> None:
    """Put what `change` makes of the weights under a prefix in their place."""
    part = {name.removeprefix(prefix): weights.pop(name) for name in list(weights) if name.startswith(prefix)}
    weights |= {prefix + name: tensor for name, tensor in change(part).items()}
