"""Find a model's towers, blocks, parts and embeddings; all other code iterates over the results.

Two kinds of model are known: an open_clip model with an image and a text tower, and a plain timm vision transformer,
such as a DeiT classifier, which is a single image tower.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from clipress.errors import ArtifactError
from clipress.models.attention import Attention

TOWERS = ("image", "text")  # Towers of a CLIP; `towers` returns those of any model.
CONFIG_KEYS = {"image": "vision_cfg", "text": "text_cfg"}
TEXT_MODULES = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection")


@dataclass(frozen=True)
class Attn:
    """One attention that may be cut: `tokens` queries attend to `memory` keys, which is `tokens` for self-attention."""

    tower: str
    name: str
    """Its module path."""
    block: str
    """The path of the block that it belongs to."""
    module: Attention
    tokens: int
    memory: int

    @property
    def width(self) -> int:
        return self.module.q.in_features

    @property
    def memory_width(self) -> int:
        return self.module.k.in_features

    @property
    def shape(self) -> dict[str, Any]:
        """Sizes that the architecture no longer determines once this part has been cut."""
        attn = self.module
        return {"heads": attn.heads, "qk_dim": attn.qk_dim, "v_dim": attn.v_dim, "scale": attn.scale}


@dataclass(frozen=True)
class Ffn:
    """One feed-forward that may be cut: two Linears of the module `parent`, called `in_name` and `out_name`."""

    tower: str
    name: str
    """The path of the module that holds its Linears."""
    block: str
    """The path of the block that it belongs to."""
    parent: nn.Module
    in_name: str
    out_name: str
    tokens: int

    @property
    def linear_in(self) -> nn.Linear:
        return getattr(self.parent, self.in_name)

    @property
    def linear_out(self) -> nn.Linear:
        return getattr(self.parent, self.out_name)

    @property
    def width(self) -> int:
        return self.linear_in.in_features

    @property
    def hidden(self) -> int:
        return self.linear_in.out_features

    @property
    def shape(self) -> dict[str, Any]:
        """Sizes that the architecture no longer determines once this part has been cut."""
        return {"ffn": self.hidden}


Part = Attn | Ffn


@dataclass(frozen=True)
class Block:
    """One transformer block of a tower: `name` is its module path, `tokens` its sequence length."""

    tower: str
    name: str
    module: nn.Module
    tokens: int
    ffn_names: tuple[str, str] = ("c_fc", "c_proj")
    """The names of the two Linears in its mlp."""

    @property
    def parts(self) -> tuple[Attn, Ffn]:
        """The parts of this block that may be cut."""
        return (
            Attn(self.tower, f"{self.name}.attn", self.name, self.module.attn, self.tokens, self.tokens),
            Ffn(self.tower, f"{self.name}.mlp", self.name, self.module.mlp, *self.ffn_names, self.tokens),
        )

    @property
    def width(self) -> int:
        return getattr(self.module.mlp, self.ffn_names[0]).in_features

    def gain(self, part: Part) -> nn.Parameter | None:
        """Return the layer scale [width] of a part's branch, or None if it is added to the residual stream as it is."""
        number = 1 if isinstance(part, Attn) else 2
        scales = [getattr(self.module, name, None) for name in (f"ls_{number}", f"ls{number}")]
        return next((scale.gamma for scale in scales if hasattr(scale, "gamma")), None)


def is_clip(model: nn.Module) -> bool:
    """Return whether this is an open_clip model with an image and a text tower, rather than a single tower."""
    return hasattr(model, "visual")


