"""Import third-party CLIP checkpoints as a `Model` with our attention, or as an artifact.

To add a format: a file in this package with an `Importer`, registered with `@IMPORTERS.register(NAME)`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clipress.artifact import Artifact
from clipress.errors import ArtifactError, RecipeError, nearest
from clipress.models.importers import lora
from clipress.models.importers.base import IMPORTERS, UNTOLD, UNTOLD_BY_FOLDER, Importer
from clipress.models.load import Model, artifact_from_model, model_from_open_clip
from clipress.models.weights_file import State, Which, weights_from_file, weights_from_files
from clipress.recipe import digest
from clipress.storage import read_json, sha256
from clipress.version import __version__

__all__ = [
    "IMPORTERS",
    "Importer",
    "artifact_from_checkpoint",
    "detected",
    "import_checkpoint",
    "local_folder",
    "model_named",
]

LOCAL = "local-dir:"  # open_clip's own way to name a folder
log = logging.getLogger("clipress.models")
INSIDE = "0_CLIPModel"  # where sentence-transformers keeps a CLIP


@dataclass(frozen=True)
class _Imported:
    """A model and where it comes from."""

    model: Model
    form: str
    """The format it was in."""
    taken: str
    """What was taken out of the files, if not all."""
    files: list[Path]
    preprocess: str
    """Where the preprocessing comes from."""
    lineage: tuple[Mapping[str, Any], ...] = ()
    """What was done before, if it was an artifact."""


def import_checkpoint(
    path: Path, form: str = "auto", model: str | None = None, which: Which | None = None, base: Path | None = None
) -> Model:
    """Read a third-party checkpoint into a CLIP in fp32.

    Args:
        path: a file (.pt, .pth, .bin, .safetensors, a TorchScript archive), or a folder of open_clip's, of transformers'
            or of sentence-transformers, or one with an adapter of PEFT. Weights named as in such a folder are read
            with the config beside them.
        form: a name in `IMPORTERS`; `auto` detects the format from the weights.
        model: an open_clip model name, where the file does not determine its architecture; of a pretrained BLIP, a task.
        which: raw weights or averaged ones; None: raw ones if the file has any.
        base: of an adapter, the folder or artifact that it is merged into; None: the folder that the adapter names.

    Raises:
        ArtifactError: the file is missing, damaged, without weights, of no known format, or its shapes do not fit.
        RecipeError: `form` or `model` is unknown or out of place.
    """
    return _imported(Path(path), form, model, which, base).model


def local_folder(name: str | None) -> Path | None:
    """Return the folder of a model name `local-dir:FOLDER`; None for any other name."""
    return Path(name.removeprefix(LOCAL)) if name is not None and name.startswith(LOCAL) else None


def model_named(name: str, checkpoint: str | None, where: str, which: Which | None = None) -> Model:
    """Load the model of a recipe: an open_clip name with a checkpoint, or `local-dir:FOLDER`, which needs none.

    Such a folder may be in any format that `import_checkpoint` reads. `where` begins messages, `which` chooses raw or averaged
    weights.
    """
    folder = local_folder(name)
    if folder is None:
        return model_from_open_clip(name, checkpoint, where, which)
    if checkpoint is not None:
        raise RecipeError(f"{where}: {name} holds its own weights, found checkpoint '{checkpoint}'. Leave it out.")
    if not folder.is_dir():
        raise ArtifactError(f"{where}: expected a folder at {folder}, found none. Check the path in '{name}'.")
    if lora.is_adapter(folder):  # A run is known by the files that it starts from, and the base is elsewhere.
        raise RecipeError(f"{where}: {folder} holds an adapter. Run `clipress import` first, and use that artifact.")
    found = _imported(folder, "auto", None, which, None)
    if found.preprocess.startswith((UNTOLD, UNTOLD_BY_FOLDER)):
        log.warning(
            "%s: preprocessing is %s. If yours differs, add it to the folder's config.", where, found.preprocess
        )
    return found.model


def artifact_from_checkpoint(
    path: Path, form: str = "auto", model: str | None = None, which: Which | None = None, base: Path | None = None
) -> Artifact:
    """Read a third-party checkpoint, as `import_checkpoint` does, into an artifact whose lineage starts with it.

    An adapter's artifact goes on with the lineage of its base, if that is one.
    """
    found = _imported(Path(path), form, model, which, base)
    hashes, architecture = [sha256(file) for file in found.files], found.model.architecture
    record = {
        "stage": "import",
        "kind": "import",
        "format": found.form,
        "model": model,
        "file": ", ".join(file.name for file in found.files),
        "taken": found.taken,
        "preprocess": found.preprocess,
    }
    record |= {"sha256": hashes[0] if len(hashes) == 1 else digest(*hashes), "versions": {"clipress": __version__}}
    # With other heads, activation, tokenizer or preprocessing, or averaged, the same file is another model.
    preprocess, tokenizer = found.model.preprocess.model_dump(), found.model.tokenizer
    record["hash"] = digest("import", record["sha256"], found.form, found.taken, architecture, preprocess, tokenizer)
    return artifact_from_model(found.model, (*found.lineage, record), {})


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


def _imported(path: Path, form: str, model: str | None, which: Which | None, base: Path | None) -> _Imported:
    if form != "auto" and form not in IMPORTERS:
        raise RecipeError(f"unknown checkpoint format '{form}'.{nearest(form, IMPORTERS)}")
    try:
        if path.is_dir():
            if model is not None:
                raise RecipeError(
                    f"expected no model name, found '{model}': a folder's config tells its architecture. Leave it out."
                )
            if lora.is_adapter(path):
                return _adapted(lora.read_adapter(path), base, form, which)
        if base is not None:
            raise RecipeError(f"expected no base, found {base}: only an adapter (PEFT) has one. Leave it out.")
        if path.is_dir():
            return _of_folder(path, form, which)
        weights = weights_from_file(path, which)
        used = detected(weights.state) if form == "auto" else form
        importer, folder = IMPORTERS[used](path.parent), None
        if model is None and path.name in importer.folder_weights and path.with_name(importer.folder_config).is_file():
            folder = path.parent  # whose config tells what the file does not
            made = importer.model_from_folder(folder, weights.state)
        else:
            made = importer.model_from_state(weights.state, model)
        return _Imported(made, used, weights.described(), [path], importer.preprocess_source(folder, model))
    except (ArtifactError, RecipeError) as error:
        raise type(error)(f"Checkpoint {path}: {error}") from None


def _of_folder(path: Path, form: str, which: Which | None, adapter: lora.Adapter | None = None) -> _Imported:
    folder = path / INSIDE if (path / INSIDE).is_dir() else path
    used = _folder_format(folder, form)
    files = weight_files(folder, IMPORTERS[used].folder_weights)
    weights = weights_from_files(files, which)
    state = weights.state if adapter is None else adapter.merged(weights.state)
    importer = IMPORTERS[used]()
    made = importer.model_from_folder(folder, state)
    return _Imported(made, used, weights.described(), files, importer.preprocess_source(folder, None))


def _adapted(adapter: lora.Adapter, given: Path | None, form: str, which: Which | None) -> _Imported:
    """Return the base of an adapter, a folder or an artifact, with the adapter merged in."""
    base = lora.base_of(adapter, given)
    if lora.is_artifact(base):
        model, lineage, weights = lora.with_adapter(base, adapter)
        found = _Imported(model, "lora", "", [weights], "the base's", lineage)
    else:
        found = _of_folder(base, form, which, adapter)
    taken = ", ".join(part for part in (found.taken, adapter.described(base)) if part)
    return replace(found, taken=taken, files=[*found.files, *adapter.files])


def _folder_format(folder: Path, form: str) -> str:
    """Return the format of a folder, by the config in it. Raises ArtifactError or RecipeError."""
    # The one whose file says whose it is comes first: open_clip's folders may have transformers' config.json too.
    kinds = sorted(IMPORTERS.items(), key=lambda item: -len(item[1].folder_config))
    configs = {name: kind.folder_config for name, kind in kinds if kind.folder_config}
    if form != "auto" and form not in configs:
        raise RecipeError(f"format '{form}' has no folders, found one. Name the file, or leave the format out.")
    known = configs if form == "auto" else {form: configs[form]}
    found = next((name for name, config in known.items() if (folder / config).is_file()), None)
    if found is None:
        raise ArtifactError(f"expected a folder with {' or '.join(known.values())}, found neither.")
    return found


def weight_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """Return the weights of a folder: the first of these files that exists, or the shards that `NAME.index.json` lists."""
    for name in names:
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            return _shards(index)
    raise ArtifactError(f"expected a weights file in the folder ({' or '.join(names)}), found none.")


def _shards(index: Path) -> list[Path]:
    try:
        places = read_json(index)["weight_map"]
        names = sorted(set(places.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"its {index.name} does not list the shards of its weights: {error!r:.200}.") from None
    if any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ArtifactError(f"its {index.name} names files outside the folder.")
    return [index.with_name(name) for name in names]
