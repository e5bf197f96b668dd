"""SiglipModel of Hugging Face transformers, as which SigLIP 2 of fixed size is stored too: both ways. And SigLIP 2 NaFlex, read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from clipress.data import packed_tokenizer
from clipress.errors import ArtifactError
from clipress.models import surgery
from clipress.models.load import build
from clipress.models.siglip_vit import Size
from clipress.models.weightless import build_weightless
from clipress.models.weights_file import State

TOKENIZERS = {
    32_000: "timm/ViT-B-16-SigLIP",
    250_000: "timm/ViT-B-16-SigLIP-i18n-256",
    256_000: "timm/ViT-B-16-SigLIP2",
}
"""open_clip's tokenizer of each vocabulary that SigLIP was published with."""
HALF: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
TRUNK = "visual.trunk."
OUTSIDE = {
    **{name: name for name in ("logit_scale", "logit_bias")},
    "text_model.embeddings.token_embedding.weight": "text.token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "text.positional_embedding",
    "vision_model.embeddings.position_embedding.weight": f"{TRUNK}pos_embed",
    "vision_model.head.probe": f"{TRUNK}attn_pool.latent",
}
MODULES = {
    "text_model.final_layer_norm": "text.ln_final",
    "text_model.head": "text.text_projection",
    "vision_model.embeddings.patch_embedding": f"{TRUNK}patch_embed.proj",
    "vision_model.post_layernorm": f"{TRUNK}norm",
    "vision_model.head.attention.out_proj": f"{TRUNK}attn_pool.proj",
    "vision_model.head.layernorm": f"{TRUNK}attn_pool.norm",
    "vision_model.head.mlp.fc1": f"{TRUNK}attn_pool.mlp.fc1",
    "vision_model.head.mlp.fc2": f"{TRUNK}attn_pool.mlp.fc2",
}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
POOL = "vision_model.head.attention.in_proj_"
BLOCK = re.compile(r"(text|vision)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
TEXT = {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2"} | {
    **{"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"},
}
VISION = {"self_attn.out_proj": "attn.proj", "layer_norm1": "norm1", "layer_norm2": "norm2"}
TANH = "gelu_pytorch_tanh"


class _Tower(BaseModel):
    hidden_size: int = Field(768, ge=1)
    intermediate_size: int = Field(3072, ge=1)
    num_hidden_layers: int = Field(12, ge=1)
    num_attention_heads: int = Field(12, ge=1)
    hidden_act: Literal["gelu_pytorch_tanh", "gelu"] = TANH
    layer_norm_eps: Literal[1e-06] = 1e-6


class _Vision(_Tower):
    image_size: int = Field(224, ge=1)
    patch_size: int = Field(16, ge=1)
    vision_use_head: Literal[True] = True


class _Text(_Tower):
    vocab_size: int = Field(32000, ge=1)
    max_position_embeddings: int = Field(64, ge=1)
    projection_size: int | None = None


class Config(BaseModel):
    """The settings of config.json; transformers leaves out those that have its default."""

    vision_config: _Vision = _Vision()
    text_config: _Text = _Text()


def architecture(config: Config, has_tokenizer: bool) -> dict[str, Any]:
    """Return open_clip's config of the model, whose folder may have its tokenizer.

    Raises ArtifactError for a size that is none of SigLIP's, or a vocabulary of no known tokenizer.
    """
    vision, text = config.vision_config, config.text_config
    for tower in (vision, text):
        if tower.hidden_size % tower.num_attention_heads:
            raise ArtifactError(f"{tower.num_attention_heads} heads do not divide a width of {tower.hidden_size}.")
    tokenizer = packed_tokenizer.NAME if has_tokenizer else TOKENIZERS.get(text.vocab_size)
    if tokenizer is None:
        known = ", ".join(f"{size:,}" for size in TOKENIZERS)
        raise ArtifactError(
            f"expected a vocabulary that SigLIP was published with ({known}), found {text.vocab_size:,}, and no "
            f"{packed_tokenizer.NAME} in the folder."
        )
    size = Size(
        vision.hidden_size,
        vision.num_hidden_layers,
        vision.num_attention_heads,
        vision.intermediate_size,
        vision.patch_size,
        vision.image_size,
        exact=vision.hidden_act != TANH,
    )
    return {
        "embed_dim": text.projection_size or text.hidden_size,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": vision.image_size,
            "timm_model_name": size.name,
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "hf_tokenizer_name": tokenizer,
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            "mlp_ratio": text.intermediate_size / text.hidden_size,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
            **({"act_kwargs": {"approximate": "tanh"}} if text.hidden_act == TANH else {}),
        },
    }


