"""Self-attention with separate q, k, v and out Linears, narrow dims and the original softmax scale.

Plain Linears are what pruning, 2:4, INT8, ONNX and TensorRT all understand; `nn.MultiheadAttention` is understood by
none of them. The scale is kept when dims are cut, so a pruned model computes what the masked one computed; dividing by
the new width instead is UPop's known defect.
"""

from __future__ import annotations

import warnings

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
    """

    def __init__(self, width: int, heads: int, qk_dim: int, v_dim: int, scale: float, bias: bool = True) -> None:
        super().__init__()
        self.heads, self.qk_dim, self.v_dim, self.scale = heads, qk_dim, v_dim, scale
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # without heads there is nothing to initialise
            self.q = nn.Linear(width, heads * qk_dim, bias=bias)
            self.k = nn.Linear(width, heads * qk_dim, bias=bias)
            self.v = nn.Linear(width, heads * v_dim, bias=bias)
            self.out = nn.Linear(heads * v_dim, width, bias=bias)

    @classmethod
    def from_multihead(cls, mha: nn.MultiheadAttention) -> Attention:
        """Copy the weights of a stock attention; both compute the same."""
        width, heads = mha.embed_dim, mha.num_heads
        dim = width // heads
        own = cls(width, heads, dim, dim, dim**-0.5, bias=mha.in_proj_bias is not None)
        with torch.no_grad():
            for part, weight in zip((own.q, own.k, own.v), mha.in_proj_weight.chunk(3), strict=True):
                part.weight.copy_(weight)
            own.out.weight.copy_(mha.out_proj.weight)
            if mha.in_proj_bias is not None:
                for part, bias in zip((own.q, own.k, own.v), mha.in_proj_bias.chunk(3), strict=True):
                    part.bias.copy_(bias)
                own.out.bias.copy_(mha.out_proj.bias)
        return own.to(mha.out_proj.weight)

    def forward(self, x: Tensor, *_: Tensor, attn_mask: Tensor | None = None, **__: object) -> tuple[Tensor, None]:
        """Attend from x [B, N, width] to itself. Returns ([B, N, width], None), as the stock module does.

        Keys and values that open_clip passes again are the same tensor and are ignored.
        """
        if self.heads == 0:  # every head was cut: what is left is the bias
            return (torch.zeros_like(x) if self.out.bias is None else self.out.bias.expand_as(x)), None
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
        return self.out(y.transpose(1, 2).reshape(-1, tokens, self.heads * self.v_dim)), None
