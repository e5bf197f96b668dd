"""Hugging Face transformers: folders of a CLIPModel, SiglipModel, Siglip2Model, ChineseCLIPModel or AltCLIPModel; config.json says everything.

They may be inside a sentence-transformers folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from clipress.data import packed_tokenizer
from clipress.data.bpe import SPECIAL, ClipBpe
from clipress.errors import ArtifactError
from clipress.models.importers import bert_clip, siglip
from clipress.models.importers.base import FROM_FILE, IMPORTERS, UNTOLD_BY_FOLDER, Importer
from clipress.models.importers.openai import model_from_weights
from clipress.models.load import Model
from clipress.models.weights_file import State
from clipress.recipe import first_problem
from clipress.storage import read_json

TEXT, VISION = "text_model.", "vision_model."
OUTSIDE = {
    "logit_scale": "logit_scale",
    f"{TEXT}embeddings.token_embedding.weight": "token_embedding.weight",
    f"{TEXT}embeddings.position_embedding.weight": "positional_embedding",
    f"{TEXT}final_layer_norm.weight": "ln_final.weight",
    f"{TEXT}final_layer_norm.bias": "ln_final.bias",
    f"{VISION}embeddings.class_embedding": "visual.class_embedding",
    f"{VISION}embeddings.patch_embedding.weight": "visual.conv1.weight",
    f"{VISION}embeddings.position_embedding.weight": "visual.positional_embedding",
    **{f"{VISION}pre_layrnorm.{kind}": f"visual.ln_pre.{kind}" for kind in ("weight", "bias")},  # so spelled there
    **{f"{VISION}post_layernorm.{kind}": f"visual.ln_post.{kind}" for kind in ("weight", "bias")},
}
PROJECTIONS = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
INSIDE = {
    **{"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2"},
    **{"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"},
}
BLOCKS = {
    f"{TEXT}encoder.layers.": "transformer.resblocks.",
    f"{VISION}encoder.layers.": "visual.transformer.resblocks.",
}
SPECIAL_THERE = ("<|startoftext|>", "<|endoftext|>")
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
ARGMAX = 2  # an eos_token_id that transformers reads as: pool at the largest id


class _Tower(BaseModel):
    """The settings of either tower; transformers leaves some out where they have the default."""

    hidden_size: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def shared(self) -> dict[str, Any]:
        """Return the keys that both towers have in open_clip's config."""
        ratio = self.intermediate_size / self.hidden_size
        norm = {} if self.layer_norm_eps == 1e-5 else {"norm_kwargs": {"eps": self.layer_norm_eps}}
        return {"width": self.hidden_size, "layers": self.num_hidden_layers, "mlp_ratio": ratio, **norm}


class _Vision(_Tower):
    hidden_size: int = Field(768, ge=1)
    intermediate_size: int = Field(3072, ge=1)
    num_hidden_layers: int = Field(12, ge=1)
    num_attention_heads: int = Field(12, ge=1)
    image_size: int = Field(224, ge=1)
    patch_size: int = Field(32, ge=1)


class _Text(_Tower):
    hidden_size: int = Field(512, ge=1)
    intermediate_size: int = Field(2048, ge=1)
    num_hidden_layers: int = Field(12, ge=1)
    num_attention_heads: int = Field(8, ge=1)
    vocab_size: int = Field(49408, ge=1)
    max_position_embeddings: int = Field(77, ge=1)
    eos_token_id: int = 49407


class _Config(BaseModel):
    projection_dim: int = Field(512, ge=1)
    vision_config: _Vision = _Vision()
    text_config: _Text = _Text()


class _Chinese(BaseModel):
    projection_dim: int = Field(512, ge=1)
    vision_config: _Vision = _Vision()
    text_config: bert_clip.BertText = bert_clip.BertText()


class _Alt(BaseModel):
    projection_dim: int = Field(768, ge=1)
    vision_config: _Vision = _Vision()
    text_config: bert_clip.XlmText = bert_clip.XlmText()


KINDS = {"clip": _Config, "siglip": siglip.Config, "siglip2": siglip.Config, "chinese_clip": _Chinese, "altclip": _Alt}
"""The settings of each model_type."""
WORD_TABLES = ("token_embedding", "word_embeddings")


