"""Cut units out of blocks, read a model's shapes and rebuild them. Pure: no scores, no budgets here."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clipress.errors import ArtifactError
from clipress.models import convnets
from clipress.models.anatomy import TEXT_PARTS, Block, blocks, stock_attentions
from clipress.models.attention import Attention, TimmAttention


@dataclass(frozen=True)
class Keep:
    """What stays of one block. Every head keeps as many dims as the others, though not the same ones.

    qk: bool [heads, qk_dim]; v: bool [heads, v_dim]; ffn: bool [ffn width]; heads: bool [heads], absent: all.
    """

    qk: Tensor
    v: Tensor
    ffn: Tensor
    heads: Tensor | None = None


def use_own_attention(model: nn.Module) -> nn.Module:
    """Replace PyTorch's attention by ours in every block, in place; outputs stay the same."""
    for module, stock in list(stock_attentions(model)):
        own = Attention if isinstance(stock, nn.MultiheadAttention) else TimmAttention
        module.attn = own.from_stock(stock).train(stock.training)
    for block in blocks(model):
        if not isinstance(block.attn, Attention):
            kind = type(block.attn).__name__
            raise ArtifactError(f"{block.name} has attention of type {kind}, which clipress cannot take apart.")
    return model


def narrowed(linear: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> nn.Linear:
    """Return a Linear with only the chosen output rows and input columns (bool masks); biases are cut too."""
    weight, bias = linear.weight.detach(), linear.bias
    if rows is not None:
        weight, bias = weight[rows], bias if bias is None else bias[rows]
    if columns is not None:
        weight = weight[:, columns]
    where = {"device": weight.device, "dtype": weight.dtype}
    new = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None, **where)
    with torch.no_grad():
        new.weight.copy_(weight)
        if bias is not None:
            new.bias.copy_(bias)
    return new.train(linear.training)


def _per_head(mask: Tensor, block: Block, kind: str) -> int:
    dims = mask.sum(1)
    if len(dims) and not bool((dims == dims[0]).all()):
        raise ValueError(f"{block.name}: heads keep different numbers of {kind} dims: {dims.tolist()}")
    return int(dims[0]) if len(dims) else 0


def cut(block: Block, keep: Keep) -> None:
    """Cut one block in place. The softmax scale is left as it was, so the result equals the masked block.

    All heads or all hidden units may go: what stays is the output bias.
    """
    attn = block.attn
    heads = torch.ones(attn.heads, dtype=torch.bool) if keep.heads is None else keep.heads.cpu()
    qk_dim, v_dim = _per_head(keep.qk[heads], block, "q·k"), _per_head(keep.v[heads], block, "v·out")
    if not qk_dim or not v_dim:
        heads = torch.zeros_like(heads)
    alive = heads[:, None].to(keep.qk.device)
    qk, v = (keep.qk & alive).flatten(), (keep.v & alive).flatten()
    attn.q, attn.k, attn.v = narrowed(attn.q, qk), narrowed(attn.k, qk), narrowed(attn.v, v)
    attn.out = narrowed(attn.out, columns=v)
    attn.heads = int(heads.sum())
    attn.qk_dim, attn.v_dim = (qk_dim, v_dim) if attn.heads else (0, 0)
    ffn_in, ffn_out = narrowed(block.ffn_in, keep.ffn), narrowed(block.ffn_out, columns=keep.ffn)
    for name, linear in zip(block.ffn_names, (ffn_in, ffn_out), strict=True):
        setattr(block.module.mlp, name, linear)


def shapes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return what cannot be told from the architecture any more once blocks, or channels, have been cut."""
    convolutions = convnets.conv_shapes(model) if convnets.is_convnet(model) else {}
    return convolutions | {
        block.name: {
            "heads": block.attn.heads,
            "qk_dim": block.attn.qk_dim,
            "v_dim": block.attn.v_dim,
            "scale": block.attn.scale,
            "ffn": block.ffn_in.out_features,
        }
        for block in blocks(model)
    }


def reshape(model: nn.Module, wanted: dict[str, dict[str, Any]]) -> nn.Module:
    """Give every block, or convolution, the shapes an artefact tells, in place; the weights are still to be loaded."""
    if convnets.is_convnet(model):
        convnets.reshape_convs(model, wanted)
    for block in blocks(model):
        try:
            shape = wanted[block.name]
            sizes = [int(shape[key]) for key in ("heads", "qk_dim", "v_dim", "ffn")]
            scale = float(shape["scale"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ArtifactError(f"The artefact's shapes do not describe block {block.name}: {error!r}.") from None
        if min(sizes) < 0 or max(sizes) > 1 << 20 or not math.isfinite(scale):
            raise ArtifactError(f"The artefact's shapes for {block.name} make no sense: {shape}.")
        heads, qk_dim, v_dim, ffn = sizes
        old = block.attn
        biases = {"bias": old.q.bias is not None, "out_bias": old.out.bias is not None}
        block.module.attn = type(old)(block.width, heads, qk_dim, v_dim, scale, **biases)
        for linear, name, sizes in zip(
            (block.ffn_in, block.ffn_out), block.ffn_names, ((block.width, ffn), (ffn, block.width)), strict=True
        ):
            setattr(block.module.mlp, name, nn.utils.skip_init(nn.Linear, *sizes, bias=linear.bias is not None))
    return model


def adopt(model: nn.Module, donor: nn.Module, tower: str) -> nn.Module:
    """Give a model a copy of another's whole tower, in place. Both are built from one config as to that tower."""
    if tower == "image":
        model.visual = copy.deepcopy(donor.visual)
    elif hasattr(donor, "text"):
        model.text = copy.deepcopy(donor.text)
    else:
        for part in TEXT_PARTS:
            setattr(model, part, copy.deepcopy(getattr(donor, part)))
    return model


def stock_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return an uncut model's weights under the names that plain open_clip gives them."""
    weights = dict(model.state_dict())
    for block in blocks(model):
        at, names = f"{block.name}.attn.", block.attn.STOCK_NAMES
        for kind in ("weight", "bias"):
            parts = [weights.pop(f"{at}{part}.{kind}", None) for part in ("q", "k", "v")]
            if parts[0] is not None:
                weights[at + names[kind]] = torch.cat(parts)
            out = weights.pop(f"{at}out.{kind}", None)
            if out is not None:
                weights[f"{at}{names['out']}.{kind}"] = out
    return weights
