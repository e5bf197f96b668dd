"""Import third-party CLIP checkpoints as a `Model` with our attention, or as an artifact.

To add a format: a file in this package with an `Importer`, registered with `@IMPORTERS.register(NAME)`.
"""

from __future__ import annotations

from pathlib import Path

from clipress.artifact import Artifact
from clipress.errors import ArtifactError, RecipeError, nearest
from clipress.models.importers.base import IMPORTERS, Importer
from clipress.models.importers.open_clip import model_from_folder, weights_in
from clipress.models.load import Model, artifact_from_model
from clipress.models.weights_file import State, Which, weights_from_file
from clipress.recipe import digest
from clipress.storage import sha256
from clipress.version import __version__

__all__ = ["IMPORTERS", "Importer", "artifact_from_checkpoint", "detected", "import_checkpoint"]

FOLDER_FORMAT = "open_clip"


def import_checkpoint(path: Path, form: str = "auto", model: str | None = None, which: Which | None = None) -> Model:
    """Read a third-party checkpoint into a CLIP in fp32.

    Args:
        path: a file (.pt, .pth, .bin, .safetensors, a TorchScript archive), or a folder in open_clip's layout.
        form: a name in `IMPORTERS`; `auto` detects the format from the weights.
        model: an open_clip model name, where the file does not determine its architecture.
        which: raw weights or averaged ones; None: raw ones if the file has any.

    Raises:
        ArtifactError: the file is missing, damaged, without weights, of no known format, or its shapes do not fit.
        RecipeError: `form` or `model` is unknown or out of place.
    """
    return _imported(Path(path), form, model, which)[0]


def artifact_from_checkpoint(
    path: Path, form: str = "auto", model: str | None = None, which: Which | None = None
) -> Artifact:
    """Read a third-party checkpoint, as `import_checkpoint` does, into an artifact whose lineage starts with it."""
    path = Path(path)
    imported, used, taken = _imported(path, form, model, which)
    source = weights_in(path) if path.is_dir() else path
    record = {"stage": "import", "kind": "import", "format": used, "model": model, "file": source.name, "taken": taken}
    record |= {"sha256": sha256(source), "versions": {"clipress": __version__}}
    # With other heads, activation or preprocessing, or averaged, the same file is another model.
    record["hash"] = digest(
        "import", record["sha256"], used, taken, imported.architecture, imported.preprocess.model_dump()
    )
    return artifact_from_model(imported, (record,), {})


def detected(state: State) -> str:
    """Return the name of the first importer, by priority, that recognises the weights. Raises ArtifactError if none does."""
    in_order = sorted(IMPORTERS, key=lambda name: IMPORTERS[name].priority)
    for name in in_order:
        if IMPORTERS[name]().recognises(state):
            return name
    raise ArtifactError(
        f"expected one of the formats {', '.join(in_order)}, found none of them in {len(state)} tensors: "
        f"{', '.join(list(state)[:5])}, ..."
    )


def _imported(path: Path, form: str, model: str | None, which: Which | None) -> tuple[Model, str, str]:
    """Return the model, the format it was in, and what was taken of the file."""
    if form != "auto" and form not in IMPORTERS:
        raise RecipeError(f"unknown checkpoint format '{form}'.{nearest(form, IMPORTERS)}")
    try:
        if path.is_dir():
            if form not in ("auto", FOLDER_FORMAT) or model is not None:
                raise RecipeError("a folder is in open_clip's layout and names its model: leave out format and model.")
            weights = weights_from_file(weights_in(path), which)
            return model_from_folder(path, weights.state), FOLDER_FORMAT, weights.described()
        weights = weights_from_file(path, which)
        used = detected(weights.state) if form == "auto" else form
        return IMPORTERS[used]().model_from_state(weights.state, model), used, weights.described()
    except (ArtifactError, RecipeError) as error:
        raise type(error)(f"Checkpoint {path}: {error}") from None