@IMPORTERS.register("transformers")
class Transformers(Importer):
    """Detected by its tensor names in a file, which alone do not tell heads and activation, and by config.json in a folder."""

    priority = 45
    folder_config = "config.json"
    folder_weights = ("model.safetensors", "pytorch_model.bin")

    def recognises(self, state: State) -> bool:
        names = (f"{TEXT}{inside}embeddings.{table}.weight" for inside in ("", "roberta.") for table in WORD_TABLES)
        return any(name in state for name in names)

    def model_from_state(self, state: State, model_name: str | None) -> Model:
        """Refuse a file without its folder: raises ArtifactError."""
        raise ArtifactError(
            "these are weights of Hugging Face transformers, which do not tell heads and activation. Import the folder that "
            "also holds config.json and preprocessor_config.json."
        )

    def preprocess_source(self, folder: Path | None, model_name: str | None) -> str:
        found = next((name for name in PROCESSORS if folder is not None and (folder / name).is_file()), None)
        source = FROM_FILE.format(found) if found else UNTOLD_BY_FOLDER
        if folder is not None and _read(folder / self.folder_config).get("model_type") == "siglip2":
            return f"{source}, but stretched to one square size, where NaFlex keeps an image's shape"
        return source

    def model_from_folder(self, folder: Path, state: State) -> Model:
        """Build the model that config.json describes, with the folder's preprocessing and tokenizer. Raises ArtifactError."""
        raw = _read(folder / self.folder_config)
        kind = raw.get("model_type")
        if kind not in KINDS:
            raise ArtifactError(
                f"expected a model_type of {', '.join(KINDS)}, found {kind!r:.50}, which is not read yet."
            )
        is_siglip = kind in ("siglip", "siglip2")
        if kind == "siglip2":
            raw, state = siglip.as_square(raw, state)
        try:
            config = KINDS[kind].model_validate(raw)
        except ValidationError as error:
            raise ArtifactError(f"its {self.folder_config}, {first_problem(error)}.") from None
        preprocess, packed = _preprocess(folder, crops=not is_siglip), dict[str, Any]()
        if is_siglip:
            packed = packed_tokenizer.packed_from_folder(folder, config.text_config.vocab_size)
            described, weights = siglip.architecture(config, bool(packed)), siglip.renamed(state)
            preprocess = siglip.HALF | ({"interpolation": "bilinear"} if kind == "siglip2" else {}) | preprocess
        elif kind == "clip":
            packed = _other_tokenizer(folder, config.text_config.vocab_size)
            described, weights = _architecture(config), renamed(state)
            described["text_cfg"] |= {"hf_tokenizer_name": packed_tokenizer.NAME} if packed else {}
        else:
            words, packed = bert_clip.text_config(config.text_config, folder)
            described = {**_image_architecture(config), "text_cfg": words, "custom_text": True}
            weights = renamed(bert_clip.renamed(kind, state))
        model = model_from_weights(described, weights, preprocess)
        return replace(model, tokenizer={**model.tokenizer, **packed})


