"""Export folder -> Triton model repositories, one per backend, each with all that clients ask for.

    <target>/<backend>/README.md                          how to start it and ask it
    <target>/<backend>/<model>/config.pbtxt               of the version that is served
    <target>/<backend>/<model>/<version>/release.json     which export this version is; the same for all models
    <target>/<backend>/image_encoder/1/model.onnx         or model.plan; and model.py, for the python backend
    <target>/<backend>/preprocess/warmup/picture          what is asked before the first client

    preprocess ─► image_encoder = embed_image ─┐
    tokenize   ─► text_encoder  = embed_text  ─┴► classify, search

Of very small encoders embed_* is no chain but one python model, which does both in one process.

A changed export adds a version to every model, under one number, so that what is served together belongs together. A
repository is written aside, its older versions linked, and renamed into place: all of a version is there, or nothing.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ValidationError

from clipress.errors import ArtifactError, ExportError
from clipress.recipe import first_problem
from clipress.runtime.export_folder import Exported, read_export
from clipress.serve.engines import Plans, plans_from_export
from clipress.serve.settings import ServeSettings
from clipress.serve.sizing import sizing
from clipress.serve.triton_config import PICTURE, TEXT, Served, config_from, config_text, configs, options_for
from clipress.serve.triton_readme import readme
from clipress.storage import read_json, sha256, write_whole

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

Files = dict[str, bytes | Path]
"""Names below a folder, and their content or the file it is copied from."""
TOWERS = {"image": "image_encoder", "text": "text_encoder"}
FIRST = TOWERS["image"]  # the model that tells a repository's versions
RELEASE = "release.json"


class Release(BaseModel):
    """What must be remembered of a version, for its configurations to be written again."""

    export: Exported
    plans: dict[str, Plans] = {}
    search: bool = False
    fusible: bool = False
    """embed_* bring the encoder's file, to run it themselves where it is very small."""

    def text(self) -> str:
        """Return it as JSON, the same for the same files wherever they were exported."""
        return self.model_dump_json(indent=1, exclude={"export": {"folder", "parity"}})


def triton_repo_from_export(
    export: Path, target: Path, settings: ServeSettings, bench: Path | None = None
) -> list[Path]:
    """Write a model repository per backend into `target`, or add a version where one is there and the export has changed.

    `bench` is a results.json that sizes are taken from. Returns the repositories' folders. Raises ArtifactError when the
    export or index is missing, damaged or of another model, and ExportError when a configuration does not read back as it
    was written, an engine is missing, or a new version would not take and give what the older ones do.
    """
    exported = read_export(export)
    return [_add(exported, target / backend, backend, settings, bench) for backend in dict.fromkeys(settings.backend)]


def serve_version(repository: Path, version: int | None, settings: ServeSettings, bench: Path | None = None) -> int:
    """Let a repository serve one of its versions; None: the one before that it serves now. Returns it.

    Raises ArtifactError where there is no such version.
    """
    known = _versions(repository)
    if version is None:
        now = served_version(repository) if known else 0
        version = max((number for number in known if number < now), default=0)
    if version not in known:
        asked = f"Version {version}" if version else "An older version"
        there = ", ".join(map(str, known)) or "none"
        raise ArtifactError(f"{asked} of {repository} was asked for; versions there: {there}. Do: clipress serve RUN")
    release = _read_release(repository, version)
    if release.search and version not in _versions(repository, "search"):
        raise ArtifactError(
            f"Version {version} of {repository} was asked for; its search/{version} went when a version without an index "
            "was served. Do: clipress serve RUN"
        )
    _write(repository, {}, release, version, settings, bench)
    return version


def _add(exported: Exported, repository: Path, backend: str, settings: ServeSettings, bench: Path | None) -> Path:
    release, added = _files(exported, backend, settings)
    newest = max(_versions(repository), default=0)
    if newest and all(_same(files, repository / model / str(newest)) for model, files in added.items()):
        served = served_version(repository)  # a repository that was rolled back stays so until something new comes
        _write(repository, {}, _read_release(repository, served), served, settings, bench)
    else:
        _write(repository, added, release, newest + 1, settings, bench)
    return repository


def _files(exported: Exported, backend: str, settings: ServeSettings) -> tuple[Release, dict[str, Files]]:
    """Return what a version is, and every model's files of it."""
    found: dict[str, Files] = {name: {"model.py": _code(name)} for name in ("preprocess", "tokenize", "classify")}
    plans: dict[str, Plans] = {}
    for tower, model in TOWERS.items():
        embed: Files = {}
        if backend == "tensorrt":
            plans[tower], sources = plans_from_export(exported, tower, settings)
            found[model] = {**sources}
        else:
            found[model] = {"model.onnx": exported.onnx(tower)}
        if backend == "python":
            embed = {**found[model], "model.py": _code("embed")}
            found[model]["model.py"] = _code("python")
        found[f"embed_{tower}"] = embed
    if settings.index is not None:
        found["search"] = {"model.py": _code("search"), **_index(settings.index, exported)}
    release = Release(export=exported, plans=plans, search=settings.index is not None, fusible=backend == "python")
    return release, {model: {**files, RELEASE: release.text().encode()} for model, files in found.items()}


def _code(name: str) -> Path:
    return Path(__file__).with_name(f"{name}_model.py.txt")


