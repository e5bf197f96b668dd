"""Attention of timm's Eva blocks (EVA-01, EVA-02, PE): rotary positions, and a norm in front of the output projection.

A rotary position turns the dims of a head two by two, each pair at its own speed, so pairs are what can be cut of q and k. Every
head keeps its own pairs; which ones is saved with the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clipress.models.attention import TimmAttention
from clipress.models.partial_norm import is_known_norm, resized_norm, slice_norm


class EvaAttention(TimmAttention):
    """Drop-in for timm's `EvaAttention` and `AttentionRope`.

    Args:
        width, heads, dim: residual width, number of heads and their width.
        biases: which of q, k and v have one.
        separate: whether the stock module has a Linear each for q, k and v.
        prefix: tokens at the start, such as the class token, that have no rotary position.
        rotary: whether the blocks pass rotary positions.
        norm: what the heads' joint output goes through before the output projection.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        dim: int,
        *,
        biases: tuple[bool, bool, bool],
        separate: bool,
        prefix: int,
        rotary: bool,
        norm: nn.Module,
    ) -> None:
        super().__init__(width, heads, dim, dim, dim**-0.5)
        for linear, bias in zip((self.q, self.k, self.v), biases, strict=True):
            if not bias:
                linear.bias = None
        self.separate, self.prefix, self.norm = separate, prefix, norm
        self.qk_unit = 2 if rotary else 1
        self.stock_dim = dim
        if rotary:
            self.register_buffer("pairs", torch.arange(dim // 2).repeat(heads, 1))

    @classmethod
    def from_stock(cls, stock: nn.Module, rotary: bool = True) -> EvaAttention:
        """Copy the weights of a stock attention."""
        separate = stock.qkv is None
        if separate:
            biases = tuple(linear.bias is not None for linear in (stock.q_proj, stock.k_proj, stock.v_proj))
        elif getattr(stock, "q_bias", None) is not None:
            biases = True, False, True
        else:
            biases = (stock.qkv.bias is not None,) * 3
        own = cls(
            (stock.q_proj if separate else stock.qkv).in_features,
            stock.num_heads,
            stock.head_dim,
            biases=biases,
            separate=separate,
            prefix=stock.num_prefix_tokens,
            rotary=rotary,
            norm=stock.norm,
        ).to(stock.proj.weight)
        own.load_state_dict(own.own_state(stock.state_dict()))
        return own

    def _names(self) -> dict[str, str]:
        """Return our names of this module's tensors -> the stock module's, where it has them as they are."""
        names = {"out.weight": "proj.weight", "out.bias": "proj.bias"}
        if self.separate:
            names |= {f"{part}.{kind}": f"{part}_proj.{kind}" for part in "qkv" for kind in ("weight", "bias")}
        elif self.k.bias is None:
            names |= {"q.bias": "q_bias", "v.bias": "v_bias"}
        return names

    def stock_state(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a state dict of this module under the names, and in the form, of the stock module; the inverse of `own_state`."""
        names, left = self._names(), {name: tensor for name, tensor in own.items() if name != "pairs"}
        stock = {names[name]: left.pop(name) for name in list(left) if name in names}
        for kind in ("weight", "bias"):
            if f"q.{kind}" in left:
                stock[f"qkv.{kind}"] = torch.cat([left.pop(f"{part}.{kind}") for part in "qkv"])
        return stock | left

    def own_state(self, stock: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a state dict of this module from the stock module's."""
        names, left = {stock: own for own, stock in self._names().items()}, dict(stock)
        own = {names[name]: left.pop(name) for name in list(left) if name in names}
        for kind in ("weight", "bias"):
            if f"qkv.{kind}" in left:
                own |= {
                    f"{part}.{kind}": rows for part, rows in zip("qkv", left.pop(f"qkv.{kind}").chunk(3), strict=True)
                }
        return own | left | ({"pairs": self.pairs} if hasattr(self, "pairs") else {})

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attend from x [B, N, width] to itself: [B, N, width].

        `rope` holds sines and cosines of the positions after the prefix: [N - prefix, 2 * dims of an uncut head].
        """
        if self.heads == 0:  # Every head was cut: only the output bias remains.
            return torch.zeros_like(x) + self.out.bias
        q, k, v = self.projected(x, x)
        if rope is not None:
            sines, cosines = self._turns(rope.to(x.dtype))
            q, k = (self._turned(rows, sines, cosines) for rows in (q, k))
        return self.out(self.norm(self.mixed(q, k, v, attn_mask)))

    def _turns(self, rope: Tensor) -> Tensor:
        """Return the sines and cosines of this attention's pairs: [2, heads or 1, N - prefix, qk_dim / 2]."""
        tables = rope.unflatten(-1, (2, self.stock_dim)).movedim(-2, 0)[..., ::2]  # [2, N, pairs of an uncut head]
        if self.qk_dim == self.stock_dim:  # All heads have all pairs.
            return tables[:, None]
        return tables.index_select(-1, self.pairs.flatten()).unflatten(-1, self.pairs.shape).transpose(1, 2)

    def _turned(self, rows: Tensor, sines: Tensor, cosines: Tensor) -> Tensor:
        """Turn queries or keys [B, heads, N, qk_dim] by their positions."""
        prefix, first, second = (
            rows[:, :, : self.prefix],
            rows[:, :, self.prefix :, ::2],
            rows[:, :, self.prefix :, 1::2],
        )
        turned = first * cosines - second * sines, second * cosines + first * sines
        return torch.cat([prefix, torch.stack(turned, -1).flatten(-2)], 2)

    def cut_inside(self, qk: Tensor, v: Tensor) -> None:
        """Cut what lies between the projections, before the module's own sizes change: bool [heads, qk_dim], [heads, v_dim].

        Raises ValueError if half a pair is to be kept.
        """
        if hasattr(self, "pairs"):
            first, second = qk[:, ::2], qk[:, 1::2]
            if not torch.equal(first, second):
                raise ValueError("rotary positions: expected pairs of query and key dims, found one without the other")
            heads = int(first.any(1).sum())
            self.pairs = self.pairs[first].reshape(heads, -1) if heads else self.pairs.new_zeros(0, 0)
        if is_known_norm(self.norm):
            self.norm = slice_norm(self.norm, v.flatten())

    def resize_inside(self) -> None:
        """Give what lies between the projections the size that the module's sizes imply; the weights must be loaded afterwards."""
        if hasattr(self, "pairs"):
            self.pairs = self.pairs.new_zeros(self.heads, self.qk_dim // 2)
        if is_known_norm(self.norm):
            self.norm = resized_norm(self.norm, self.heads * self.v_dim)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state, prefix, *args)
        pairs, errors = state.get(prefix + "pairs"), args[-1]
        if pairs is not None and pairs.numel() and pairs.device.type != "meta":
            if pairs.is_floating_point() or not 0 <= int(pairs.min()) <= int(pairs.max()) < self.stock_dim // 2:
                errors.append(f"{prefix}pairs: expected pairs of dims from 0 to {self.stock_dim // 2 - 1}.")
