"""A plain vision transformer with a head for classes, by its name in timm or by its sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from clipress.errors import ArtifactError, RecipeError, nearest
from clipress.models import surgery

SIZES = {"img_size": 1 << 13, "patch_size": 1 << 13, "embed_dim": 1 << 14, "depth": 1 << 8, "num_heads": 1 << 10}
MAX_CLASSES = 1 << 20
OWN = "vit"  # the architecture's `timm_model` of a ViT that is described by its sizes


def build(architecture: Mapping[str, Any], seed: int | None = None) -> nn.Module:
    """Build a ViT with random weights and our attention. Raises ArtifactError or RecipeError."""
    return surgery.use_own_attention(build_stock(architecture, seed))


def build_stock(architecture: Mapping[str, Any], seed: int | None) -> nn.Module:
    """Build timm's model of an architecture that anyone may have written, with random weights."""
    name, sizes, labels = _checked(architecture)
    import timm
    from timm.models.vision_transformer import VisionTransformer

    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            if name == OWN:
                module = VisionTransformer(num_classes=len(labels), **sizes)
            else:
                module = timm.create_model(name, pretrained=False, num_classes=len(labels), **sizes)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise RecipeError(f"timm cannot build {name} with {sizes}: {error}") from None
    if type(module) is not VisionTransformer:
        raise RecipeError(
            f"student.model: expected a plain ViT from timm, found {name}, a {type(module).__name__}. Use a model such as "
            "deit_tiny_patch16_224."
        )
    return module


def check_name(name: str, where: str) -> None:
    """Raise RecipeError for a name that timm has no vision transformer of; `where` begins the message."""
    import timm

    known = [one for module in ("vision_transformer", "deit") for one in timm.list_models(module=module)]
    if name not in known:
        raise RecipeError(f"{where}: timm has no vision transformer '{name}'.{nearest(name, known)}")


def _checked(architecture: Mapping[str, Any]) -> tuple[str, dict[str, int], list[str]]:
    """Validate an untrusted architecture. Returns timm's name, its sizes and the labels."""
    name, sizes, labels = (architecture.get(key) for key in ("timm_model", "sizes", "labels"))
    if not (isinstance(name, str) and isinstance(sizes, dict) and isinstance(labels, list)):
        raise ArtifactError("architecture: expected timm_model, sizes and labels of a classifier.")
    if not 1 <= len(labels) <= MAX_CLASSES or not all(isinstance(label, str) for label in labels):
        raise ArtifactError(f"architecture.labels: expected 1 to {MAX_CLASSES:,} names, found {len(labels):,} entries.")
    for key, value in sizes.items():
        if key not in SIZES or not isinstance(value, int) or not 1 <= value <= SIZES[key]:
            expected = f"1 to {SIZES[key]:,}" if key in SIZES else f"one of {', '.join(SIZES)}"
            raise ArtifactError(f"architecture.sizes.{key}: expected {expected}, found {value!r:.40}.")
    if name != OWN:
        check_name(name, "architecture")
    return name, sizes, labels