def _index(folder: Path, exported: Exported) -> Files:
    """Return an index's files. Raises ArtifactError for one that was made with another model."""
    from clipress.serve.index import open_index

    index = open_index(folder)
    if (index.lineage, index.dim) != (exported.lineage_hash, exported.embed_dim):
        raise ArtifactError(
            f"Index {folder} was asked for, made with a model of lineage {index.lineage} and {index.dim} dimensions; "
            f"{exported.stage} is {exported.lineage_hash} and has {exported.embed_dim}. Make the index again with it."
        )
    return {
        f"index/{path.relative_to(folder).as_posix()}": path for path in sorted(folder.rglob("*")) if path.is_file()
    }


def _write(
    repository: Path,
    added: Mapping[str, Files],
    release: Release,
    version: int,
    settings: ServeSettings,
    bench: Path | None,
) -> None:
    """Put a repository in place that has the added files as `version`, all older ones, and serves `version`."""
    exported, backend = release.export, repository.name
    sizes = {tower: sizing(exported, tower, backend, settings, bench) for tower in TOWERS}
    fused = {tower for tower, size in sizes.items() if release.fusible and size.small}
    served = Served(exported, backend, settings, sizes, release.plans, fused)
    made = configs(served, release.search)
    if added:
        _check_clients(repository, made)
    newest = max(_versions(repository), default=0)
    if version < newest:
        for config in made.values():
            config.version_policy.specific.versions.append(version)
    around: Files = {f"{model}/config.pbtxt": config_text(config).encode() for model, config in made.items()}
    around |= _warm_up_files(made, exported.preprocess.size) | {
        "README.md": readme(served, version, release.search, options_for(made.values())).encode(),
    }
    if not added and all(_holds(repository / name, content) for name, content in around.items()):
        return  # a server that looks at this folder is not disturbed

    def fill(aside: Path) -> None:
        put: dict[Path, Path] = {}  # sources, and where they are: of what two models have there is one copy
        for model in made:
            (aside / model).mkdir()
            for number in _versions(repository, model):
                shutil.copytree(repository / model / str(number), aside / model / str(number), copy_function=_link)
            for name, content in added.get(model, {}).items():
                _put(aside / model / str(version) / name, content, put)
        for name, content in around.items():
            _put(aside / name, content, put)

    write_whole(repository, fill)


def _check_clients(repository: Path, made: Mapping[str, ModelConfig]) -> None:
    """Raise ExportError when the clients of a repository that is there could not ask the new version."""
    for name, config in made.items():
        path = repository / name / "config.pbtxt"
        if not path.is_file():
            continue
        old = config_from(path.read_text(encoding="utf-8"))
        if (list(old.input), list(old.output)) != (list(config.input), list(config.output)):
            raise ExportError(
                f"{name} in {repository} takes {_form(old.input)} and gives {_form(old.output)}; the new export takes "
                f"{_form(config.input)} and gives {_form(config.output)}, which its clients do not expect. "
                "Move that folder away, or delete it, to start a new repository."
            )


def _form(tensors: Sequence[Any]) -> str:
    return ", ".join(f"{tensor.name} {list(tensor.dims)}" for tensor in tensors)


def _versions(repository: Path, model: str = FIRST) -> list[int]:
    """Return a model's versions, oldest first."""
    folder = repository / model
    return sorted(int(path.name) for path in folder.glob("[1-9]*") if path.name.isdigit()) if folder.is_dir() else []


def served_version(repository: Path) -> int:
    """Return the version that a repository serves."""
    config = config_from((repository / FIRST / "config.pbtxt").read_text(encoding="utf-8"))
    return max(config.version_policy.specific.versions, default=max(_versions(repository)))


def _read_release(repository: Path, version: int) -> Release:
    path = repository / FIRST / str(version) / RELEASE
    try:
        told = read_json(path)
        return Release.model_validate({**told, "export": {**told["export"], "folder": path.parent}})
    except ValidationError as error:
        raise ArtifactError(f"{path}, {first_problem(error)}. Delete {repository} and do: clipress serve RUN") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(
            f"{path} is not readable ({error}): this version was not made by this clipress, or is damaged. "
            f"Move {repository} away and do: clipress serve RUN"
        ) from None


def _same(files: Files, folder: Path) -> bool:
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    there = {
        path.as_posix() for path in found if "__pycache__" not in path.parts
    }  # a server that ran here leaves those
    return there == set(files) and all(_holds(folder / name, content) for name, content in files.items())


def _holds(path: Path, content: bytes | Path) -> bool:
    wanted = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sha256(content)
    return path.is_file() and sha256(path) == wanted


def _put(path: Path, content: bytes | Path, put: dict[Path, Path]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content in put:
        _link(put[content], path)
    else:
        shutil.copyfile(content, path)
        put[content] = path


def _link(source: str | Path, target: str | Path) -> None:
    """Share a file that is never written again; copy it where the disk knows no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _warm_up_files(made: Mapping[str, ModelConfig], size: int) -> Files:
    """Return what models are asked before the first client where numbers will not do, as Triton stores strings."""
    from PIL import Image

    ramp = np.linspace(0, 255, size * size * 3).reshape(size, size, 3).astype(np.uint8)
    picture = io.BytesIO()
    Image.fromarray(ramp).save(picture, "JPEG")
    contents = {PICTURE: picture.getvalue(), TEXT: b"a photo of a cat"}
    return {
        f"{model}/warmup/{name}": struct.pack("<I", len(contents[name])) + contents[name]
        for model, config in made.items()
        for name in {one.input_data_file for warm_up in config.model_warmup for one in warm_up.inputs.values()} - {""}
    }
