"""Find a model's towers, blocks, parts and embeddings; all other code iterates over the results.

Four kinds of model are known: an open_clip model with an image and a text tower; a plain timm vision transformer, such as a
DeiT classifier, which is a single image tower; a Segmenter, an image tower and a decoder; and a BLIP, an image tower and one or
two text modules that read its tokens. Image towers of timm are vision transformers, plain ones and those of EVA and PE, whose
blocks have rotary positions, gates and norms, and ConvNeXt, whose blocks have a feed-forward only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

from clipress.errors import ArtifactError
from clipress.models.attention import Attention
from clipress.models.eva_attention import EvaAttention
from clipress.models.partial_norm import is_known_norm
from clipress.models.parts import BARE, GATED, PLAIN, Attn, Block, Ffn, FfnNames, Part

TOWERS = ("image", "text")  # Towers of a CLIP; `towers` returns those of any model.
CONFIG_KEYS = {"image": "vision_cfg", "text": "text_cfg"}
SEGMENTER_TOWERS = ("image", "decoder")
BLIP_IMAGE = ("visual_encoder.", "vision_proj.")
TEXT_MODULES = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection")


TIMM_FFNS = {
    "Mlp": FfnNames(("fc1",), "fc2", "norm"),
    "SwiGLU": FfnNames(("fc1_x", "fc1_g"), "fc2", "norm"),
    "GeGluMlp": FfnNames(("w1", "w0"), "w2"),
}
"""timm's feed-forwards of Linears, by class. GeGluMlp's norm is in front of its Linears."""


def is_clip(model: nn.Module) -> bool:
    """Return whether this is an open_clip model with an image and a text tower, rather than a single tower."""
    return hasattr(model, "visual")


def is_segmenter(model: nn.Module) -> bool:
    """Return whether this is a Segmenter (segmenter.py)."""
    return hasattr(model, "encoder") and hasattr(model, "decoder")


def is_blip(model: nn.Module) -> bool:
    """Return whether this is a BLIP (blip.py)."""
    return hasattr(model, "visual_encoder")


def text_modules(model: nn.Module) -> dict[str, str]:
    """Return the text modules of a BLIP by tower: their names. One that writes answers is a tower beside the question's."""
    names = [name for name in ("text_encoder", "text_decoder") if is_blip(model) and hasattr(model, name)]
    return dict(zip(("question", "answer") if len(names) > 1 else ("text",), names, strict=False))


