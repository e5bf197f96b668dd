"""The only file that knows where a CLIP keeps its blocks, attention, feed-forwards and embeddings. All else iterates."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from clipress.errors import ArtifactError
from clipress.models.attention import Attention

TOWERS = ("image", "text")
CONFIG_KEYS = {"image": "vision_cfg", "text": "text_cfg"}
TEXT_PARTS = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection")

# Tensors of open_clip's own transformers that have an axis of residual channels: name -> (axis, the gain of the norm that
# it is read through, or of the layer scale that it is written through).
_IN_TOWER: dict[str, dict[str, tuple[int, str | None]]] = {
    "image": {
        "conv1.weight": (0, None),
        "class_embedding": (0, None),
        "positional_embedding": (1, None),
        "ln_pre.weight": (0, None),
        "ln_pre.bias": (0, None),
        "ln_post.weight": (0, None),
        "ln_post.bias": (0, None),
        "proj": (0, "ln_post.weight"),
    },
    "text": {
        "token_embedding.weight": (1, None),
        "cls_emb": (0, None),
        "positional_embedding": (1, None),
        "ln_final.weight": (0, None),
        "ln_final.bias": (0, None),
        "text_projection": (0, "ln_final.weight"),
        "text_projection.weight": (1, "ln_final.weight"),
    },
}
_IN_BLOCK: dict[str, tuple[int, str | None]] = {
    "ln_1.weight": (0, None),
    "ln_1.bias": (0, None),
    "attn.q.weight": (1, "ln_1.weight"),
    "attn.k.weight": (1, "ln_1.weight"),
    "attn.v.weight": (1, "ln_1.weight"),
    "attn.out.weight": (0, "ls_1.gamma"),
    "attn.out.bias": (0, None),
    "ls_1.gamma": (0, None),
    "ln_2.weight": (0, None),
    "ln_2.bias": (0, None),
    "mlp.c_fc.weight": (1, "ln_2.weight"),
    "mlp.c_proj.weight": (0, "ls_2.gamma"),
    "mlp.c_proj.bias": (0, None),
    "ls_2.gamma": (0, None),
}
_WITHOUT_CHANNELS = {"attn.q.bias", "attn.k.bias", "attn.v.bias", "mlp.c_fc.bias", "text_projection.bias"}


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


def tower_of(name: str) -> str | None:
    """Return the tower that a parameter's name belongs to; logit_scale and logit_bias belong to neither."""
    if name.startswith("logit_"):
        return None
    return "image" if name.startswith("visual.") else "text"


def transformer(model: nn.Module, tower: str) -> nn.Module | None:
    """Return open_clip's own transformer of a tower, which holds its blocks as `resblocks`; None if it has another."""
    found = getattr(model.visual if tower == "image" else _text_root(model)[1], "transformer", None)
    return found if hasattr(found, "resblocks") else None


def residual_axes(model: nn.Module, tower: str) -> dict[str, tuple[int, str | None]]:
    """Return every tensor of an open_clip transformer tower that has an axis of residual channels.

    Maps its name to (axis, name of the gain that scales these channels on the way in or out, or None).
    Raises ArtifactError for a tower with tensors that are not known here: its width cannot be changed.
    """
    prefix = "visual." if tower == "image" else _text_root(model)[0]
    found: dict[str, tuple[int, str | None]] = {}
    names = [name for name, _ in model.named_parameters() if tower_of(name) == tower]
    for name in names:
        short, at, table = name.removeprefix(prefix), prefix, _IN_TOWER[tower]
        if block := re.match(r"transformer\.resblocks\.\d+\.", short):
            short, at, table = short.removeprefix(block[0]), prefix + block[0], _IN_BLOCK
        if short in _WITHOUT_CHANNELS:
            continue
        if short not in table:
            raise ArtifactError(f"{name} of the {tower} tower is not one of a plain open_clip transformer's tensors.")
        axis, gain = table[short]
        found[name] = axis, at + gain if gain and at + gain in names else None
    return found


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
    """Return the parameters of one tower, its projection and embeddings included."""
    return [parameter for name, parameter in model.named_parameters() if tower_of(name) == tower]


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
