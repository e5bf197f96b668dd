"""Text towers that open_clip takes from transformers: BERT, RoBERTa and XLM-R, mT5's and NLLB's encoders, built without that library.

They are what `HFTextEncoder` in open_clip computes, in blocks with our attention, so that they are cut, rounded and exported like any
other. The config of the encoder travels in the architecture as `text_cfg.hf_config`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipress.errors import ArtifactError
from clipress.models.attention import HIDDEN, SeparateAttention
from clipress.models.hf_config import ACTIVATIONS, CONTEXT, Shape, shape_of

MEAN, FIRST, CLS = "mean_pooler", "cls_pooler", "cls_last_hidden_state_pooler"
"""open_clip's names: the mean of a text, or its first token. `cls_pooler` is BERT's own layer where the encoder has one."""
NORM_AND_TWO = "norm-linear-linear"
"""AltCLIP's projection, which open_clip lacks: a norm, a Linear to `project_dim`, and one without bias."""
_FUNCTIONS = {"gelu": nn.GELU, "gated-gelu": lambda: nn.GELU("tanh"), "relu": nn.ReLU}


class RMSNorm(nn.Module):
    """T5's norm: no mean, no bias."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [..., width]."""
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class FeedForward(nn.Module):
    """Two Linears, or with `gated` three."""

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.gated = activation.startswith("gated")
        self.c_fc = nn.Linear(width, hidden, bias=not self.gated)
        if self.gated:
            self.c_gate = nn.Linear(width, hidden, bias=False)
        self.act = _FUNCTIONS[activation]()
        self.c_proj = nn.Linear(hidden, width, bias=not self.gated)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., width] to the same shape."""
        return self.c_proj(self.act(self.c_gate(x)) * self.c_fc(x) if self.gated else self.act(self.c_fc(x)))


class EncoderBlock(nn.Module):
    """A block with its norms before both parts, or behind them, as BERT has them."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        is_mt5, self.norm_first = shape.kind == "mt5", shape.kind not in ("bert", "roberta", "xlm-roberta")
        scale = 1.0 if is_mt5 else shape.head_dim**-0.5
        bias = {"bias": not is_mt5, "out_bias": not is_mt5}
        self.ln_1, self.ln_2 = _norm(shape), _norm(shape)
        self.attn = SeparateAttention(shape.width, shape.heads, shape.head_dim, shape.head_dim, scale, **bias)
        self.mlp = FeedForward(shape.width, shape.hidden, ACTIVATIONS[shape.kind])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map the stream x [B, N, width]; the mask [B, 1 or H, 1 or N, N] is added to the logits."""
        if self.norm_first:
            x = x + self.attn.attend(self.ln_1(x), mask)
            return x + self.mlp(self.ln_2(x))
        x = self.ln_1(x + self.attn.attend(x, mask))
        return self.ln_2(x + self.mlp(x))


def _norm(shape: Shape) -> nn.Module:
    return RMSNorm(shape.width, shape.eps) if shape.kind == "mt5" else nn.LayerNorm(shape.width, shape.eps)


class Blocks(nn.Module):
    """The blocks, under the name that open_clip's own towers have them."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(EncoderBlock(shape) for _ in range(shape.layers))