def towers(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a model's towers."""
    if is_blip(model):
        return "image", *text_modules(model)
    return TOWERS if is_clip(model) else SEGMENTER_TOWERS if is_segmenter(model) else ("image",)


def tower_of(model: nn.Module, name: str) -> str | None:
    """Return the tower that a parameter or module belongs to; logit_scale and logit_bias, or temp, belong to none."""
    if is_blip(model):
        return None if name == "temp" else "image" if name.startswith(BLIP_IMAGE) else _text_tower_of(model, name)
    if not is_clip(model):
        return "decoder" if is_segmenter(model) and name.startswith("decoder.") else "image"
    if name.startswith("logit_"):
        return None
    return "image" if name.startswith("visual.") else "text"


def _text_tower_of(model: nn.Module, name: str) -> str:
    """Return the tower of a BLIP's text module, or of a head that reads one, which the first one does."""
    found = text_modules(model)
    return next((tower for tower, module in found.items() if name.startswith(f"{module}.")), next(iter(found)))


def tower_parameters(model: nn.Module, tower: str) -> list[nn.Parameter]:
    """Return the parameters of one tower, its projection and embeddings included."""
    return [parameter for name, parameter in model.named_parameters() if tower_of(model, name) == tower]


def blocks(model: nn.Module) -> list[Block]:
    """Return every block with parts that can be cut, image tower first.

    Raises ArtifactError if there are none.
    """
    found = _image_blocks(model) + _text_blocks(model) + _decoder_blocks(model) + _blip_blocks(model)
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
    prefix, trunk = _timm_root(model)
    if type(trunk).__name__ == "ConvNeXt" and is_clip(model):
        return _convnext_blocks(model, trunk, prefix)
    if not _is_known_vit(trunk):
        return []
    tokens = int(trunk.patch_embed.num_patches + trunk.num_prefix_tokens)
    return [
        Block("image", f"{prefix}blocks.{i}", block, tokens, _timm_ffn(block), getattr(trunk, "rope", None) is not None)
        for i, block in enumerate(trunk.blocks)
    ]


def _convnext_blocks(model: nn.Module, trunk: nn.Module, prefix: str) -> list[Block]:
    """Return the blocks of a ConvNeXt, or none if any has a feed-forward that is not of Linears."""
    found = []
    for number, stage in enumerate(trunk.stages):
        reduction = trunk.feature_info[number]["reduction"]
        tokens = math.prod(side // reduction for side in image_size(model))
        for i, block in enumerate(stage.blocks):
            if _timm_ffn(block) is None:
                return []
            found.append(Block("image", f"{prefix}stages.{number}.blocks.{i}", block, tokens, _timm_ffn(block)))
    return found


def _text_blocks(model: nn.Module) -> list[Block]:
    if not is_clip(model):
        return []
    prefix, text = text_root(model)
    layers = getattr(getattr(text, "transformer", None), "resblocks", ())
    return [
        Block(
            "text",
            f"{prefix}transformer.resblocks.{i}",
            block,
            context_length(model),
            GATED if hasattr(block.mlp, "c_gate") else PLAIN,
        )
        for i, block in enumerate(layers)
    ]


def _decoder_blocks(model: nn.Module) -> list[Block]:
    if not is_segmenter(model):
        return []
    tokens = int(model.encoder.patch_embed.num_patches + model.decoder.cls_emb.shape[1])
    return [
        Block("decoder", f"decoder.blocks.{i}", block, tokens, _timm_ffn(block))
        for i, block in enumerate(model.decoder.blocks)
    ]


def _blip_blocks(model: nn.Module) -> list[Block]:
    found = []
    for tower, name in text_modules(model).items():
        if tower == "answer":
            tokens, memory = model.answer_length, context_length(model)
        else:
            vit = model.visual_encoder
            tokens, memory = context_length(model), int(vit.patch_embed.num_patches + vit.num_prefix_tokens)
        found += [
            Block(tower, f"{name}.layers.{i}", layer, tokens, BARE, memory=memory)
            for i, layer in enumerate(getattr(model, name).layers)
        ]
    return found


def text_root(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the module that holds a CLIP's text tower, and its path as a prefix."""
    return ("text.", model.text) if hasattr(model, "text") else ("", model)


def _timm_root(model: nn.Module) -> tuple[str, nn.Module | None]:
    """Return timm's image tower with its path as a prefix: a CLIP's trunk, a Segmenter's or BLIP's encoder, or the model itself."""
    if is_segmenter(model):
        return "encoder.", model.encoder
    if is_blip(model):
        return "visual_encoder.", model.visual_encoder
    return ("visual.trunk.", getattr(model.visual, "trunk", None)) if is_clip(model) else ("", model)


def _is_known_vit(vit: nn.Module | None) -> bool:
    """Return whether this is a vision transformer of timm, all of whose parts can be cut."""
    found = list(getattr(vit, "blocks", ()))
    return (
        bool(found)
        and hasattr(vit, "num_prefix_tokens")
        and hasattr(getattr(vit, "patch_embed", None), "num_patches")
        and not getattr(vit, "rope_mixed", False)
        and all(_has_known_attention(block) and _timm_ffn(block) is not None for block in found)
    )


def _has_known_attention(block: nn.Module) -> bool:
    attn = getattr(block, "attn", None)
    return isinstance(attn, Attention) or _is_plain_timm_attention(attn) or is_eva_attention(attn)


def _timm_ffn(block: nn.Module) -> FfnNames | None:
    """Return the names of a block's feed-forward, None if it cannot be cut."""
    mlp = getattr(block, "mlp", None)
    names = TIMM_FFNS.get(type(mlp).__name__)
    if names is None or not all(isinstance(getattr(mlp, name), nn.Linear) for name in (*names.ins, names.out)):
        return None
    norm = getattr(mlp, names.norm) if names.norm else None
    return names if norm is None or isinstance(norm, nn.Identity) or is_known_norm(norm) else None


def _is_plain_timm_attention(module: nn.Module | None) -> bool:
    names = ("q_norm", "k_norm", "norm")
    return (
        type(module).__name__ == "Attention"
        and all(isinstance(getattr(module, name, None), nn.Identity) for name in names)
        and module.gate is None
        and module.num_heads * module.head_dim == module.qkv.in_features
    )


def is_eva_attention(module: nn.Module | None) -> bool:
    """Return whether this is timm's attention of an Eva block, without norms of queries and keys, gates or shared keys."""
    return (
        type(module).__name__ in ("EvaAttention", "AttentionRope")
        and not isinstance(module, EvaAttention)
        and all(isinstance(getattr(module, name), nn.Identity) for name in ("q_norm", "k_norm"))
        and (isinstance(module.norm, nn.Identity) or is_known_norm(module.norm))
        and module.gate is None
        and not module.rotate_half
        and getattr(module, "num_kv_groups", 1) == 1
        and module.num_heads * module.head_dim == module.proj.out_features
    )


def stock_attentions(model: nn.Module) -> Iterator[tuple[Block, nn.Module]]:
    """Yield (block, its attention) for blocks that still hold PyTorch's or timm's own attention."""
    for block in blocks(model):
        attn = getattr(block.module, "attn", None)
        if isinstance(attn, nn.MultiheadAttention) or _is_plain_timm_attention(attn) or is_eva_attention(attn):
            yield block, attn


def context_length(model: nn.Module) -> int:
    """Return how many token ids a text has."""
    return int(model.context_length)


def image_size(model: nn.Module) -> tuple[int, int]:
    """Return (height, width) in pixels."""
    size = model.visual.image_size if is_clip(model) else _timm_root(model)[1].patch_embed.img_size
    return (size, size) if isinstance(size, int) else tuple(size)


def projection(model: nn.Module, tower: str) -> nn.Linear | nn.Parameter | None:
    """Return what maps a tower's pooled features to its output: a Linear, or a bare matrix [in, out]; None for any other."""
    if is_blip(model):
        found = getattr(model, "vision_proj" if tower == "image" else "text_proj", None)
    elif not is_clip(model):
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
    found = [block for block in blocks(model) if block.tower == tower and block.attends]
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
    for name in text_modules(model).values():
        text = getattr(model, name)
        tables += [text.words.weight, text.places.weight]
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
