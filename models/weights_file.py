"""Read named tensors from a third-party checkpoint without running any code in it."""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipress.errors import ArtifactError, first_line

NOTES = {"input_resolution", "context_length", "vocab_size"}  # Numbers next to the weights in OpenAI's files.
MAX_SIDE, MAX_TENSORS, MAX_BYTES = 1 << 20, 1 << 16, 8_000_000_000

State = Mapping[str, Tensor]


def weights_from_file(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name, without the mappings that may wrap them.

    Raises ArtifactError for a file that is missing or damaged, holds more than weights, or claims impossible sizes.
    """
    state = _read(path)
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not state:
        raise ArtifactError(f"expected named weights, found {type(state).__name__} without any.")
    if len(state) > MAX_TENSORS:
        raise ArtifactError(f"expected at most {MAX_TENSORS:,} tensors, found {len(state):,} entries.")
    weights = {str(name).removeprefix("module."): _tensor(name, value) for name, value in state.items()}
    claimed = sum(math.prod(tensor.shape) * tensor.element_size() for tensor in weights.values())
    if claimed > MAX_BYTES:
        raise ArtifactError(
            f"expected at most {MAX_BYTES / 1e9:.0f} GB of tensors, the file claims {claimed / 1e9:,.1f} GB."
        )
    for name, tensor in weights.items():
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ArtifactError(f"{name} claims shape {list(tensor.shape)}, and the file holds fewer bytes than that.")
    return weights


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ArtifactError("the file does not exist.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(
                path
            ) as archive:  # torch never compresses, so a larger content than the file is a bomb.
                inside = sum(record.file_size for record in archive.infolist())
            if inside > path.stat().st_size:
                raise ValueError(f"it claims {inside:,} bytes and is {path.stat().st_size:,} bytes long")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Arbitrary bytes can fail anywhere in a reader.
        raise ArtifactError(_explain(error)) from None


def _explain(error: Exception) -> str:
    if "TorchScript" in str(error):
        return (
            "this is a TorchScript archive, which is a program (the format of OpenAI's models); only weights are read. If you "
            "trust it: torch.save(torch.jit.load(FILE, 'cpu').state_dict(), 'weights.pt'), and import weights.pt."
        )
    found = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if found:
        return (
            f"the file holds more than weights ({found[1]}), and reading it could run code: nothing was loaded. Save the "
            "weights alone, with torch.save(model.state_dict(), FILE) or as safetensors."
        )
    reason = first_line(error).partition(". In PyTorch")[0]
    return f"the file cannot be read ({reason}): it is truncated, damaged or no checkpoint. Copy it again."


def _tensor(name: object, value: Any) -> Tensor:
    if name in NOTES and isinstance(value, int):
        return torch.empty(1)
    if not isinstance(name, str) or not isinstance(value, Tensor):
        raise ArtifactError(f"expected named tensors only, entry {name!r} is {type(value).__name__}.")
    if value.is_nested or value.is_meta or value.is_quantized or value.layout != torch.strided:
        raise ArtifactError(f"{name} is not a plain tensor; sparse, nested, quantized and meta tensors are not read.")
    if not all(0 < side <= MAX_SIDE for side in value.shape):
        raise ArtifactError(f"{name}: expected sides of 1 to {MAX_SIDE:,}, found shape {list(value.shape)}.")
    return value.detach()
