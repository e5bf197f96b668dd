"""An export folder as every room reads it: export.json with types, ONNX files checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from clipress.data.transforms import Preprocess
from clipress.errors import ArtifactError
from clipress.recipe import first_problem
from clipress.storage import read_json, sha256


class Tokenizer(BaseModel):
    """The tokenizer's name and how long a text is, in ids."""

    name: str
    context_length: int = Field(ge=1)
    kwargs: dict[str, Any] = {}


class OnnxFile(BaseModel):
    """One tower's file and what it must hash to."""

    file: str = Field(pattern=r"^[^/\\]+$")
    """Beside export.json."""
    sha256: str
    bytes: int = 0


class Exported(BaseModel):
    """What bench and serving need of an export folder; its export.json holds more."""

    model_config = ConfigDict(frozen=True)

    folder: Path
    schema_version: Literal[1]
    stage: str
    precision: str
    embed_dim: int = Field(ge=1)
    logit_scale: FiniteFloat
    """Already exponentiated."""
    logit_bias: FiniteFloat | None = None
    preprocess: Preprocess
    tokenizer: Tokenizer
    lineage_hash: str
    portable: bool = False
    """Whether INT8 products overflow on no CPU: weights of 7 bits, or none of INT8. Files of before did not say."""
    parity: dict[str, Any] = {}
    """What the comparison with torch gave."""
    files: dict[Literal["image", "text"], OnnxFile] = Field(min_length=2)
    explicit: dict[Literal["image", "text"], OnnxFile] = {}
    """Towers whose INT8 has a second file, in the form TensorRT reads: symmetric, in front of products only."""

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(file.bytes for file in self.files.values())

    def onnx(self, tower: Literal["image", "text"]) -> Path:
        """Return where a tower's ONNX file is."""
        return self.folder / self.files[tower].file

    def for_gpus(self) -> Exported:
        """Return the same export with the files meant for GPUs."""
        return self.model_copy(update={"files": {**self.files, **self.explicit}, "explicit": {}})


def read_export(folder: str | Path) -> Exported:
    """Read an export folder and check that its ONNX files are whole. Raises ArtifactError."""
    path = Path(folder) / "export.json"
    try:
        described = read_json(path)
        exported = Exported.model_validate({**described, "folder": folder})
    except FileNotFoundError:
        raise ArtifactError(
            f"An export was asked for at {folder}; there is no {path.name} in it. Do: clipress export RUN"
        ) from None
    except ValidationError as error:
        raise ArtifactError(f"{path}, {first_problem(error)}. Make it again: clipress export RUN") from None
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"{path} is not readable ({error}). Make it again: clipress export RUN") from None
    for file in (*exported.files.values(), *exported.explicit.values()):
        onnx = exported.folder / file.file
        if not onnx.is_file():
            raise ArtifactError(f"{folder} has a {path.name} but no {file.file}. Make it again: clipress export RUN")
        found = sha256(onnx)
        if found != file.sha256:
            raise ArtifactError(
                f"{onnx} ({onnx.stat().st_size} bytes) is truncated or changed: its sha256 starts with {found[:12]}, "
                f"{path.name} says {file.sha256[:12]}. Make it again: clipress export RUN"
            )
    return exported