class HFText(nn.Module):
    """Text tower: ids [B, N] with 2 <= N <= the context length -> embeddings [B, out]. Padding has no influence.

    Args:
        text_cfg: open_clip's, with `hf_config`.
        out: dims of an embedding.
    """

    def __init__(self, text_cfg: Mapping[str, Any], out: int) -> None:
        super().__init__()
        config, pooler = text_cfg["hf_config"], text_cfg.get("hf_pooler_type", MEAN)
        self.shape = shape = shape_of(config)
        self.context_length, self.vocab_size = int(text_cfg.get("context_length", CONTEXT)), shape.vocab
        if pooler not in (MEAN, CLS, FIRST) or (pooler == FIRST and shape.kind != "m2m_100"):
            raise ArtifactError(
                f"its text tower pools by {pooler!r:.50}, which clipress does not know for {shape.kind}."
            )
        self.pooler, self.grad_checkpointing = pooler, False
        self.token_embedding = nn.Embedding(shape.vocab, shape.width)
        self.embedding_scale = 1.0
        if shape.kind == "mt5":
            buckets, far = config["relative_attention_num_buckets"], config["relative_attention_max_distance"]
            self.relative_bias = nn.Embedding(int(buckets), shape.heads)
            places = _buckets(self.context_length, int(buckets), int(far))
            self.register_buffer("buckets", places, persistent=False)
        elif shape.kind == "m2m_100":
            self.embedding_scale = math.sqrt(shape.width) if config.get("scale_embedding", True) else 1.0
            waves = _waves(shape.pad + 1 + self.context_length, shape.width, shape.pad)
            self.register_buffer("waves", waves, persistent=False)
        else:
            places = int(config["max_position_embeddings"])
            needed = self.context_length + (0 if shape.kind == "bert" else shape.pad + 1)
            if places < needed:
                raise ArtifactError(
                    f"its text tower: expected at least {needed} positions for its texts, found {places}."
                )
            self.positions = nn.Embedding(places, shape.width)
            self.token_type = nn.Embedding(int(config.get("type_vocab_size", 1)), shape.width)
            self.ln_pre = _norm(shape)
        self.transformer = Blocks(shape)
        kind = text_cfg.get("hf_proj_type", "mlp")
        if shape.kind in ("mt5", "m2m_100") or kind == NORM_AND_TWO:
            self.ln_final = _norm(shape)
        self.proj = _projection(kind, shape.width, out, config)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Embed token ids, int64 [B, N]: [B, out]."""
        is_text = (ids != self.shape.pad).to(self.token_embedding_dtype)  # [B, N]
        x, mask = self._embedded(ids, is_text), (1 - is_text)[:, None, None] * HIDDEN
        if self.shape.kind == "mt5":
            length = ids.shape[1]
            mask = mask + self.relative_bias(self.buckets[:length, :length]).permute(2, 0, 1)[None]
        for block in self.transformer.resblocks:
            x = checkpoint(block, x, mask, use_reentrant=False) if self.grad_checkpointing else block(x, mask)
        x = self.ln_final(x) if hasattr(self, "ln_final") else x
        if self.pooler == MEAN:
            x = (x * is_text[..., None]).sum(1) / is_text.sum(1, keepdim=True)
        else:
            x = x[:, 0]
        return self.proj(x)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the blocks again in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    @property
    def token_embedding_dtype(self) -> torch.dtype:
        """The dtype of the stream."""
        return next(self.token_embedding.parameters()).dtype

    def _embedded(self, ids: Tensor, is_text: Tensor) -> Tensor:
        x = self.token_embedding(ids) * self.embedding_scale
        if self.shape.kind == "mt5":
            return x
        if self.shape.kind == "bert":
            return self.ln_pre(x + self.token_type.weight[0] + self.positions.weight[: ids.shape[1]])
        places = ((is_text.cumsum(1) * is_text).long()) + self.shape.pad  # Padding stays at the place `pad`.
        if self.shape.kind == "m2m_100":
            return x + F.embedding(places, self.waves)
        return self.ln_pre(x + self.token_type.weight[0] + self.positions(places))


def _projection(kind: str | None, width: int, out: int, config: Mapping[str, Any]) -> nn.Module:
    """Return open_clip's projection: `linear`, `mlp`, or none where the widths are equal; or AltCLIP's."""
    if kind == NORM_AND_TWO:
        inner = int(config["project_dim"])
        return nn.Sequential(nn.Linear(width, inner), nn.Linear(inner, out, bias=False))
    if kind == "linear":
        return nn.Linear(width, out, bias=False)
    if kind == "mlp":
        hidden = (width + out) // 2
        return nn.Sequential(nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, out, bias=False))
    if width != out:
        raise ArtifactError(f"its text tower: expected a projection from {width} to {out} dims, found none.")
    return nn.Identity()


def _buckets(length: int, buckets: int, far: int) -> Tensor:
    """Return T5's bucket of every pair of positions [N, N]: exact ones near by, logarithmic ones up to the distance `far`."""
    half = buckets // 2
    exact = half // 2
    places = torch.arange(length)
    offsets = places[None] - places[:, None]
    distance = offsets.abs()
    ratio = torch.log(distance.clamp_min(1).float() / exact) / math.log(far / exact)
    distant = (exact + (ratio * (half - exact)).long()).clamp_max(half - 1)
    return (offsets > 0).long() * half + torch.where(distance < exact, distance, distant)


def _waves(length: int, width: int, pad: int) -> Tensor:
    """Return M2M-100's sinusoidal positions [N, W], sines before cosines; the row of padding is zero."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half).float() * -(math.log(10000) / (half - 1)))
    angles = torch.arange(length).float()[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    waves[pad] = 0
    return F.pad(waves, (0, width - 2 * half))


def encoder_kind(model: nn.Module) -> str | None:
    """Return the model type of a CLIP's text encoder in transformers; None if its text tower is not from there."""
    text = getattr(model, "text", None)
    return text.shape.kind if isinstance(text, HFText) else None