def towers(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a model's towers."""
    return TOWERS if is_clip(model) else ("image",)


def tower_of(model: nn.Module, name: str) -> str | None:
    """Return the tower that a parameter or module belongs to; logit_scale and logit_bias belong to none."""
    if not is_clip(model):
        return "image"
    if name.startswith("logit_"):
        return None
    return "image" if name.startswith("visual.") else "text"


def tower_parameters(model: nn.Module, tower: str) -> list[nn.Parameter]:
    """Return the parameters of one tower, its projection and embeddings included."""
    return [parameter for name, parameter in model.named_parameters() if tower_of(model, name) == tower]


def blocks(model: nn.Module) -> list[Block]:
    """Return every transformer block with parts that can be cut, image tower first.

    Raises ArtifactError if there are none.
    """
    found = _image_blocks(model) + _text_blocks(model)
    if not found:
        raise ArtifactError(
            f"{type(model).__name__}: expected transformer blocks with plain attention and feed-forwards, found none. "
            "clipress compresses open_clip models and timm's plain vision transformers."
        )
    return found


def parts(model: nn.Module) -> list[Part]:
    """Return every attention and feed-forward that may be cut, in the order of their blocks."""
    return [part for block in blocks(model) for part in block.parts]


def attentions(model: nn.Module) -> list[Attn]:
    """Return the parts that are attentions."""
    return [part for part in parts(model) if isinstance(part, Attn)]


def ffns(model: nn.Module) -> list[Ffn]:
    """Return the parts that are feed-forwards."""
    return [part for part in parts(model) if isinstance(part, Ffn)]


def _image_blocks(model: nn.Module) -> list[Block]:
    visual = getattr(model, "visual", None)
    if (transformer := getattr(visual, "transformer", None)) is not None:
        tokens = int(visual.positional_embedding.shape[0])
        return [
            Block("image", f"visual.transformer.resblocks.{i}", block, tokens)
            for i, block in enumerate(transformer.resblocks)
        ]
    prefix, vit = _timm_vit(model)
    if vit is None:
        return []
    tokens = int(vit.patch_embed.num_patches + vit.num_prefix_tokens)
    return [Block("image", f"{prefix}blocks.{i}", block, tokens, ("fc1", "fc2")) for i, block in enumerate(vit.blocks)]


def _text_blocks(model: nn.Module) -> list[Block]:
    if not is_clip(model):
        return []
    prefix, text = text_root(model)
    layers = getattr(getattr(text, "transformer", None), "resblocks", ())
    if any(hasattr(block.mlp, "c_gate") for block in layers):  # mT5's are gated, and cannot be cut yet.
        return []
    return [
        Block("text", f"{prefix}transformer.resblocks.{i}", block, context_length(model))
        for i, block in enumerate(layers)
    ]


def text_root(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the module that holds a CLIP's text tower, and its path as a prefix."""
    return ("text.", model.text) if hasattr(model, "text") else ("", model)


def _timm_root(model: nn.Module) -> tuple[str, nn.Module | None]:
    """Return timm's image tower with its path as a prefix: a CLIP's trunk, or the model itself."""
    return ("visual.trunk.", getattr(model.visual, "trunk", None)) if is_clip(model) else ("", model)


def _timm_vit(model: nn.Module) -> tuple[str, nn.Module | None]:
    """Return timm's image tower if it has plain attention and plain feed-forwards: no gates, no norms inside them."""
    prefix, vit = _timm_root(model)
    found = [(getattr(block, "attn", None), getattr(block, "mlp", None)) for block in getattr(vit, "blocks", ())]
    is_plain = (
        bool(found)
        and hasattr(vit, "num_prefix_tokens")
        and hasattr(getattr(vit, "patch_embed", None), "num_patches")
        and all(
            (isinstance(attn, Attention) or _is_plain_timm_attention(attn))
            and type(mlp).__name__ == "Mlp"
            and isinstance(mlp.fc1, nn.Linear)
            and isinstance(mlp.norm, nn.Identity)
            for attn, mlp in found
        )
    )
    return prefix, vit if is_plain else None


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
        attn = block.module.attn
        if isinstance(attn, nn.MultiheadAttention) or _is_plain_timm_attention(attn):
            yield block.module, attn


def context_length(model: nn.Module) -> int:
    """Return how many token ids a text has."""
    return int(model.context_length)


def image_size(model: nn.Module) -> tuple[int, int]:
    """Return (height, width) in pixels."""
    size = model.visual.image_size if is_clip(model) else model.patch_embed.img_size
    return (size, size) if isinstance(size, int) else tuple(size)


def projection(model: nn.Module, tower: str) -> nn.Linear | nn.Parameter | None:
    """Return what maps a tower's pooled features to its output: a Linear, or a bare matrix [in, out]; None for any other."""
    if not is_clip(model):
        found = getattr(model, "head", None)
    elif tower == "text":
        _, text = text_root(model)
        found = getattr(text, "text_projection", getattr(text, "proj", None))
    else:
        head = getattr(model.visual, "head", None)
        found = getattr(model.visual, "proj", None) if head is None else getattr(head, "proj", None)
    return found if isinstance(found, nn.Linear | nn.Parameter) else None


def token_layer(model: nn.Module, tower: str) -> nn.Module:
    """Return the last block of a tower, whose output is the tower's token features [B, n, W]."""
    return _last_block(model, tower).module


def token_shape(model: nn.Module, tower: str) -> tuple[int, int]:
    """Return (n, W) of the token features."""
    block = _last_block(model, tower)
    return block.tokens, block.width


def _last_block(model: nn.Module, tower: str) -> Block:
    found = [block for block in blocks(model) if block.tower == tower]
    if not found:
        raise ArtifactError(f"The {tower} tower has no transformer blocks, so it has no token features to compare.")
    return found[-1]


def token_table(model: nn.Module) -> nn.Embedding | None:
    """Return the lookup table of a text tower's tokens, which may be a factor of its embedding; None if there is none."""
    embedding = getattr(text_root(model)[1], "token_embedding", None)
    return (
        next((module for module in embedding.modules() if isinstance(module, nn.Embedding)), None)
        if embedding
        else None
    )


def embedding_parameters(model: nn.Module) -> int:
    """Count the parameters of lookup tables: token, position and class embeddings. They cost memory but no multiplications."""
    tables = [getattr(_timm_root(model)[1], name, None) for name in ("pos_embed", "cls_token")]
    if is_clip(model):
        _, text = text_root(model)
        tables.append(getattr(token_table(model), "weight", None))
        tables += [getattr(tower, "positional_embedding", None) for tower in (text, model.visual)]
        tables.append(getattr(model.visual, "class_embedding", None))
        tables.append(getattr(getattr(text, "positions", None), "weight", None))
    return sum(table.numel() for table in tables if table is not None)


def counts(model: nn.Module) -> dict[str, int]:
    """Count parameters: all, without embeddings, and inside blocks. An image tower without blocks counts as inside them."""
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
