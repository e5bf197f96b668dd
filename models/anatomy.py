"""The only file that knows where a CLIP keeps its blocks, attention, feed-forwards and embeddings. All else iterates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from clipress.errors import ArtifactError
from clipress.models.attention import Attention

TOWERS = ("image", "text")


@dataclass(frozen=True)
class Block:
    """One transformer block of one tower. `name` is its module path, `tokens` the length it works on."""

    tower: str
    name: str
    module: nn.Module
    tokens: int

    @property
    def attn(self) -> Attention:
        return self.module.attn

    @property
    def ffn_in(self) -> nn.Linear:
        return self.module.mlp.c_fc

    @property
    def ffn_out(self) -> nn.Linear:
        return self.module.mlp.c_proj

    @property
    def width(self) -> int:
        return self.ffn_in.in_features


def _text_root(model: nn.Module) -> tuple[str, nn.Module]:
    return ("text.", model.text) if hasattr(model, "text") else ("", model)


def context_length(model: nn.Module) -> int:
    """Return how many token ids a text has."""
    return int(model.context_length)


def image_size(model: nn.Module) -> tuple[int, int]:
    """Return (height, width) in pixels."""
    size = model.visual.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def blocks(model: nn.Module) -> list[Block]:
    """Return every transformer block, image tower first."""
    visual = getattr(getattr(model, "visual", None), "transformer", None)
    prefix, text = _text_root(model)
    found = []
    if visual is not None:
        tokens = int(model.visual.positional_embedding.shape[0])
        found += [
            Block("image", f"visual.transformer.resblocks.{i}", block, tokens)
            for i, block in enumerate(visual.resblocks)
        ]
    if hasattr(text, "transformer") and hasattr(text.transformer, "resblocks"):
        found += [
            Block("text", f"{prefix}transformer.resblocks.{i}", block, context_length(model))
            for i, block in enumerate(text.transformer.resblocks)
        ]
    if not found:
        raise ArtifactError(f"{type(model).__name__} has no transformer blocks that clipress knows how to compress.")
    return found


def stock_attentions(model: nn.Module) -> Iterator[tuple[nn.Module, nn.MultiheadAttention]]:
    """Yield (block, its attention) for blocks that still hold PyTorch's own attention."""
    for block in blocks(model):
        if isinstance(block.module.attn, nn.MultiheadAttention):
            yield block.module, block.module.attn


def embedding_parameters(model: nn.Module) -> int:
    """Count look-up tables: token, position and class embeddings. They cost memory and no multiplication."""
    _, text = _text_root(model)
    tables = [getattr(getattr(text, "token_embedding", None), "weight", None)]
    tables += [getattr(tower, "positional_embedding", None) for tower in (text, model.visual)]
    tables.append(getattr(model.visual, "class_embedding", None))
    return sum(table.numel() for table in tables if table is not None)


def counts(model: nn.Module) -> dict[str, int]:
    """Count parameters: all, without embeddings, and inside transformer blocks."""
    total = sum(p.numel() for p in model.parameters())
    in_blocks = sum(p.numel() for block in blocks(model) for p in block.module.parameters())
    return {
        "params": total,
        "params_without_embeddings": total - embedding_parameters(model),
        "block_params": in_blocks,
    }