def as_square(raw: Mapping[str, Any], state: State) -> tuple[dict[str, Any], State]:
    """Return config.json and the weights of a SigLIP 2 NaFlex as a SiglipModel's, for square images with as many patches as it has positions.

    Of such images both compute the same; NaFlex takes others in their own shape. Raises ArtifactError.
    """
    vision = raw.get("vision_config") or {}
    patches, patch = (
        vision.get(name, usual) if isinstance(vision, Mapping) else None
        for name, usual in (("num_patches", 256), ("patch_size", 16))
    )
    if not (isinstance(patches, int) and isinstance(patch, int) and min(patches, patch) > 0):
        raise ArtifactError(
            f"vision_config: expected num_patches and patch_size, found {patches!r:.20} and {patch!r:.20}."
        )
    side = math.isqrt(patches)
    if side**2 != patches:
        raise ArtifactError(f"vision_config.num_patches: expected a square number, found {patches}.")
    name = "vision_model.embeddings.patch_embedding.weight"  # of a Linear, whose inputs are rows, columns, channels
    weight = state.get(name)
    if weight is not None and weight.ndim == 2 and weight.shape[1] == 3 * patch**2:
        state = {**state, name: weight.reshape(-1, patch, patch, 3).permute(0, 3, 1, 2).contiguous()}
    return {**raw, "vision_config": {**vision, "image_size": side * patch}}, state


def config_of(module: nn.Module) -> Config | None:
    """Return the config of the SiglipModel that computes what a CLIP does; None if there is none, such as for a cut one."""
    try:
        trunk, text = module.visual.trunk, module.text
        shape = surgery.shapes(module)
        image, words = shape["visual.trunk.blocks.0"], shape["text.transformer.resblocks.0"]
        config = Config(
            vision_config=_Vision(
                hidden_size=trunk.embed_dim,
                **_sizes(image, trunk.blocks, trunk.blocks[0].mlp.act),
                image_size=trunk.patch_embed.img_size[0],
                patch_size=trunk.patch_embed.patch_size[0],
            ),
            text_config=_Text(
                hidden_size=text.width,
                **_sizes(words, text.transformer.resblocks, text.transformer.resblocks[0].mlp.gelu),
                vocab_size=text.vocab_size,
                max_position_embeddings=text.context_length,
                projection_size=text.text_projection.out_features,
            ),
        )
        described = architecture(config, has_tokenizer=True)
    except (AttributeError, KeyError, IndexError, ValueError, ArtifactError):  # it lacks what a SigLIP has
        return None
    return config if _alike(module, build_weightless(lambda: build(described))) else None


def _sizes(shape: dict[str, Any], blocks: nn.Module, act: nn.Module) -> dict[str, Any]:
    is_exact = isinstance(act, nn.GELU) and act.approximate == "none"
    return {
        "intermediate_size": shape["ffn"],
        "num_hidden_layers": len(blocks),
        "num_attention_heads": shape["heads"],
        "hidden_act": "gelu" if is_exact else TANH,
    }


