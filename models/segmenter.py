"""Segmenter (Strudel et al. 2021): a ViT encoder, and a decoder in which every class is a token.

    pixels [B, 3, S, S] -> patches [B, N, W] -> with the classes' tokens through the decoder's blocks
    -> scores [B, C, S / patch, S / patch]: cosines of patches and classes, normalised over the classes

Names of parameters are the published files'. The classifier that the encoder was pretrained with is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipress.errors import ArtifactError
from clipress.models import surgery, vit

EPS = 1e-5  # of every norm, where timm's plain ViTs have 1e-6
DECODER = "decoder_layers"
MAX_LAYERS = 1 << 8
PREPROCESS = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear"}
"""What images become, beside their size, as published."""


class MaskDecoder(nn.Module):
    """Scores of every patch for every class."""

    def __init__(self, width: int, layers: int, heads: int, classes: int) -> None:
        from timm.models.vision_transformer import Block

        super().__init__()
        self.cls_emb = nn.Parameter(torch.randn(1, classes, width) * 0.02)
        self.proj_dec = nn.Linear(width, width)
        norm = partial(nn.LayerNorm, eps=EPS)
        self.blocks = nn.ModuleList(Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(layers))
        self.decoder_norm = norm(width)
        self.proj_patch = nn.Parameter(torch.randn(width, width) * width**-0.5)
        self.proj_classes = nn.Parameter(torch.randn(width, width) * width**-0.5)
        self.mask_norm = norm(classes)

    def forward(self, patches: Tensor) -> Tensor:
        """Score patches [B, N, W]: [B, N, C]."""
        count = patches.shape[1]
        x = torch.cat([self.proj_dec(patches), self.cls_emb.expand(patches.shape[0], -1, -1)], 1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_norm(x)
        patches = F.normalize(x[:, :count] @ self.proj_patch, dim=-1)
        classes = F.normalize(x[:, count:] @ self.proj_classes, dim=-1)
        return self.mask_norm(patches @ classes.transpose(1, 2))


class Segmenter(nn.Module):
    """An encoder of timm's, and a decoder."""

    def __init__(self, encoder: nn.Module, classes: int, layers: int, heads: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = MaskDecoder(encoder.embed_dim, layers, heads, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Score images [B, 3, S, S]: [B, C, rows, columns], one score per patch."""
        features = self.encoder.forward_features(pixels)[:, self.encoder.num_prefix_tokens :]
        scores = self.decoder(features)  # [B, N, C]
        rows, columns = self.encoder.patch_embed.grid_size
        return scores.transpose(1, 2).unflatten(2, (rows, columns))

    def no_weight_decay(self) -> set[str]:
        """Return the last parts of the names of what does not decay, as timm's models do."""
        return {"pos_embed", "cls_token", "cls_emb"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the encoder's activations in the backward pass, or keep them."""
        self.encoder.blocks.recompute = enable


def build(architecture: Mapping[str, Any], seed: int | None = None) -> nn.Module:
    """Build a Segmenter with random weights and our attention. Raises ArtifactError or RecipeError."""
    sizes, labels, layers = _checked(architecture)
    with vit.seeded(seed):
        model = Segmenter(vit.bare(sizes, EPS), len(labels), layers, sizes["num_heads"])
    return surgery.use_own_attention(model)


def _checked(architecture: Mapping[str, Any]) -> tuple[dict[str, int], list[str], int]:
    """Validate an architecture that anyone may have written. Returns the encoder's sizes, the labels and the decoder's layers."""
    sizes, labels, layers = (architecture.get(key) for key in ("sizes", "labels", DECODER))
    if not (isinstance(sizes, dict) and isinstance(labels, list)) or sizes.keys() != vit.SIZES.keys():
        raise ArtifactError(
            f"architecture: expected sizes ({', '.join(vit.SIZES)}), labels and {DECODER} of a Segmenter."
        )
    vit.check_labels(labels)
    for key, value in sizes.items():
        vit.check_size(f"architecture.{key}", value, vit.SIZES[key])
    vit.check_size(f"architecture.{DECODER}", layers, MAX_LAYERS)
    return sizes, labels, layers
