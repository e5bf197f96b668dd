"""The folder of Hugging Face transformers' CLIPModel or SiglipModel: config.json, model.safetensors, preprocessing and
tokenizer.

Their modules hold open_clip's plain ViT and causal text tower, and SigLIP's towers, uncut, in float32. Any other CLIP is
written as ONNX files with the same JSON files beside them, as optimum has it, so that no code of ours has to be trusted.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from open_clip.model import CLIPTextCfg, CLIPVisionCfg

from clipress.export.layouts import LAYOUTS, LayoutJob
from clipress.export.layouts.hub_files import image_processor, write_json
from clipress.export.layouts.tokenizer_files import write_tokenizer
from clipress.export.layouts.transformers_js import write as write_onnx
from clipress.models import surgery
from clipress.models.importers import siglip
from clipress.models.importers.transformers import their_names
from clipress.models.load import Model, build
from clipress.models.weightless import build_weightless
from clipress.tasks import model_from_artifact

EPS = 1e-5
log = logging.getLogger("clipress.export")
KNOWN = {
    "": {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"},
    "vision_cfg": {"image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio", "norm_kwargs"},
    "text_cfg": {
        *("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "norm_kwargs"),
        *("pool_type", "eos_id"),
    },
}
"""Keys of open_clip's config that a CLIPModel's config can say."""


@LAYOUTS.register("transformers")
def write(job: LayoutJob, folder: Path) -> None:
    """Write the artifact as a CLIPModel or SiglipModel, or as ONNX files if it is neither."""
    from safetensors.torch import save_file

    exported, model = job.clip("transformers"), model_from_artifact(job.artifact)
    known = None if model.quantization else siglip.config_of(model.module)
    if known is None and (reason := _why_not(model)):
        log.warning(
            "%s is no CLIPModel or SiglipModel, since %s. It is written as ONNX files.", job.artifact.name, reason
        )
        write_onnx(job, folder)
        return
    stock = surgery.stock_weights(model.module)
    if known is None:
        config, weights = _config(model.architecture), their_names(stock)
    else:
        config, weights = _siglip_config(known), siglip.their_names(stock)
    write_tokenizer(exported, folder)
    write_json(folder / "preprocessor_config.json", image_processor(model.preprocess))
    write_json(folder / "config.json", config)
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def _why_not(model: Model) -> str | None:
    """Return why a CLIPModel cannot hold a model that is no SiglipModel; None if it can."""
    if model.quantization:
        return "it is INT8"
    architecture = model.architecture
    if surgery.shapes(model.module) != surgery.shapes(build_weightless(lambda: build(architecture))):
        return "it is cut"
    strange = [
        key for part, keys in KNOWN.items() for key in (architecture[part] if part else architecture).keys() - keys
    ]
    pool = architecture["text_cfg"].get("pool_type", "argmax")
    if strange:
        return f"its config has {', '.join(sorted(strange))}"
    return None if pool in ("argmax", "eos") else f"its texts are pooled by {pool}"


def _siglip_config(known: siglip.Config) -> dict[str, Any]:
    """Return config.json of a SiglipModel."""
    sides = {
        name: {"model_type": f"siglip_{name.replace('config', 'model')}", **tower}
        for name, tower in known.model_dump().items()
    }
    return {"architectures": ["SiglipModel"], "model_type": "siglip", **sides, "torch_dtype": "float32"}


def _config(architecture: dict[str, Any]) -> dict[str, Any]:
    """Return config.json of an open_clip config."""
    act = "quick_gelu" if architecture.get("quick_gelu") else "gelu"
    vision, text = architecture["vision_cfg"], architecture["text_cfg"]

    def tower(given: dict[str, Any], default: Any, heads: int) -> dict[str, Any]:
        width = given.get("width", default.width)
        return {
            "hidden_size": width,
            "intermediate_size": int(width * given.get("mlp_ratio", default.mlp_ratio)),
            "num_hidden_layers": given.get("layers", default.layers),
            "num_attention_heads": heads,
            "hidden_act": act,
            "layer_norm_eps": (given.get("norm_kwargs") or {}).get("eps", EPS),
            "projection_dim": architecture["embed_dim"],
        }

    heads = vision.get("width", CLIPVisionCfg.width) // vision.get("head_width", CLIPVisionCfg.head_width)
    size = {key: vision.get(key, getattr(CLIPVisionCfg, key)) for key in ("image_size", "patch_size")}
    vocabulary = text.get("vocab_size", CLIPTextCfg.vocab_size)
    end = text["eos_id"] if text.get("pool_type") == "eos" else vocabulary - 1
    words = {
        "vocab_size": vocabulary,
        "max_position_embeddings": text.get("context_length", CLIPTextCfg.context_length),
        **{"bos_token_id": vocabulary - 2, "eos_token_id": end, "pad_token_id": 0},
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": architecture["embed_dim"],
        "vision_config": {"model_type": "clip_vision_model", **size, **tower(vision, CLIPVisionCfg, heads)},
        "text_config": {
            "model_type": "clip_text_model",
            **words,
            **tower(text, CLIPTextCfg, text.get("heads", CLIPTextCfg.heads)),
        },
        "torch_dtype": "float32",
    }
