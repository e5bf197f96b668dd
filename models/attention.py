"""Attention with separate q, k, v and out Linears, narrow dims and the original softmax scale.

Pruning, 2:4, INT8, ONNX and TensorRT all work on plain Linears; none of them works on `nn.MultiheadAttention`. The scale
stays when dims are cut, so a pruned model computes what the masked one computed. UPop divides by the new width instead,
which is a known defect.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Memory = Tensor | tuple[Tensor, Tensor]
"""What is attended to: tokens [B, M, memory_width], or what `k` and `v` made of them, [B, M, heads * qk] and [B, M, heads * v]."""
HIDDEN = -1e4  # added to the logits of padding, whose weight is then exactly 0; small enough that float16 holds it


class Attention(nn.Module):
    """Drop-in for `nn.MultiheadAttention(batch_first=True)` as open_clip's blocks call it.

    Args:
        width: residual width, which queries come from and outputs go to.
        heads: number of heads.
        qk_dim: query and key dims per head.
        v_dim: value dims per head.
        scale: factor on the logits, `original head dim ** -0.5`.
        bias, out_bias: whether q, k and v, and out, have one.
        memory_width: width that keys and values come from; default: `width`, as in self-attention.
    """

    # Names of the joint q, k and v weights and of the output projection in the stock module, for `stock_state` and `own_state`.
    STOCK_NAMES: ClassVar[dict[str, str]] = {"weight": "in_proj_weight", "bias": "in_proj_bias", "out": "out_proj"}

    def __init__(
        self,
        width: int,
        heads: int,
        qk_dim: int,
        v_dim: int,
        scale: float,
        bias: bool = True,
        out_bias: bool = True,
        memory_width: int | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.qk_dim, self.v_dim, self.scale = heads, qk_dim, v_dim, scale
        memory_width = memory_width or width
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Without heads there is nothing to initialise.
            self.q = nn.Linear(width, heads * qk_dim, bias=bias)
            self.k = nn.Linear(memory_width, heads * qk_dim, bias=bias)
            self.v = nn.Linear(memory_width, heads * v_dim, bias=bias)
            self.out = nn.Linear(heads * v_dim, width, bias=out_bias)
        self.dropout = 0.0  # of the attention's weights, in training

    @classmethod
    def from_stock(cls, stock: nn.Module) -> Attention:
        """Copy the weights of a stock attention, PyTorch's or timm's; both compute the same."""
        if isinstance(stock, nn.MultiheadAttention):
            heads, weight, bias, out = stock.num_heads, stock.in_proj_weight, stock.in_proj_bias, stock.out_proj
        else:
            heads, weight, bias, out = stock.num_heads, stock.qkv.weight, stock.qkv.bias, stock.proj
        width = weight.shape[1]
        dim = width // heads
        own = cls(width, heads, dim, dim, dim**-0.5, bias=bias is not None, out_bias=out.bias is not None)
        state = {f"{part}.weight": rows for part, rows in zip("qkv", weight.chunk(3), strict=True)}
        state |= {f"out.{name}": tensor for name, tensor in out.state_dict().items()}
        if bias is not None:
            state |= {f"{part}.bias": rows for part, rows in zip("qkv", bias.chunk(3), strict=True)}
        own.load_state_dict(state)
        return own.to(weight)

    def stock_state(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a state dict of this module under the names, and in the form, of the stock module; the inverse of `own_state`."""
        names, stock = self.STOCK_NAMES, {}
        for kind in ("weight", "bias"):
            if f"q.{kind}" in own:
                stock[names[kind]] = torch.cat([own[f"{part}.{kind}"] for part in "qkv"])
            if f"out.{kind}" in own:
                stock[f"{names['out']}.{kind}"] = own[f"out.{kind}"]
        return stock

    def own_state(self, stock: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a state dict of this module from the stock module's."""
        names, own, qk = self.STOCK_NAMES, {}, self.heads * self.qk_dim
        for kind in ("weight", "bias"):
            if names[kind] in stock:
                parts = stock[names[kind]].split([qk, qk, self.heads * self.v_dim])
                own |= {f"{part}.{kind}": rows for part, rows in zip("qkv", parts, strict=True)}
            if (out := f"{names['out']}.{kind}") in stock:
                own[f"out.{kind}"] = stock[out]
        return own

    def forward(self, x: Tensor, *_: Tensor, attn_mask: Tensor | None = None, **__: object) -> tuple[Tensor, None]:
        """Attend from x [B, N, width] to itself. Returns ([B, N, width], None), as the stock module does.

        open_clip passes the same tensor again as keys and values; these arguments are ignored.
        """
        return self.attend(x, attn_mask), None

    def attend(self, x: Tensor, attn_mask: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        """Attend from x [B, N, width] to a memory, or to itself: [B, N, width]."""
        if self.heads == 0:  # Every head was cut: only the output bias remains.
            y = torch.zeros_like(x)
            return y if self.out.bias is None else y + self.out.bias
        return self.out(self.mixed(*self.projected(x, x if memory is None else memory), attn_mask))

    def projected(self, x: Tensor, memory: Memory) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [B, H, N, qk], keys [B, H, M, qk] and values [B, H, M, v]."""
        keys, values = memory if isinstance(memory, tuple) else (self.k(memory), self.v(memory))
        q = _reshape(self.q(x), self.heads, self.qk_dim).transpose(1, 2)  # [B, H, N, qk]
        k = _reshape(keys, self.heads, self.qk_dim).transpose(1, 2)  # [B, H, M, qk]
        v = _reshape(values, self.heads, self.v_dim).transpose(1, 2)  # [B, H, M, v]
        return q, k, v

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
        """Return the heads' outputs side by side: [B, N, heads * v]."""
        if attn_mask is not None and attn_mask.ndim == 3:  # [B * H, N, M], as open_clip masks padding
            attn_mask = attn_mask.reshape(-1, self.heads, *attn_mask.shape[1:])
        if torch.onnx.is_in_onnx_export():  # The same in three nodes, which every runtime fuses.
            logits = (q * self.scale) @ k.transpose(2, 3)
            y = (logits if attn_mask is None else logits + attn_mask).softmax(-1) @ v
        else:
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout, scale=self.scale)
        return _reshape(y.transpose(1, 2), self.heads * self.v_dim)


class _Reshape(torch.autograd.Function):
    """`_reshape` as one node of an ONNX file, where 0 keeps the batch and -1 is what remains, the tokens."""

    @staticmethod
    def symbolic(g: Any, x: Any, *sides: int) -> Any:
        return g.op("Reshape", x, g.op("Constant", value_t=torch.tensor([0, -1, *sides])))

    @staticmethod
    def forward(_: Any, x: Tensor, *sides: int) -> Tensor:
        return x.reshape(*x.shape[:2], *sides)


def _reshape(x: Tensor, *sides: int) -> Tensor:
    """Reshape all of [B, N, ...] but its first two sides: [B, N, *sides]."""
    return _Reshape.apply(x, *sides) if torch.jit.is_tracing() else x.reshape(*x.shape[:2], *sides)


class TimmAttention(Attention):
    """Drop-in for timm's plain `Attention`, which returns a tensor."""

    STOCK_NAMES: ClassVar[dict[str, str]] = {"weight": "qkv.weight", "bias": "qkv.bias", "out": "proj"}

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend from x [B, N, width] to itself: [B, N, width]. Vision towers have no causal mask."""
        return self.attend(x, attn_mask)


class SeparateAttention(Attention):
    """Attention whose stock module has separate Linears too."""

    def stock_state(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(own)

    def own_state(self, stock: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(stock)
