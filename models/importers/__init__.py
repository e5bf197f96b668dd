"""Foreign CLIP checkpoints -> a `Model` with our attention, or an artefact.

A checkpoint is read as data: safetensors, or a pickle that holds tensors and nothing that could run. To add a format: a
file here with `recognises(state)` and `clip_from_state(state, model_name)`, and a line in `FORMATS`.
"""

from __future__ import annotations

import importlib
import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from clipress import __version__
from clipress.artifact import Artifact
from clipress.errors import ArtifactError, RecipeError, nearest
from clipress.models.load import Model, artifact_from_model
from clipress.recipe import digest
from clipress.storage import sha256

# The first one that recognises a file takes it: the surest signs come first.
FORMATS = {
    "tinyclip": "clipress.models.importers.tinyclip",
    "upop": "clipress.models.importers.upop",
    "clip-kd": "clipress.models.importers.clip_kd",
    "openai": "clipress.models.importers.openai",
    "open_clip": "clipress.models.importers.open_clip",
}
NOTES = {"input_resolution", "context_length", "vocab_size"}  # numbers that stand beside the weights in OpenAI's files
MAX_SIDE, MAX_TENSORS, MAX_BYTES = 1 << 20, 1 << 16, 8_000_000_000

State = Mapping[str, Tensor]


def import_checkpoint(path: Path, form: str = "auto", model: str | None = None) -> Model:
    """Read a foreign checkpoint into a CLIP in fp32.

    Args:
        path: a file (.pt, .pth, .bin, .safetensors), or a folder in open_clip's layout.
        form: a key of `FORMATS`; `auto` goes by what the file holds.
        model: an open_clip model name, where the file cannot tell its architecture.

    Raises:
        ArtifactError: the file is missing, damaged, not only weights, of no known format, or its shapes do not fit.
        RecipeError: `form` or `model` is unknown or out of place.
    """
    return _imported(Path(path), form, model)[0]


def artifact_from_checkpoint(path: Path, form: str = "auto", module: str | None = None) -> Artifact:
    """Read a foreign checkpoint, as `import_checkpoint` does, into an artefact whose lineage begins with it."""
    path = Path(path)
    model, used = _imported(path, form, module)
    source = _module("open_clip").weights_in(path) if path.is_dir() else path
    record = {"stage": "import", "kind": "import", "format": used, "model": module, "file": source.name}
    record |= {"sha256": sha256(source), "versions": {"clipress": __version__}}
    # the weights may be the same and mean something else: heads, activation and preprocessing count too
    record["hash"] = digest("import", record["sha256"], used, model.architecture, model.preprocess.model_dump())
    return artifact_from_model(model, (record,), {})


def _imported(path: Path, form: str, model: str | None) -> tuple[Model, str]:
    if form != "auto" and form not in FORMATS:
        raise RecipeError(f"Checkpoint format '{form}' was asked for; there is none.{nearest(form, FORMATS)}")
    try:
        if path.is_dir():
            if form not in ("auto", "open_clip") or model is not None:
                raise RecipeError("a folder is in open_clip's layout and says its model: leave format and model out.")
            return _module("open_clip").clip_from_folder(path), "open_clip"
        state = weights_from_file(path)
        used = _recognised(state) if form == "auto" else form
        return _module(used).clip_from_state(state, model), used
    except (ArtifactError, RecipeError) as error:
        raise type(error)(f"Checkpoint {path}: {error}") from None


def _module(form: str) -> ModuleType:
    return importlib.import_module(FORMATS[form])


def _recognised(state: State) -> str:
    for form in FORMATS:
        if _module(form).recognises(state):
            return form
    raise ArtifactError(
        f"it is in no format that is known ({', '.join(FORMATS)}). It holds {len(state)} tensors: "
        f"{', '.join(list(state)[:5])}, ..."
    )


def weights_from_file(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name, out of the mappings that may be round them; no code in it is run.

    Raises ArtifactError for anything that is not weights of a possible size.
    """
    state = _read(path)
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not state:
        raise ArtifactError(
            f"named weights are asked for, found {type(state).__name__} with nothing of the kind in it."
        )
    if len(state) > MAX_TENSORS:
        raise ArtifactError(f"it holds {len(state):,} entries; at most {MAX_TENSORS:,} are read.")
    weights = {str(name).removeprefix("module."): _checked(name, value) for name, value in state.items()}
    claimed = sum(math.prod(tensor.shape) * tensor.element_size() for tensor in weights.values())
    if claimed > MAX_BYTES:
        raise ArtifactError(f"its tensors claim {claimed / 1e9:,.1f} GB; at most {MAX_BYTES / 1e9:.0f} GB are read.")
    for name, tensor in weights.items():
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ArtifactError(f"{name} claims shape {list(tensor.shape)}, and the file holds less than that.")
    return weights


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ArtifactError("it was asked for, and there is no such file.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch never compresses: more inside than outside is a bomb
                inside = sum(record.file_size for record in archive.infolist())
            if inside > path.stat().st_size:
                raise ValueError(f"it claims {inside:,} bytes and is {path.stat().st_size:,} bytes long")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # arbitrary bytes can fail anywhere in a reader
        raise ArtifactError(_why(error)) from None


def _why(error: Exception) -> str:
    if "TorchScript" in str(error):
        return (
            "it is a TorchScript archive, which is a program (OpenAI ships its models so); only weights are read. If you "
            "trust it: torch.save(torch.jit.load(FILE, 'cpu').state_dict(), 'weights.pt'), and import weights.pt."
        )
    found = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if found:
        return (
            f"it holds more than weights ({found[1]}), and reading that could run code: nothing was loaded. Save the "
            "weights alone, with torch.save(model.state_dict(), FILE) or as safetensors."
        )
    told = (str(error).strip() or type(error).__name__).splitlines()[0].partition(". In PyTorch")[0]
    return f"it cannot be read ({told}): it is truncated, damaged or no checkpoint. Copy it again."


def _checked(name: object, value: Any) -> Tensor:
    if name in NOTES and isinstance(value, int):
        return torch.empty(1)
    if not isinstance(name, str) or not isinstance(value, Tensor):
        raise ArtifactError(f"entry {name!r} is {type(value).__name__}; only tensors with names are weights.")
    if value.is_nested or value.is_meta or value.is_quantized or value.layout != torch.strided:
        raise ArtifactError(f"{name} is not a plain tensor; sparse, nested, quantised and empty shells are not read.")
    if not all(0 < side <= MAX_SIDE for side in value.shape):
        raise ArtifactError(f"{name} has shape {list(value.shape)}; sides of 1 to {MAX_SIDE:,} are possible.")
    return value.detach()
