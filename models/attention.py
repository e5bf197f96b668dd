"""Self-attention with separate q, k, v and out Linears, narrow dims and the original softmax scale.

Plain Linears are what pruning, 2:4, INT8, ONNX and TensorRT all understand; `nn.MultiheadAttention` is understood by
none of them. The scale is kept when dims are cut, so a pruned model computes what the masked one computed; dividing by
the new width instead is UPop's known defect.
"""

from __future__ import annotations

import warnings
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Drop-in for `nn.MultiheadAttention(batch_first=True)` as open_clip's blocks call it.

    Args:
        width: residual width.
        heads: number of heads.
        qk_dim: query and key dims per head.
        v_dim: value dims per head.
        scale: factor on the logits, `original head dim ** -0.5`.
        bias, out_bias: whether q, k and v, and out, have one.
    """

    # what the stock module calls the weights that q, k and v stand in, and the output projection
    STOCK_NAMES: ClassVar[dict[str, str]] = {"weight": "in_proj_weight", "bias": "in_proj_bias", "out": "out_proj"}

    def __init__(
        self, width: int, heads: int, qk_dim: int, v_dim: int, scale: float, bias: bool = True, out_bias: bool = True
    ) -> None:
        super().__init__()
        self.heads, self.qk_dim, self.v_dim, self.scale = heads, qk_dim, v_dim, scale
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # without heads there is nothing to initialise
            self.q = nn.Linear(width, heads * qk_dim, bias=bias)
            self.k = nn.Linear(width, heads * qk_dim, bias=bias)
            self.v = nn.Linear(width, heads * v_dim, bias=bias)
            self.out = nn.Linear(heads * v_dim, width, bias=out_bias)

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

    def forward(self, x: Tensor, *_: Tensor, attn_mask: Tensor | None = None, **__: object) -> tuple[Tensor, None]:
        """Attend from x [B, N, width] to itself. Returns ([B, N, width], None), as the stock module does.

        Keys and values that open_clip passes again are the same tensor and are ignored.
        """
        return self.attend(x, attn_mask), None

    def attend(self, x: Tensor, attn_mask: Tensor | None) -> Tensor:
        """Attend from x [B, N, width] to itself: [B, N, width]."""
        if self.heads == 0:  # every head was cut: what is left is the bias
            return torch.zeros_like(x) if self.out.bias is None else self.out.bias.expand_as(x)
        tokens = int(x.shape[1])  # an int keeps the exported graph free of shape arithmetic
        q = self.q(x).reshape(-1, tokens, self.heads, self.qk_dim).transpose(1, 2)  # [B, H, N, qk]
        k = self.k(x).reshape(-1, tokens, self.heads, self.qk_dim).transpose(1, 2)
        v = self.v(x).reshape(-1, tokens, self.heads, self.v_dim).transpose(1, 2)  # [B, H, N, v]
        if attn_mask is not None and attn_mask.ndim == 3:  # [B * H, N, N], as open_clip masks padding
            attn_mask = attn_mask.reshape(-1, self.heads, tokens, tokens)
        if torch.onnx.is_in_onnx_export():  # the same, in three nodes every runtime fuses
            logits = (q * self.scale) @ k.transpose(2, 3)
            y = (logits if attn_mask is None else logits + attn_mask).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=self.scale)
        return self.out(y.transpose(1, 2).reshape(-1, tokens, self.heads * self.v_dim))


class TimmAttention(Attention):
    """Drop-in for timm's plain `Attention`, which returns a tensor."""

    STOCK_NAMES: ClassVar[dict[str, str]] = {"weight": "qkv.weight", "bias": "qkv.bias", "out": "proj"}

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend from x [B, N, width] to itself: [B, N, width]. Vision towers have no causal mask."""
        return self.attend(x, attn_mask)
