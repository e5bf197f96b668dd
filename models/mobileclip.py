"""MobileCLIP's weights: Apple's names, and image towers whose branches have been folded into one convolution each.

Source: Vasu et al., MobileCLIP (2024). Two keys of `vision_cfg` say what open_clip's configs cannot: `reparameterized`, a folded
tower, which has `reparam_conv` where a trained one has several branches with batch norms, and computes the same; and
`apples_vit`, MobileCLIP-B's image tower as Apple trained it, whose first convolution pads by a pixel, where timm's does not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from clipress.errors import ArtifactError, first_line
from clipress.models.weights_file import State

FOLDED, APPLES_VIT = "reparameterized", "apples_vit"
APPLES_EPS = 1e-5  # of every norm in Apple's ViT; timm's have 1e-6
IMAGE, TEXT = "image_encoder.model.", "text_encoder."
TRUNK = "visual.trunk."
PLAIN_STEM = f"{IMAGE}patch_emb."  # of MobileCLIP-B, whose image tower is a ViT
TABLE = f"{TEXT}positional_embedding.pos_embed.pos_embed"
OUTSIDE = {
    f"{TEXT}projection_layer": "text.text_projection",
    f"{TEXT}embedding_layer.weight": "text.token_embedding.weight",
    TABLE: "text.positional_embedding",
    **{f"{TEXT}final_layer_norm.{kind}": f"text.ln_final.{kind}" for kind in ("weight", "bias")},
}
BLOCK = re.compile(rf"{re.escape(TEXT)}transformer\.(\d+)\.(pre_norm_\w+\.\d)\.(.+)")
INSIDE = {
    "pre_norm_mha.0": "ln_1.",
    "pre_norm_mha.1": "attn.",
    "pre_norm_ffn.0": "ln_2.",
    "pre_norm_ffn.1": "mlp.c_fc.",
    "pre_norm_ffn.4": "mlp.c_proj.",
}
STEMS = {(64, 40): "MobileCLIP-S1", (80, 44): "MobileCLIP-S2"}
"""open_clip's names by the width of the stem and the number of blocks."""


def is_apples(state: State) -> bool:
    """Return whether weights have Apple's names."""
    return f"{TEXT}embedding_layer.weight" in state and any(name.startswith(IMAGE) for name in state)


def name_from_shapes(state: State) -> str:
    """Return open_clip's name of the model that Apple's weights belong to. Raises ArtifactError for one that it lacks."""
    if any(name.startswith(PLAIN_STEM) for name in state):
        return "MobileCLIP-B"
    if any(name.startswith(f"{TEXT}transformer.0.token_mixer") for name in state):
        raise ArtifactError(
            "it is a MobileCLIP-S0, whose text tower mixes convolutions and attention, which open_clip does not have. Take "
            "MobileCLIP-S1, or MobileCLIP2-S0 in open_clip's layout."
        )
    kernels = (f"{IMAGE}patch_embed.0.{inside}.weight" for inside in ("rbr_conv.0.conv", "reparam_conv"))
    stem = next((len(state[name]) for name in kernels if name in state), 0)
    numbers = (re.match(rf"{re.escape(IMAGE)}(network\.\d+\.\d+)\.", name) for name in state)
    if known := STEMS.get((stem, len({found[1] for found in numbers if found}))):
        return known
    raise ArtifactError("its image tower is none of MobileCLIP-S1, S2 and B. Pass its open_clip model name.")


def with_own_keys(architecture: Mapping[str, Any], state: State) -> dict[str, Any]:
    """Return an architecture that says whether the image tower of these weights is folded, or Apple's ViT."""
    is_folded = any(".reparam_conv." in name for name in state)
    is_apples_vit = any(name.startswith(PLAIN_STEM) for name in state)
    own = {key: True for key, holds in ((FOLDED, is_folded), (APPLES_VIT, is_apples_vit)) if holds}
    return {**architecture, "vision_cfg": {**architecture["vision_cfg"], **own}}


def own_keys(vision_cfg: Any) -> frozenset[str]:
    """Return the keys of a `vision_cfg` that are not open_clip's."""
    return frozenset(key for key in (FOLDED, APPLES_VIT) if isinstance(vision_cfg, Mapping) and vision_cfg.get(key))


def apply(keys: frozenset[str], model: nn.Module) -> None:
    """Make of open_clip's model what these keys say, in place."""
    trunk = getattr(model.visual, "trunk", None)
    if keys and trunk is None:
        raise ArtifactError(f"vision_cfg: expected a tower of timm with {', '.join(sorted(keys))}, found none.")
    if FOLDED in keys:
        from timm.utils import reparameterize_model

        reparameterize_model(trunk, inplace=True)
    if APPLES_VIT in keys:
        trunk.patch_embed.backbone[0].conv.padding = (1, 1)
        for module in trunk.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = APPLES_EPS


def renamed(state: State, model: nn.Module) -> dict[str, Tensor]:
    """Return Apple's weights in the naming of open_clip's model, which may be on the meta device. Raises ArtifactError."""
    found = {f"{TRUNK}{name}": tensor for name, tensor in _image(state, model.visual.trunk).items()}
    for name, tensor in state.items():
        if block := BLOCK.fullmatch(name):
            number, module, inside = block.groups()
            inside = inside.replace("qkv_proj.", "in_proj_")
            found[f"text.transformer.resblocks.{number}.{INSIDE.get(module, f'{module}.')}{inside}"] = tensor
        elif not name.startswith(IMAGE):
            found[OUTSIDE.get(name, name)] = tensor.flatten(0, -2) if name == TABLE else tensor
    return found


def _image(state: State, trunk: nn.Module) -> dict[str, Tensor]:
    """Return the image tower's weights in timm's naming, which timm knows but for folded towers."""
    from timm.models import fastvit, vision_transformer_hybrid

    image = {name: tensor for name, tensor in state.items() if name.startswith(IMAGE)}
    is_plain = any(name.startswith(PLAIN_STEM) for name in image)
    if not is_plain:
        image = {_unfolded(name.removeprefix(IMAGE)): tensor for name, tensor in image.items()}
    try:
        converted = (vision_transformer_hybrid if is_plain else fastvit).checkpoint_filter_fn(image, trunk)
    except Exception as error:  # It expects its own model, and another can fail anywhere in it.
        raise ArtifactError(f"timm cannot convert its image tower: {first_line(error)}") from None
    # The positions of a folded tower stand where timm takes them for a block.
    return {re.sub(r"\.blocks\.reparam_conv", ".pos_emb.reparam_conv", name): one for name, one in converted.items()}


def _unfolded(name: str) -> str:
    return name.replace("lkb_reparam", "reparam_conv")
