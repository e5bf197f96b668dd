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
    ffn_names: tuple[str, str] = ("c_fc", "c_proj")  # of the Linears in its mlp

    @property
    def attn(self) -> Attention:
        return self.module.attn

    @property
    def ffn_in(self) -> nn.Linear:
        return getattr(self.module.mlp, self.ffn_names[0])

    @property
    def ffn_out(self) -> nn.Linear:
        return getattr(self.module.mlp, self.ffn_names[1])

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
    """Return every transformer block that can be taken apart, image tower first."""
    visual = getattr(getattr(model, "visual", None), "transformer", None)
    trunk = getattr(getattr(model, "visual", None), "trunk", None)
    prefix, text = _text_root(model)
    found = []
    if visual is not None:
        tokens = int(model.visual.positional_embedding.shape[0])
        found += [
            Block("image", f"visual.transformer.resblocks.{i}", block, tokens)
            for i, block in enumerate(visual.resblocks)
        ]
    elif _is_plain_timm_vit(trunk):
        tokens = int(trunk.patch_embed.num_patches + trunk.num_prefix_tokens)
        found += [
            Block("image", f"visual.trunk.blocks.{i}", block, tokens, ("fc1", "fc2"))
            for i, block in enumerate(trunk.blocks)
        ]
    if hasattr(text, "transformer") and hasattr(text.transformer, "resblocks"):
        found += [
            Block("text", f"{prefix}transformer.resblocks.{i}", block, context_length(model))
            for i, block in enumerate(text.transformer.resblocks)
        ]
    if not found:
        raise ArtifactError(f"{type(model).__name__} has no transformer blocks that clipress knows how to compress.")
    return found


def _is_plain_timm_vit(trunk: nn.Module | None) -> bool:
    """Tell whether timm's tower is made of plain attention and plain feed-forwards: no gates, no norms inside them."""
    parts = [(getattr(b, "attn", None), getattr(b, "mlp", None)) for b in getattr(trunk, "blocks", ())]
    return (
        bool(parts)
        and hasattr(trunk, "num_prefix_tokens")
        and hasattr(getattr(trunk, "patch_embed", None), "num_patches")
        and all(
            (isinstance(attn, Attention) or _is_plain_timm_attention(attn))
            and type(mlp).__name__ == "Mlp"
            and isinstance(mlp.fc1, nn.Linear)
            and isinstance(mlp.norm, nn.Identity)
            for attn, mlp in parts
        )
    )


def _is_plain_timm_attention(module: nn.Module | None) -> bool:
    names = ("q_norm", "k_norm", "norm")
    return (
        type(module).__name__ == "Attention"
        and all(isinstance(getattr(module, name, None), nn.Identity) for name in names)
        and module.gate is None
        and module.num_heads * module.head_dim == module.qkv.in_features
    )


def stock_attentions(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield (block, its attention) for blocks that still hold PyTorch's or timm's own attention."""
    for block in blocks(model):
        if isinstance(block.module.attn, nn.MultiheadAttention) or _is_plain_timm_attention(block.module.attn):
            yield block.module, block.module.attn


def tower_parameters(model: nn.Module, tower: str) -> list[nn.Parameter]:
    """Return the parameters of one tower, its projection and embeddings included; logit_scale belongs to neither."""
    image = list(model.visual.parameters())
    if tower == "image":
        return image
    others = {id(parameter) for parameter in image} | {id(getattr(model, "logit_scale", None))}
    others.add(id(getattr(model, "logit_bias", None)))
    return [parameter for parameter in model.parameters() if id(parameter) not in others]


def token_layer(model: nn.Module, tower: str) -> nn.Module:
    """Return the last block of a tower: what it gives is the tower's token features [B, n, W]."""
    found = [block.module for block in blocks(model) if block.tower == tower]
    if not found:
        raise ArtifactError(f"The {tower} tower has no transformer blocks, so it has no token features to compare.")
    return found[-1]


def token_shape(model: nn.Module, tower: str) -> tuple[int, int]:
    """Return (n, W) of the token features."""
    token_layer(model, tower)
    return [(block.tokens, block.width) for block in blocks(model) if block.tower == tower][-1]


def embedding_parameters(model: nn.Module) -> int:
    """Count look-up tables: token, position and class embeddings. They cost memory and no multiplication."""
    _, text = _text_root(model)
    tables = [getattr(getattr(text, "token_embedding", None), "weight", None)]
    tables += [getattr(tower, "positional_embedding", None) for tower in (text, model.visual)]
    tables.append(getattr(model.visual, "class_embedding", None))
    tables += [getattr(getattr(model.visual, "trunk", None), name, None) for name in ("pos_embed", "cls_token")]
    return sum(table.numel() for table in tables if table is not None)


def counts(model: nn.Module) -> dict[str, int]:
    """Count parameters: all, without embeddings, and inside transformer blocks; an image tower without any counts whole."""
    total = sum(p.numel() for p in model.parameters())
    found = blocks(model)
    in_blocks = sum(p.numel() for block in found for p in block.module.parameters())
    if not any(block.tower == "image" for block in found):
        in_blocks += sum(p.numel() for p in model.visual.parameters())
    return {
        "params": total,
        "params_without_embeddings": total - embedding_parameters(model),
        "block_params": in_blocks,
    }
