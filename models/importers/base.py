"""The interface of a checkpoint format, and the registry of formats."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from clipress.models.weights_file import State
from clipress.registry import Registry

if TYPE_CHECKING:
    from clipress.models.load import Model


PUBLISHED, FROM_FILE = "as published with {}", "from {}"
UNTOLD, UNTOLD_BY_FOLDER = "CLIP's own, since the files do not say", "its kind's own, since the folder does not say"
"""Where preprocessing comes from."""


class Importer:
    """One format of third-party checkpoints."""

    priority: ClassVar[int] = 0
    """`auto` tries importers in this order, lowest first: specific formats come before general ones."""

    folder_config: ClassVar[str] = ""
    """The file that marks a folder of this format; empty: it has files only."""
    folder_weights: ClassVar[tuple[str, ...]] = ()
    """Names of the weights in such a folder, the first one that exists. `NAME.index.json` lists its shards."""

    def __init__(self, beside: Path | None = None) -> None:
        self.beside = beside
        """The folder of the file, where some formats keep a tokenizer."""

    def recognises(self, state: State) -> bool:
        """Return whether these weights are in this format."""
        raise NotImplementedError

    def model_from_state(self, state: State, model_name: str | None) -> Model:
        """Build the model in fp32. Raises ArtifactError for weights that do not fit, RecipeError for a wrong name."""
        raise NotImplementedError

    def preprocess_source(self, folder: Path | None, model_name: str | None) -> str:
        """Say where the preprocessing of a folder, or of a file and the given model name, comes from, once that was read."""
        import open_clip

        is_published = model_name is not None and open_clip.list_pretrained_tags_by_model(model_name)
        return PUBLISHED.format(model_name) if is_published else UNTOLD

    def model_from_folder(self, folder: Path, state: State) -> Model:
        """Build the model of a folder of this format from its weights and configs. Raises ArtifactError."""
        raise NotImplementedError


IMPORTERS: Registry[type[Importer]] = Registry("importer", "clipress.models.importers")
