"""MobileCLIP as Apple publishes it: bare weights of S1, S2 and B, trained or folded."""

from __future__ import annotations

from pathlib import Path

import torch

from clipress.errors import RecipeError, nearest
from clipress.models import mobileclip
from clipress.models.importers.base import IMPORTERS, PUBLISHED, Importer
from clipress.models.importers.openai import model_from_weights
from clipress.models.load import Model, agreed_preprocess, build
from clipress.models.open_clip_config import config_named
from clipress.models.weights_file import State


@IMPORTERS.register("mobileclip")
class MobileClip(Importer):
    """Detected by its tensor names; shapes determine the architecture."""

    priority = 15

    def recognises(self, state: State) -> bool:
        return mobileclip.is_apples(state)

    def preprocess_source(self, folder: Path | None, model_name: str | None) -> str:
        return PUBLISHED.format(model_name or "MobileCLIP")

    def model_from_state(self, state: State, model_name: str | None) -> Model:
        """Build the model that the shapes describe, or the named one, with its published preprocessing."""
        import open_clip

        name = model_name or mobileclip.name_from_shapes(state)
        config = config_named(name)
        if config is None:
            raise RecipeError(f"open_clip has no model '{name}'.{nearest(name, open_clip.list_models())}")
        config = mobileclip.with_own_keys(config, state)
        with torch.device("meta"):
            empty = build(config)
        return model_from_weights(config, mobileclip.renamed(state, empty), agreed_preprocess(name))
