"""DeiT: plain ViT classifiers in timm's naming, as DeiT and timm publish them, and UPop's compressed ones.

Blocks may be slimmed: every head of a layer keeps the same k dims; the rows are q, k, v, each head after head. The softmax scale
stays that of 64 dims, which UPop's ViTs compute with. Source: UPop (Shi et al. 2023), `deit/`.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import nn

from clipress.data.prompts import read_classes
from clipress.data.transforms import Preprocess
from clipress.errors import ArtifactError
from clipress.models import surgery, vit
from clipress.models.importers.base import IMPORTERS, Importer
from clipress.models.importers.openai import (
    HEAD,
    count_of,
    grid_of,
    head_dim_of,
    heads_of,
    module_from_weights,
    refuse_name,
    shape,
)
from clipress.models.load import Model
from clipress.models.weights_file import State

BLOCKS = "blocks."
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "crop_pct": 0.875}
"""DeiT's preprocessing: bicubic to 256 pixels, of which 224 are cropped. timm's own for the same files keeps 0.9."""
MASK = re.compile(r"\balpha\b")


@IMPORTERS.register("deit")
class Deit(Importer):
    """Recognised by a class token, blocks with one qkv, and a head, at the top level."""

    priority = 35

    def recognises(self, state: State) -> bool:
        return {"cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "head.weight"} <= state.keys()

    def preprocess_source(self, folder: Path | None, model_name: str | None) -> str:
        return "DeiT's, since the file does not say"

    def model_from_state(self, state: State, model_name: str | None) -> Model:
        """Build the classifier, slim or dense, that computes what the published code computes from this file."""
        refuse_name(model_name)
        if "dist_token" in state:
            raise ArtifactError(
                "a distilled DeiT, with a second token and head, which clipress does not have. Use the plain one."
            )
        weights = {name: tensor for name, tensor in state.items() if not MASK.search(name)}
        sizes, labels = sizes_of(weights, ""), labels_for(shape(weights, "head.weight", 2)[0], "imagenet")
        architecture = {"timm_model": vit.OWN, "sizes": sizes, "labels": labels}
        blocks = (f"{BLOCKS}{number}" for number in range(sizes["depth"]))
        shapes = {block: shape_of(weights, block, sizes["num_heads"]) for block in blocks}

        def made() -> nn.Module:
            return surgery.reshape(vit.build(architecture), shapes)

        module = module_from_weights(made, weights)
        return Model(module, architecture, Preprocess(size=sizes["img_size"], **IMAGENET), None, task="classification")


def labels_for(classes: int, known: str) -> list[str]:
    """Return the names of a known list for as many classes as it has, and numbers for others: a file does not name them."""
    names = list(read_classes(Path(known)).names)
    return names if classes == len(names) else [str(number) for number in range(classes)]


def sizes_of(weights: State, prefix: str) -> dict[str, int]:
    """Return the sizes of a ViT that is under a prefix, in timm's words; heads are 64 wide."""
    width, _, patch, _ = shape(weights, f"{prefix}patch_embed.proj.weight", 4)
    return {
        "img_size": grid_of(weights, f"{prefix}pos_embed", 3) * patch,
        "patch_size": patch,
        "embed_dim": width,
        "depth": count_of(weights, f"{prefix}{BLOCKS}"),
        "num_heads": heads_of(f"{prefix}patch_embed.proj.weight", width),
    }


def shape_of(weights: State, block: str, heads: int) -> dict[str, float]:
    """Return the shapes of a block's parts, whose softmax scale is that of 64 dims."""
    dim, ffn = head_dim_of(weights, f"{block}.attn.qkv.weight", heads), shape(weights, f"{block}.mlp.fc1.weight", 2)[0]
    return {"heads": heads, "qk_dim": dim, "v_dim": dim, "scale": HEAD**-0.5, "ffn": ffn}
