"""BLIP's text module ("MED", Li et al. 2022): one BERT that reads texts, reads them beside images, or writes them.

    ids [B, L] -> words + places -> norm -> layers -> states [B, L, W]
    layer: x = norm(x + attention(x)); x = norm(x + cross(x, memory)), with a memory only; x = norm(x + feed-forward(x))

A memory is what another tower makes of an image [B, M, V] or a text. With two of them, for tasks about pairs of images, every layer
has two cross-attentions with projections of their own: their outputs are averaged, or put side by side and merged by a Linear.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipress.models.attention import HIDDEN, Memory, SeparateAttention

EPS = 1e-12
FFN_RATIO = 4
MERGES_FROM = 6  # the first layer that merges two memories by a Linear, as published
DROPOUT = 0.1  # in training, as published


@dataclass(frozen=True)
class Sizes:
    """The sizes of a text module."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    positions: int
    """The longest text."""


def _std(sizes: Sizes) -> float:
    """Return the deviation of random weights: BERT's 0.02 at its width, and what gives other widths' layers as large outputs."""
    return 0.02 * math.sqrt(768 / sizes.width)


class Layer(nn.Module):
    """One layer, with as many cross-attentions as there are `memory_widths`."""

    norm_first = False

    def __init__(self, sizes: Sizes, memory_widths: Sequence[int], merges: bool, dropout: float) -> None:
        super().__init__()
        width = sizes.width

        def attention(memory_width: int | None = None) -> SeparateAttention:
            dim = width // sizes.heads
            made = SeparateAttention(width, sizes.heads, dim, dim, dim**-0.5, memory_width=memory_width)
            made.dropout = dropout
            return made

        self.attn, self.attn_norm = attention(), nn.LayerNorm(width, EPS)
        if memory_widths:
            self.cross, self.cross_norm = nn.ModuleList(map(attention, memory_widths)), nn.LayerNorm(width, EPS)
        if merges:
            self.merge = nn.Linear(len(memory_widths) * width, width)
        self.fc1, self.fc2 = nn.Linear(width, FFN_RATIO * width), nn.Linear(FFN_RATIO * width, width)
        self.ffn_norm, self.dropout = nn.LayerNorm(width, EPS), nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        memories: Sequence[Memory] = (),
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """Map the stream x [B, L, W]; masks [B, 1, 1 or L, L] and [B, 1, 1, M] are added to the logits."""
        x = self.attn_norm(x + self.dropout(self.attn.attend(x, mask)))
        if memories:
            found = [cross.attend(x, memory_mask, one) for cross, one in zip(self.cross, memories, strict=True)]
            merged = self.merge(torch.cat(found, -1)) if hasattr(self, "merge") else sum(found) / len(found)
            x = self.cross_norm(x + self.dropout(merged))
        return self.ffn_norm(x + self.dropout(self.fc2(F.gelu(self.fc1(x)))))


class Med(nn.Module):
    """The text module.

    Args:
        sizes: its sizes.
        memory_widths: widths of what its cross-attentions read; empty: it has none.
        merges_from: the first layer that merges two memories by a Linear; earlier ones average.
        dropout: in training, of attention weights and of what is added to the stream.
    """

    def __init__(
        self,
        sizes: Sizes,
        memory_widths: Sequence[int] = (),
        merges_from: int = MERGES_FROM,
        dropout: float = DROPOUT,
    ) -> None:
        super().__init__()
        self.words, self.places = (nn.Embedding(count, sizes.width) for count in (sizes.vocabulary, sizes.positions))
        self.norm, self.dropout = nn.LayerNorm(sizes.width, EPS), nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            Layer(sizes, memory_widths, len(memory_widths) > 1 and number >= merges_from, dropout)
            for number in range(sizes.layers)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=_std(sizes))

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        memories: Sequence[Tensor] = (),
        memory_mask: Tensor | None = None,
        causal: bool = False,
        keys: Tensor | None = None,
    ) -> Tensor:
        """Read texts of any length up to the positions, alone or with memories: states [B, L, W].

        Args:
            ids: int64 [B, L].
            mask: [B, L], 1 for tokens and 0 for padding, which then has no influence; None: no padding.
            memories: one [B, M, V] per cross-attention; empty: the cross-attentions are left out.
            memory_mask: [B, M], likewise.
            causal: every token sees itself and earlier ones only.
            keys: instead of a memory, what `keys` made of it.
        """
        x = self.dropout(self.norm(self.words(ids) + self.places.weight[: ids.shape[1]]))
        seen = (torch.ones_like(ids) if mask is None else mask)[:, None, None]  # [B, 1, 1, L]
        if causal:
            order = torch.arange(ids.shape[1], device=ids.device)
            seen = seen * (order[:, None] >= order)
        own, other = _added(seen, x), None if memory_mask is None else _added(memory_mask[:, None, None], x)
        each = [memories] * len(self.layers) if keys is None else self._split(keys)
        for layer, found in zip(self.layers, each, strict=True):
            x = layer(x, own, found, other)
        return x

    def keys(self, memory: Tensor) -> Tensor:
        """Return the keys and values of all layers side by side, [B, M, D], which every pass over the same memory shares."""
        linears = [linear for layer in self.layers for linear in (layer.cross[0].k, layer.cross[0].v)]
        return torch.cat([linear(memory) for linear in linears], -1)

    def _split(self, keys: Tensor) -> list[tuple[Memory]]:
        sizes = [n for layer in self.layers for n in (layer.cross[0].k.out_features, layer.cross[0].v.out_features)]
        rows = keys.split(sizes, -1)
        return [(pair,) for pair in zip(rows[::2], rows[1::2], strict=True)]


def _added(seen: Tensor, like: Tensor) -> Tensor:
    return (1 - seen.to(like.dtype)) * HIDDEN


class LanguageHead(nn.Module):
    """Scores of the next word, by the word embeddings."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(sizes.width, sizes.width), nn.LayerNorm(sizes.width, EPS)
        self.bias = nn.Parameter(torch.zeros(sizes.vocabulary))
        nn.init.normal_(self.dense.weight, std=_std(sizes))

    def forward(self, x: Tensor, words: nn.Embedding) -> Tensor:
        """Map states [..., W] to logits [..., vocabulary]."""
        return F.linear(self.norm(F.gelu(self.dense(x))), words.weight, self.bias)


class Writer(Med):
    """A text module that writes: states become logits of the next word."""

    def __init__(self, sizes: Sizes, memory_widths: Sequence[int], dropout: float = DROPOUT) -> None:
        super().__init__(sizes, memory_widths, dropout=dropout)
        self.head = LanguageHead(sizes)

    def write(
        self,
        ids: Tensor,
        mask: Tensor | None,
        memory: Tensor | None,
        memory_mask: Tensor | None = None,
        keys: Tensor | None = None,
        last: bool = False,
    ) -> Tensor:
        """Return logits of the word behind every token [B, L, vocabulary], or with `last` behind the last one [B, 1, vocabulary]."""
        memories = () if memory is None else (memory,)
        states = self(ids, mask, memories, memory_mask, causal=True, keys=keys)
        return self.head(states[:, -1:] if last else states, self.words)
