"""open_clip: training checkpoints, bare state dicts and folders as on the hub. A name or a config tells the architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipress.data.transforms import Preprocess
from clipress.errors import ArtifactError, RecipeError, nearest
from clipress.models.importers import State, weights_from_file
from clipress.models.importers.openai import model_from_weights, root
from clipress.models.load import Model, refuse_absurd
from clipress.storage import read_json

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def recognises(state: State) -> bool:
    """Tell by the names, which are also OpenAI's and CLIP-KD's: what the names do not say must be given."""
    return "logit_scale" in state and any(root(name) == "visual" for name in state)


def clip_from_state(state: State, model_name: str | None) -> Model:
    """Build a model by its open_clip name. Preprocessing is what the name's pretrained tags agree on."""
    import open_clip

    if model_name is None:
        raise ArtifactError(
            "its names are open_clip's, OpenAI's and CLIP-KD's alike, and the weights do not tell the activation. Give "
            "the open_clip model name (such as ViT-B-32), or the format: openai for QuickGELU, clip-kd for GELU."
        )
    if model_name not in open_clip.list_models():
        raise RecipeError(f"open_clip has no model '{model_name}'.{nearest(model_name, open_clip.list_models())}")
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    agreed = _agreed([open_clip.get_pretrained_cfg(model_name, tag) for tag in tags])
    return _clip(open_clip.get_model_config(model_name), state, agreed)


def _agreed(configs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the preprocessing that is the same in all; where they differ, open_clip's default is right most often."""
    first, *others = configs or [{}]
    keys = Preprocess.model_fields.keys() & first.keys() - {"size"}
    return {key: first[key] for key in keys if all(other.get(key) == first[key] for other in others)}


def weights_in(folder: Path) -> Path:
    """Return the weights file of a folder; ArtifactError when it has none."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise ArtifactError(f"the folder has none of {', '.join(WEIGHTS)}; weights are never made up.")


def clip_from_folder(folder: Path) -> Model:
    """Read a folder with open_clip_config.json and weights; no name is needed, nothing is downloaded."""
    try:
        config = read_json(folder / CONFIG)
        architecture, preprocess = config["model_cfg"], config.get("preprocess_cfg") or {}
        towers = [architecture["vision_cfg"], architecture["text_cfg"]]
    except FileNotFoundError:
        raise ArtifactError(f"the folder has no {CONFIG}, which open_clip's layout needs.") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"its {CONFIG} is not readable JSON: {error}.") from None
    except (KeyError, TypeError, AttributeError):
        towers = preprocess = None
    if not all(isinstance(part, dict) for part in (*(towers or [None]), preprocess)):
        raise ArtifactError(f"its {CONFIG} lacks model_cfg with vision_cfg and text_cfg.")
    known = {key: preprocess[key] for key in Preprocess.model_fields.keys() & preprocess.keys() - {"size"}}
    return _clip(architecture, weights_from_file(weights_in(folder)), known)


def _clip(architecture: dict[str, Any], state: State, preprocess: dict[str, Any]) -> Model:
    from open_clip.model import convert_to_custom_text_state_dict

    refuse_absurd(architecture)
    architecture["vision_cfg"].pop("timm_model_pretrained", None)  # a download, to be overwritten at once
    if architecture.get("custom_text"):
        state = convert_to_custom_text_state_dict(dict(state))
    return model_from_weights(architecture, state, preprocess)
