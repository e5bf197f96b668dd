"""open_clip's configs as clipress takes them: the towers that embed, and nothing that would have to be downloaded."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from clipress.models.hf_config import with_config

log = logging.getLogger("clipress.models")
DECODER = "text_decoder."  # CoCa's, which writes captions
ENCODER = "text_config"  # where our open_clip_config.json has the config of an encoder from transformers; open_clip ignores it


def config_named(name: str) -> dict[str, Any] | None:
    """Return the config of an open_clip model name; None if there is none."""
    import open_clip

    config = open_clip.get_model_config(name)
    return None if config is None else embedding_config(config)


def embedding_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without CoCa's decoder, and with the config of a text encoder that it takes from transformers.

    Raises ArtifactError for a text encoder whose config is not known.
    """
    config = copy.deepcopy(dict(config))
    if is_coca(config):
        log.warning("CoCa: the decoder, which writes captions, is left out; its image and its text tower are kept.")
        del config["multimodal_cfg"]
        for tower in ("vision_cfg", "text_cfg"):
            config[tower].pop("output_tokens", None)
    if "hf_model_name" in config["text_cfg"]:
        config["text_cfg"] = with_config(config["text_cfg"])
    return config


def hub_config(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Return an architecture as open_clip_config.json has it: the config of a text encoder stands beside open_clip's own."""
    config = copy.deepcopy(dict(architecture))
    encoder = config["text_cfg"].pop("hf_config", None)
    return {"model_cfg": config, **({} if encoder is None else {ENCODER: encoder})}


def is_coca(config: Mapping[str, Any]) -> bool:
    """Return whether a config is that of a CoCa."""
    return "multimodal_cfg" in config


def embedding_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint's weights without those of CoCa's decoder, and without the counters that transformers once saved."""
    return {
        name: tensor
        for name, tensor in weights.items()
        if not name.startswith(DECODER) and not name.endswith(".position_ids")
    }
