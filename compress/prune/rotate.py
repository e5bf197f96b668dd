"""Turn the q·k and v·out bases of every head to their principal directions; the model computes the same as before.

q and k only meet in a product, and so do v and out. Any invertible A turns them into Q A and K A^-T, or V A and out A^-T. A is
chosen so that both sides have the same, diagonal second moment, in descending order. Then the last dims of a head carry the
least, and cutting them is a truncated SVD of what the head does. Without it, what matters is spread over all dims.

Rotary positions turn q and k by pairs of dims in between, and a norm in front of the output projection reads single dims of the
heads' outputs; neither commutes with A, so these bases stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from clipress.compress.fabric import Reduce
from clipress.compress.prune.stream import hooks
from clipress.models.anatomy import Attn

FLOOR = 1e-7  # of the largest eigenvalue; a direction that no sample uses still gets an invertible turn


class _Moments:
    """Running second moments of one attention's queries, keys and head outputs: float64 [heads, dim, dim]."""

    def __init__(self, part: Attn) -> None:
        self.part = part
        self.attn = attn = part.module
        self.queries = self.keys = self.outputs = 0.0
        self.hooks = [
            attn.q.register_forward_hook(lambda _, __, q: self._add("queries", q)),
            attn.k.register_forward_hook(lambda _, __, k: self._add("keys", k)),
            attn.out.register_forward_pre_hook(lambda _, args: self._add("outputs", args[0])),
        ]

    def _add(self, name: str, rows: Tensor) -> None:  # rows [B, N, heads * dim]
        heads = rows.detach().unflatten(-1, (self.attn.heads, -1)).transpose(1, 2).double()  # [B, heads, N, dim]
        if name == "keys":  # what all keys of a sample share does not change a softmax
            heads = heads - heads.mean(2, keepdim=True)
        setattr(self, name, getattr(self, name) + torch.einsum("bhnd,bhne->hde", heads, heads))


@torch.no_grad()
def rotate(parts: Iterable[Attn], show: Callable[[], None], reduce: Reduce = lambda total: total) -> None:
    """Turn the bases of every head, in place. Frozen attentions, and those that no sample reaches, stay as they are.

    Args:
        parts: the attentions of a model.
        show: runs the calibration samples through it.
        reduce: sums a tensor over processes.
    """
    turned = {part.name: part for part in parts if part.module.heads and part.module.q.weight.requires_grad}
    moments = [_Moments(part) for part in turned.values()]
    with hooks(handle for own in moments for handle in own.hooks):
        show()
    for own in moments:
        if isinstance(own.queries, Tensor):
            _turn(own.part, *(reduce(total) for total in (own.queries, own.keys, own.outputs)))


def _turn(part: Attn, queries: Tensor, keys: Tensor, outputs: Tensor) -> None:
    attn = part.module
    if part.qk_unit == 1:
        _rotate_rows(attn.q, attn.k, *principal_bases(queries, keys))
    if part.norm is not None:
        return
    columns = attn.out.weight.double().unflatten(1, (attn.heads, attn.v_dim)).transpose(0, 1)  # [heads, width, v_dim]
    a, b = principal_bases(outputs, columns.transpose(1, 2) @ columns)
    _rotate_rows(attn.v, None, a, None)
    attn.out.weight.copy_((columns @ b).transpose(0, 1).flatten(1))


def principal_bases(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return A and B = A^-T, both [heads, d, d], such that A^T left A and B^T right B are equal and diagonal, descending.

    `left` and `right` [heads, d, d] are the second moments of the two sides of a product.
    """
    root, inverse = _roots(left)
    scale = right.diagonal(dim1=1, dim2=2).amax(1).clamp_min(1e-300)[:, None, None]
    values, vectors = torch.linalg.eigh(root @ (right / scale) @ root)
    values, vectors = values.flip(1), vectors.flip(2)
    fourth = values.clamp_min(FLOOR * values[:, :1].clamp_min(1e-300)).pow(0.25)[:, None, :]
    balance = scale.pow(0.25)
    return inverse @ vectors * fourth * balance, root @ vectors / fourth / balance


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return the symmetric square root and its inverse."""
    values, vectors = torch.linalg.eigh(moment)
    root = values.clamp_min(FLOOR * values[:, -1:].clamp_min(1e-300)).sqrt()[:, None, :]
    return vectors * root @ vectors.transpose(1, 2), vectors / root @ vectors.transpose(1, 2)


def _rotate_rows(first: nn.Linear, second: nn.Linear | None, a: Tensor, b: Tensor | None) -> None:
    """Apply A^T to the rows of one Linear, head by head, and B^T to those of its partner."""
    for linear, basis in ((first, a), (second, b)):
        if linear is None:
            continue
        heads, dim, _ = basis.shape
        turn = basis.transpose(1, 2)
        linear.weight.copy_((turn @ linear.weight.double().unflatten(0, (heads, dim))).flatten(0, 1))
        if linear.bias is not None:
            linear.bias.copy_((turn @ linear.bias.double().reshape(heads, dim, 1)).flatten())
