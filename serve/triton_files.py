"""Files of a model repository: written, compared, and shared by its versions."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clipress.serve.graphs import IMAGE, TEXT
from clipress.storage import sha256

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

Files = dict[str, bytes | Path]
"""Names below a folder, and their content or the file it is copied from."""


def holds(path: Path, content: bytes | Path) -> bool:
    """Return whether a file has this content."""
    wanted = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sha256(content)
    return path.is_file() and sha256(path) == wanted


def put(path: Path, content: bytes | Path, copies: dict[Path, Path]) -> None:
    """Write a file. `copies` are the files that were copied before, which are shared."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # A linked file is the older repository's too: it must not be written to.
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content in copies:
        link(copies[content], path)
    else:
        shutil.copyfile(content, path)
        copies[content] = path


def link(source: str | Path, target: str | Path) -> None:
    """Share a file that is never written again; copy it if the disk has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def warm_up_files(made: Mapping[str, ModelConfig], size: int) -> Files:
    """Return the real inputs that models are warmed up with, stored as Triton stores strings."""
    from PIL import Image

    ramp = np.linspace(0, 255, size * size * 3).reshape(size, size, 3).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "JPEG")
    contents = {IMAGE: file.getvalue(), TEXT: b"a photo of a cat"}
    return {
        f"{model}/warmup/{name}": struct.pack("<I", len(contents[name])) + contents[name]
        for model, config in made.items()
        for name in {one.input_data_file for warm_up in config.model_warmup for one in warm_up.inputs.values()} - {""}
    }
