"""open_clip's architectures made small: as they are in kind, with two blocks, narrow, on tiny images, with a reduced vocabulary."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from timm.models.vitamin import VitCfg, VitConvCfg
from torch import nn

from clipress.data import bpe
from clipress.data.vocabulary import CLIP_BPE, reduced
from clipress.models.hf_config import PUBLISHED
from clipress.models.load import Model, model_from_open_clip
from clipress.models.open_clip_config import is_coca

WIDTH, HEADS = 64, 2
KEPT = [*range(766), bpe.SIZE - 2, bpe.SIZE - 1]
"""The tokens that remain of CLIP's: bytes, the first merges, start and end."""
_STEM = VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6)
_NARROW = {"embed_dim": WIDTH, "num_heads": HEADS}
# By the file of timm that a tower comes from: what makes it shallow, what makes it narrow, and the pixels that one token spans.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], int | None]] = {
    "vision_transformer": ({"depth": 2}, _NARROW, None),
    "vision_transformer_hybrid": ({"depth": 2}, {"mlp_ratio": 0.25}, 16),  # The width is that of its stem.
    "vision_transformer_relpos": ({"depth": 2}, {**_NARROW, "rel_pos_dim": 16}, None),
    "eva": ({"depth": 2}, _NARROW, None),
    "vitamin": ({"depth": 2}, {**_NARROW, "embed_cfg": VitCfg((16, 32, WIDTH), (1, 1, 1), 16, _STEM, "1d")}, 16),
    "convnext": ({"depths": (1, 1, 1, 1)}, {"dims": (16, 24, 32, WIDTH)}, 32),
    "fastvit": ({"layers": (1, 1, 1, 1)}, {"embed_dims": (16, 32, 64, 128)}, 32),
    "swin_transformer": ({"depths": (1, 1, 1, 1)}, {"embed_dim": 16, "num_heads": (1, 2, 2, 4)}, 32),
}
KINDS = {
    "vision_transformer": "ViT of timm (SigLIP, SigLIP2, ...)",
    "vision_transformer_hybrid": "MobileCLIP-B",
    "vision_transformer_relpos": "ViT with relative positions",
    "eva": "EVA-01, EVA-02",
    "vitamin": "ViTamin",
    "convnext": "ConvNeXt",
    "fastvit": "MobileCLIP-S (FastViT)",
    "swin_transformer": "Swin",
}
"""What the towers of a file are called in a table."""
FIXED = ("convnext", "fastvit")  # They take images of any size, and no argument that says which.
FIVE_STAGES = ("fastvit_mci3", "fastvit_mci4")
ENCODERS = {
    **dict.fromkeys(("hidden_size", "d_model"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads"), HEADS),
    **dict.fromkeys(("intermediate_size", "d_ff", "encoder_ffn_dim"), 2 * WIDTH),
    **{"vocab_size": len(KEPT), "pad_token_id": 0, "d_kv": 24},
}


def family(name: str) -> str:
    """Return the file of timm that a tower comes from."""
    return timm.models.model_entrypoint(name).__module__.rpartition(".")[2]


def kind_of(config: dict[str, Any]) -> str:
    """Return what kind of model an open_clip config describes, for a table."""
    vision = config["vision_cfg"]
    if "hf_model_name" in config["text_cfg"]:
        return "ViT with a text tower of transformers"
    if is_coca(config):
        return "CoCa"
    if name := vision.get("timm_model_name"):
        return "PE" if "pe_core" in name else KINDS[family(name)]
    return "ResNet" if isinstance(vision["layers"], list) else "ViT"


def small_tower(name: str, pixels: int, narrow: bool) -> dict[str, Any]:
    """Return the arguments that make one of timm's towers small."""
    shallow, narrower, _ = FAMILIES[family(name)]
    found = {**shallow, **(narrower if narrow else {})}
    if name in FIVE_STAGES:
        found = {key: (*values, values[-1]) for key, values in found.items()}
    if family(name) not in FIXED:
        found["img_size"] = pixels
    return {**found, "pretrained_cfg_overlay": {"input_size": (3, pixels, pixels)}}


@contextmanager
def small_towers(pixels: int, narrow: bool = True) -> Iterator[None]:
    """Let timm build its towers small, wherever they are built by name: a model is loaded by the name of its tower."""
    create = timm.create_model

    def create_small(name: str, *args: Any, **named: Any) -> nn.Module:
        return create(name, *args, **{**named, **small_tower(name, pixels, narrow)})

    timm.create_model = create_small
    try:
        yield
    finally:
        timm.create_model = create


def small_config(name: str, narrow: bool = True) -> dict[str, Any]:
    """Return the open_clip config of an architecture made small."""
    config = copy.deepcopy(open_clip.get_model_config(name))
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" in vision:
        span = FAMILIES[family(vision["timm_model_name"])][2] or _patch(vision["timm_model_name"])
        vision["image_size"] = {16: 48, 32: 96}.get(span, 3 * span)
        narrow = narrow and family(vision["timm_model_name"]) != "vision_transformer_hybrid"
    elif isinstance(vision["layers"], list):
        vision |= {"layers": [1, 1, 1, 1], "image_size": 64, **({"width": 8} if narrow else {})}
    else:
        vision |= {"layers": 2, "image_size": 3 * vision["patch_size"]}
        vision |= {"width": WIDTH, "head_width": WIDTH // HEADS} if narrow else {}
    if vision.get("attentional_pool"):
        vision["attn_pooler_queries"] = 4
    if "hf_model_name" in text:
        encoder = PUBLISHED[text["hf_model_name"]]
        text["hf_config"] = {**encoder, **{key: size for key, size in ENCODERS.items() if key in encoder}}
    else:
        text |= {"layers": 2, "vocab_size": len(KEPT), **({"width": WIDTH, "heads": HEADS} if narrow else {})}
        text |= {"eos_id": len(KEPT) - 1} if "eos_id" in text else {}
    if narrow:
        config["embed_dim"] = WIDTH
    return config


def _patch(name: str) -> int:
    return next(int(part.removeprefix("patch")) for part in name.split("_") if part.startswith("patch"))


def registered(name: str, folder: Path, narrow: bool = True) -> str:
    """Register a small architecture with open_clip. Returns its name."""
    small = f"small-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{small}.json").write_text(json.dumps(small_config(name, narrow)), encoding="utf-8")
    open_clip.add_model_config(folder / f"{small}.json")
    return small


def loaded(small: str) -> Model:
    """Load a small model as a teacher is loaded, with random weights, and with CLIP's tokenizer, reduced."""
    model = model_from_open_clip(small, "random")
    stir(model.module)
    tokenizer = {"name": CLIP_BPE, "context_length": model.tokenizer["context_length"], "kwargs": {}}
    return replace(model, tokenizer=reduced(tokenizer, KEPT))


def stir(module: nn.Module) -> None:
    """Give values to what starts as zeros, ones or nearly nothing: biases, gains, layer scales, statistics."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point() and tensor.ndim and (tensor.ndim == 1 or tensor.std() < 1e-3):
                noise = torch.randn(tensor.shape, generator=generator)
                tensor += 0.1 * (noise.abs() if "running_var" in name else noise)
