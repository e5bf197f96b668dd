"""timm's plain vision transformers: with a head for classes, by name or by sizes, or bare, as the towers of larger models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clipress.errors import ArtifactError, RecipeError, nearest
from clipress.models import owners, surgery

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

    with seeded(seed), _building(name, sizes):
        if name == OWN:
            module = VisionTransformer(num_classes=len(labels), **sizes)
        else:
            module = timm.create_model(name, pretrained=False, num_classes=len(labels), **sizes)
    if type(module) is not VisionTransformer:
        raise RecipeError(
            f"student.model: expected a plain ViT from timm, found {name}, a {type(module).__name__}. Use a model such as "
            "deit_tiny_patch16_224."
        )
    return module


def bare(sizes: Mapping[str, int], eps: float) -> nn.Module:
    """Build a ViT without a head, whose norms have the given epsilon. Raises RecipeError."""
    from timm.models.vision_transformer import VisionTransformer

    with _building("a vision transformer", sizes):
        model = VisionTransformer(num_classes=0, global_pool="", norm_layer=partial(nn.LayerNorm, eps=eps), **sizes)
    model.blocks = Blocks(*model.blocks)
    return model


class Blocks(nn.Sequential):
    """Blocks whose activations are recomputed in the backward pass if `recompute` is set.

    timm's own checkpointing does not know whose rows it recomputes.
    """

    recompute = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = owners.checkpoint(block, x) if self.recompute else block(x)
        return x


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draw random weights from a seed, or without one from the state of the generator, which stays as it is."""
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        yield


@contextmanager
def _building(what: str, sizes: Mapping[str, int]) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise RecipeError(f"timm cannot build {what} with {sizes}: {error}") from None


def check_size(name: str, value: Any, most: int, least: int = 1) -> None:
    """Raise ArtifactError for a size that is no integer or out of bounds; `name` says where it is."""
    if not isinstance(value, int) or not least <= value <= most:
        raise ArtifactError(f"{name}: expected {least} to {most:,}, found {value!r:.40}.")


def check_labels(labels: list[Any]) -> None:
    """Raise ArtifactError for too many labels, none, or other things than names."""
    if not 1 <= len(labels) <= MAX_CLASSES or not all(isinstance(label, str) for label in labels):
        raise ArtifactError(f"architecture.labels: expected 1 to {MAX_CLASSES:,} names, found {len(labels):,} entries.")


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
    check_labels(labels)
    for key, value in sizes.items():
        if key not in SIZES:
            raise ArtifactError(f"architecture.sizes.{key}: expected one of {', '.join(SIZES)}, found {value!r:.40}.")
        check_size(f"architecture.sizes.{key}", value, SIZES[key])
    if name != OWN:
        check_name(name, "architecture")
    return name, sizes, labels