def _alike(module: nn.Module, other: nn.Module) -> bool:
    """Return whether two CLIPs with a text tower apart compute the same function of the same weights."""

    def described(one: nn.Module) -> tuple[Any, ...]:
        sizes = {name: tensor.shape for name, tensor in surgery.stock_weights(one).items()}
        return str(one), sizes, surgery.shapes(one), one.text.pool_type, one.text.attn_mask is None

    return described(module) == described(other)


def renamed(state: State) -> dict[str, Tensor]:
    """Return the weights in open_clip's naming; tensors that are none of the model's keep their names."""
    found, parts = dict[str, Tensor](), dict[str, dict[str, Tensor]]()
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if block := BLOCK.fullmatch(name):
            side, number, inside, kind = block.groups()
            own = f"text.transformer.resblocks.{number}." if side == "text" else f"{TRUNK}blocks.{number}."
            if inside in QKV:
                joined = f"attn.in_proj_{kind}" if side == "text" else f"attn.qkv.{kind}"
                parts.setdefault(own + joined, {})[inside] = tensor
            else:
                found[f"{own}{(TEXT if side == 'text' else VISION).get(inside, inside)}.{kind}"] = tensor
        elif name.startswith(POOL) and tensor.ndim and len(tensor) % 3 == 0:
            rows = len(tensor) // 3
            found[f"{TRUNK}attn_pool.q.{kind.removeprefix('in_proj_')}"] = tensor[:rows]
            found[f"{TRUNK}attn_pool.kv.{kind.removeprefix('in_proj_')}"] = tensor[rows:]
        elif module in MODULES:
            found[f"{MODULES[module]}.{kind}"] = tensor
        else:
            found[OUTSIDE.get(name, name)] = tensor
    positions = f"{TRUNK}pos_embed"
    if positions in found and found[positions].ndim == 2:
        found[positions] = found[positions][None]
    return found | joined_qkv(parts)


def joined_qkv(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return q, k and v of every attention as one tensor, by its name. Raises ArtifactError where one of them is missing."""
    for name, own in parts.items():
        if len(own) < len(QKV):
            raise ArtifactError(f"tensors of q, k and v for {name}: found {', '.join(own)} only.")
    return {name: torch.cat([own[module] for module in QKV]) for name, own in parts.items()}


def their_names(weights: State) -> dict[str, Tensor]:
    """Return weights in open_clip's naming in a SiglipModel's; the inverse of `renamed`."""
    outside, modules = ({ours: theirs for theirs, ours in names.items()} for names in (OUTSIDE, MODULES))
    sides = {"text.transformer.resblocks.": ("text", TEXT), f"{TRUNK}blocks.": ("vision", VISION)}
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        own = next((start for start in sides if name.startswith(start)), None)
        if own is not None:
            (side, names), (number, _, inside) = sides[own], module.removeprefix(own).partition(".")
            at = f"{side}_model.encoder.layers.{number}"
            if name.startswith(f"{own}{number}.attn.") and (kind.startswith("in_proj_") or inside == "attn.qkv"):
                parts = (f"{at}.self_attn.{letter}_proj.{kind.removeprefix('in_proj_')}" for letter in "qkv")
                found |= dict(zip(parts, tensor.chunk(3), strict=True))
            else:
                theirs = {ours: there for there, ours in names.items()}.get(inside, inside)
                found[f"{at}.{theirs}.{kind}"] = tensor
        elif module == f"{TRUNK}attn_pool.q":
            found[f"{POOL}{kind}"] = torch.cat([tensor, weights[f"{TRUNK}attn_pool.kv.{kind}"]])
        elif module in modules:
            found[f"{modules[module]}.{kind}"] = tensor
        elif module != f"{TRUNK}attn_pool.kv":
            found[outside.get(name, name)] = tensor
    found["vision_model.embeddings.position_embedding.weight"] = weights[f"{TRUNK}pos_embed"][0]
    return found | {name: weights[name].reshape(1) for name in ("logit_scale", "logit_bias")}