def _image_architecture(config: _Config | _Chinese | _Alt) -> dict[str, Any]:
    """Return open_clip's config without the text tower."""
    vision = config.vision_config
    if vision.hidden_size % vision.num_attention_heads:
        raise ArtifactError(f"{vision.num_attention_heads} heads do not divide a width of {vision.hidden_size}.")
    image = {"image_size": vision.image_size, "patch_size": vision.patch_size}
    return {
        "embed_dim": config.projection_dim,
        "vision_cfg": {**image, "head_width": vision.hidden_size // vision.num_attention_heads, **vision.shared()},
        "quick_gelu": vision.hidden_act == "quick_gelu",
    }


def _architecture(config: _Config) -> dict[str, Any]:
    vision, text = config.vision_config, config.text_config
    if vision.hidden_act != text.hidden_act:
        raise ArtifactError(f"its towers have different activations, {vision.hidden_act} and {text.hidden_act}.")
    words = {
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "heads": text.num_attention_heads,
    }
    if text.eos_token_id not in (ARGMAX, text.vocab_size - 1):
        words |= {"pool_type": "eos", "eos_id": text.eos_token_id}
    return {**_image_architecture(config), "text_cfg": {**words, **text.shared()}}


def renamed(state: State) -> dict[str, Tensor]:
    """Return a CLIPModel's weights in open_clip's naming; tensors that are none of its keep their names."""
    found, parts = dict[str, Tensor](), dict[str, dict[str, Tensor]]()
    for name, tensor in state.items():
        block = next((prefix for prefix in BLOCKS if name.startswith(prefix)), None)
        if name in PROJECTIONS:
            found[PROJECTIONS[name]] = tensor.T
        elif block is None:
            found[OUTSIDE.get(name, name)] = tensor
        else:
            number, _, inside = name.removeprefix(block).partition(".")
            at, (module, _, kind) = f"{BLOCKS[block]}{number}.", inside.rpartition(".")
            if module in siglip.QKV:
                parts.setdefault(f"{at}attn.in_proj_{kind}", {})[module] = tensor
            else:
                found[f"{at}{INSIDE.get(module, module)}.{kind}"] = tensor
    return found | siglip.joined_qkv(parts)


def their_names(weights: State) -> dict[str, Tensor]:
    """Return weights in open_clip's naming in a CLIPModel's; the inverse of `renamed`."""
    outside = {ours: theirs for theirs, ours in OUTSIDE.items()}
    projections = {ours: theirs for theirs, ours in PROJECTIONS.items()}
    inside = {ours: theirs for theirs, ours in INSIDE.items()}
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        block = next((theirs for theirs, ours in BLOCKS.items() if name.startswith(ours)), None)
        if name in projections:
            found[projections[name]] = tensor.T
        elif block is None:
            found[outside.get(name, name)] = tensor
        else:
            number, _, within = name.removeprefix(BLOCKS[block]).partition(".")
            if within.startswith("attn.in_proj_"):
                kind = within.removeprefix("attn.in_proj_")
                names = (f"{block}{number}.self_attn.{letter}_proj.{kind}" for letter in "qkv")
                found |= dict(zip(names, tensor.chunk(3), strict=True))
            else:
                module, _, kind = within.rpartition(".")
                found[f"{block}{number}.{inside.get(module, module)}.{kind}"] = tensor
    return found


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"its {path.name} is not readable JSON: {error}.") from None
    if not isinstance(found, Mapping):
        raise ArtifactError(f"its {path.name}: expected a mapping, found {type(found).__name__}.")
    return found


def _preprocess(folder: Path, crops: bool = True) -> dict[str, Any]:
    """Return the folder's preprocessing in open_clip's words; empty where it has none. `crops`: what its class does by default."""
    for name in PROCESSORS:
        if (folder / name).is_file():
            given = _read(folder / name)
            given = given.get("image_processor", given)
            break
    else:
        return {}
    if not isinstance(given, Mapping):
        raise ArtifactError(f"its {name}: expected a mapping, found {type(given).__name__}.")
    # A size of both sides is stretched to.
    crops = given.get("do_center_crop", crops) and "height" not in (given.get("size") or ())
    crop, short = _side(given.get("crop_size")), _side(given.get("size"))
    found = {
        "crop_pct": crop / short if crops and crop and short and crop <= short else None,
        "mean": given.get("image_mean") if given.get("do_normalize", True) else [0.0] * 3,
        "std": given.get("image_std") if given.get("do_normalize", True) else [1.0] * 3,
        "interpolation": RESAMPLE.get(given.get("resample", 3), given.get("resample")),
        "resize_mode": "shortest" if crops else "squash",
    }
    return {key: value for key, value in found.items() if value is not None}


def _side(size: Any) -> int | None:
    """Return the pixels of a size in preprocessor_config.json: a number, a short side, or a square."""
    if isinstance(size, Mapping):
        size = size.get("shortest_edge", size.get("height"))
    return size if isinstance(size, int) and size > 0 else None


def _other_tokenizer(folder: Path, vocabulary: int) -> dict[str, Any]:
    """Return a folder's tokenizer where it is not CLIP's own, which one without a tokenizer gets.

    Raises ArtifactError for another one that cannot be read.
    """
    there = dict(zip(SPECIAL, SPECIAL_THERE, strict=True))
    own = {there.get(token, token): number for token, number in ClipBpe().token_ids.items()}
    for name in ("tokenizer.json", "vocab.json"):
        if not (folder / name).is_file():
            continue
        found = _read(folder / name)
        model = found.get("model") if name == "tokenizer.json" else {"vocab": found}
        if (model.get("vocab") if isinstance(model, Mapping) else None) == own:
            return {}
        if name == "tokenizer.json" and (packed := packed_tokenizer.packed_from_folder(folder, vocabulary)):
            return packed
        raise ArtifactError(
            f"its {name} is not CLIP's vocabulary of {len(own):,} tokens. Another tokenizer is read from a tokenizer.json with a "
            "pad_token beside it in tokenizer_config.json."
        )
    return {}
