"""open_clip: training checkpoints, bare state dicts and hub folders. A model name or a config determines the architecture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from clipress.data import packed_tokenizer
from clipress.data.transforms import Preprocess
from clipress.errors import ArtifactError, RecipeError, nearest
from clipress.models import mobileclip
from clipress.models.importers.base import FROM_FILE, IMPORTERS, UNTOLD, Importer
from clipress.models.importers.openai import model_from_weights, root
from clipress.models.load import Model, agreed_preprocess, refuse_absurd
from clipress.models.open_clip_config import ENCODER, embedding_config, embedding_weights
from clipress.models.weights_file import State
from clipress.storage import read_json

CONFIG = "open_clip_config.json"


@IMPORTERS.register("open_clip")
class OpenClip(Importer):
    """Detected by its tensor names, which OpenAI and CLIP-KD share, so that a model name is required."""

    priority = 50
    folder_config = CONFIG
    folder_weights = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

    def recognises(self, state: State) -> bool:
        return "logit_scale" in state and any(root(name) == "visual" for name in state)

    def model_from_state(self, state: State, model_name: str | None) -> Model:
        """Build a model by its open_clip name. Preprocessing is what the name's pretrained tags agree on."""
        import open_clip

        if model_name is None:
            raise ArtifactError(
                "open_clip, OpenAI and CLIP-KD use the same tensor names, and the weights do not reveal the activation. Pass "
                "the open_clip model name (such as ViT-B-32), or the format: openai for QuickGELU, clip-kd for GELU."
            )
        if model_name not in open_clip.list_models():
            raise RecipeError(f"open_clip has no model '{model_name}'.{nearest(model_name, open_clip.list_models())}")
        return _model(open_clip.get_model_config(model_name), state, agreed_preprocess(model_name))

    def preprocess_source(self, folder: Path | None, model_name: str | None) -> str:
        if folder is None:
            return super().preprocess_source(folder, model_name)
        return FROM_FILE.format(CONFIG) if read_json(folder / CONFIG).get("preprocess_cfg") else UNTOLD

    def model_from_folder(self, folder: Path, state: State) -> Model:
        """Build the model of a folder's open_clip_config.json with the folder's weights; nothing is downloaded."""
        try:
            config = read_json(folder / CONFIG)
            architecture, preprocess = config["model_cfg"], config.get("preprocess_cfg") or {}
            towers = [architecture["vision_cfg"], architecture["text_cfg"]]
        except (OSError, ValueError) as error:
            raise ArtifactError(f"its {CONFIG} is not readable JSON: {error}.") from None
        except (KeyError, TypeError, AttributeError):
            towers = preprocess = None
        if not all(isinstance(part, dict) for part in (*(towers or [None]), preprocess)):
            raise ArtifactError(f"its {CONFIG} lacks model_cfg with vision_cfg and text_cfg.")
        if isinstance(encoder := config.get(ENCODER), dict):
            architecture["text_cfg"]["hf_config"] = encoder
        known = {key: preprocess[key] for key in Preprocess.model_fields.keys() & preprocess.keys() - {"size"}}
        packed = _packed(folder, architecture["text_cfg"])
        model = _model(architecture, state, known)
        return replace(model, tokenizer={**model.tokenizer, **packed})


def _packed(folder: Path, text: dict[str, Any]) -> dict[str, Any]:
    """Return the folder's tokenizer, whose name and cleaning become those of the config; empty for one that is not read."""
    settings, vocabulary = text.get("tokenizer_kwargs") or {}, text.get("hf_config", text).get("vocab_size")
    if not text.get("hf_tokenizer_name") or text.get("tokenizer_mode") or settings.keys() - {"clean"}:
        return {}
    packed = packed_tokenizer.packed_from_folder(folder, int(vocabulary)) if isinstance(vocabulary, int) else {}
    if packed:  # whitespace is what open_clip cleans by default
        text |= {"hf_tokenizer_name": packed_tokenizer.NAME, "tokenizer_kwargs": {"clean": "whitespace", **settings}}
    return packed


def _model(architecture: dict[str, Any], state: State, preprocess: dict[str, Any]) -> Model:
    from open_clip.model import convert_to_custom_text_state_dict

    architecture, state = mobileclip.with_own_keys(embedding_config(architecture), state), embedding_weights(state)
    refuse_absurd(architecture)
    architecture["vision_cfg"].pop(
        "timm_model_pretrained", None
    )  # It would start a download that is overwritten at once.
    if architecture.get("custom_text"):
        state = convert_to_custom_text_state_dict(state)
    return model_from_weights(architecture, state, preprocess, resizes=True)
