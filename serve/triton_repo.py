"""Write Triton model repositories from an export folder, one per backend, with every model that clients need.

    <target>/<backend>/README.md                          how to start the server and send requests
    <target>/<backend>/MD5SUMS                            checksums of all other files, with serve.checksums
    <target>/<backend>/<model>/config.pbtxt               of the version that is served
    <target>/<backend>/<model>/<version>/release.json     which export this version is; the same for all models
    <target>/<backend>/image_encoder/1/model.onnx         or model.plan; and model.py, where Python runs it
    <target>/<backend>/preprocess/warmup/image            sent to the model before the first client comes

    preprocess ─► image_encoder = embed_image ─┐
    tokenize   ─► text_encoder  = embed_text  ─┴► classify, search          of a CLIP

    preprocess ─► image_classifier = score_image ─► classify                of a classifier

                  image_segmenter ─► segment                                of a Segmenter

    caption, answer or judge                                                of a BLIP that writes or judges: the whole export
    embed_image, match_classifier ─► match                                  of a BLIP for retrieval, beside a CLIP's models

A very small encoder is not chained: embed_* is then one python model that prepares the input and runs the encoder.

A changed export adds a version to every model, under one number, so that the models of a version belong together. A
repository is written aside, its older versions linked, and renamed into place: a version is either whole or absent.
With `serve.keep` older versions are dropped at the same moment, never the one that is served before or after it.
The code is not part of a version: it imports the clipress that is installed, so every version gets today's model.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import AliasChoices, BaseModel, Field, ValidationError, ValidationInfo, field_validator

from clipress.errors import ArtifactError, ExportError
from clipress.recipe import first_problem
from clipress.runtime.export_folder import Exported, read_export
from clipress.runtime.served import model_of
from clipress.serve.checksums import SUMS, list_checksums, sums_of, sums_text, update_checksums
from clipress.serve.engines import Engines, engines_from_export
from clipress.serve.graphs import (
    PREPARED_BY,
    TEXT,
    chain_of,
    classifier_graph,
    embedder,
    inputs_for,
    is_zero_shot,
    own_graphs,
    segmenter_graph,
    use_of,
)
from clipress.serve.settings import ServeSettings
from clipress.serve.sizing import sizing
from clipress.serve.triton_blip import blip_code, blip_files
from clipress.serve.triton_config import config_from, config_text, configs, options_for
from clipress.serve.triton_files import Files, holds, link, put, warm_up_files
from clipress.serve.triton_parts import Served
from clipress.serve.triton_readme import readme
from clipress.storage import LOCK, read_json, write_whole

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

RELEASE = "release.json"
CODE = "model.py"
SEARCH = "search"  # the one model that a version may lack


class Release(BaseModel):
    """The inputs of a version's configurations, kept so that they can be written again."""

    export: Exported
    engines: dict[str, Engines] = Field({}, validation_alias=AliasChoices("engines", "plans"))
    """Per graph. Version 1 of clipress called them plans."""
    search: bool = False
    fusible: bool = False
    """The models that chain a graph hold its file too, to run it themselves if it is very small."""

    @field_validator("export", mode="before")
    @classmethod
    def _in_folder(cls, value: Any, info: ValidationInfo) -> Any:
        return {**value, "folder": info.context} if isinstance(value, dict) else value

    def text(self) -> str:
        """Return it as JSON, the same for the same files wherever they were exported."""
        return self.model_dump_json(indent=1, exclude={"export": {"folder", "parity"}})


@dataclass(frozen=True)
class Repository:
    """One backend's repository, and what its configurations depend on."""

    folder: Path
    settings: ServeSettings
    bench: Path | None
    """A results.json that sizes are taken from."""

    @property
    def backend(self) -> str:
        """The backend of the encoders, which the folder is named after."""
        return self.folder.name


def triton_repo_from_export(
    export: Path, target: Path, settings: ServeSettings, bench: Path | None = None
) -> list[Path]:
    """Write a model repository per backend into `target`, or add a version to one if the export has changed.

    `bench` is a results.json that sizes are taken from. Returns the repositories' folders. Raises ArtifactError if the
    export or index is missing, damaged or of another model, and ExportError if a configuration does not read back as it
    was written, an engine is missing, or a new version would not take and give what the older ones do.
    """
    exported = read_export(export)
    repositories = [Repository(target / backend, settings, bench) for backend in dict.fromkeys(settings.backend)]
    for repository in repositories:
        _add(exported, repository)
    return [repository.folder for repository in repositories]


def serve_version(repository: Path, version: int | None, settings: ServeSettings, bench: Path | None = None) -> int:
    """Make a repository serve one of its versions; None means the one before the current one. Returns its number.

    Raises ArtifactError if there is no such version.
    """
    known = versions_of(repository)
    if version is None:
        now = served_version(repository) if known else 0
        version = max((number for number in known if number < now), default=0)
    if version not in known:
        wanted = f"version {version}" if version else "an older version"
        found = ", ".join(map(str, known)) or "none"
        raise ArtifactError(f"{repository}: expected {wanted}; versions found: {found}. Run: clipress serve RUN")
    release = _read_release(repository, version)
    if release.search and version not in versions_of(repository, SEARCH):
        raise ArtifactError(
            f"{repository}: version {version} needs search/{version}, which was dropped when a version without an index was "
            "served. Run: clipress serve RUN"
        )
    _write(Repository(repository, settings, bench), {}, release, version)
    return version


def served_version(repository: Path) -> int:
    """Return the version that a repository serves."""
    config = config_from((repository / _first_model(repository) / "config.pbtxt").read_text(encoding="utf-8"))
    return max(config.version_policy.specific.versions, default=max(versions_of(repository)))


def has_outdated_code(repository: Path) -> bool:
    """Return whether a version has code of another clipress. Raises ArtifactError for a damaged repository."""
    return not all(holds(repository / name, code) for name, code in _code_of_repository(repository).items())


def update_code(repository: Path) -> None:
    """Make all versions of a repository run with the installed clipress; but for checksums, configurations stay as they are.

    Raises ArtifactError for a damaged repository, or if it cannot be written.
    """
    codes = _code_of_repository(repository)
    changed = codes | update_checksums(repository, codes)

    def fill(aside: Path) -> None:
        shutil.copytree(repository, aside, copy_function=link, dirs_exist_ok=True)
        for name, content in changed.items():
            put(aside / name, content, {})

    write_whole(repository, fill)


def _add(exported: Exported, repository: Repository) -> None:
    """Add a version if the export has changed, else write the configurations of the served one again."""
    folder = repository.folder
    release, added = _files(exported, repository.backend, repository.settings)
    newest = max(versions_of(folder), default=0)
    if newest and all(_same(files, folder / model / str(newest)) for model, files in added.items()):
        served = served_version(folder)  # a repository that was rolled back stays so until something new comes
        _write(repository, {}, _read_release(folder, served), served)
    else:
        _write(repository, added, release, newest + 1)


def _files(exported: Exported, backend: str, settings: ServeSettings) -> tuple[Release, dict[str, Files]]:
    """Return the release of a version, and its files of every model."""
    found: dict[str, Files] = {model: {} for sent, model in PREPARED_BY.items() if inputs_for(exported, sent)}
    engines: dict[str, Engines] = {}
    for name, graph in own_graphs(exported).items():
        files: Files = {}
        if backend == "tensorrt":
            engines[name], sources = engines_from_export(exported, name, settings)
            files |= sources
        else:
            files["model.onnx"] = exported.onnx(name)
            if data := exported.data(name):
                files[data.name] = data
        found[model_of(graph)] = files
        if chain := chain_of(exported, graph):
            found[chain] = dict(files) if backend == "python" and len(graph.inputs) == 1 else {}
    if is_zero_shot(exported) or classifier_graph(exported) is not None:
        found["classify"] = {}
    if segmenter_graph(exported) is not None:
        found["segment"] = {}
    if (use := use_of(exported)) is not None:
        found[use] = blip_files(exported, backend)
    if settings.index is not None:
        found[SEARCH] = _index(settings.index, exported)
    for model, code in _codes(exported, backend).items():
        if model in found:
            found[model][CODE] = code
    release = Release(export=exported, engines=engines, search=settings.index is not None, fusible=backend == "python")
    return release, {model: {**files, RELEASE: release.text().encode()} for model, files in found.items()}


def _codes(exported: Exported, backend: str) -> dict[str, Path]:
    """Return the file that becomes model.py, of every model that has one; `search` may be absent from a version."""
    codes = {model: model for sent, model in PREPARED_BY.items() if inputs_for(exported, sent)} | {SEARCH: SEARCH}
    for graph in own_graphs(exported).values() if backend == "python" else ():
        codes[model_of(graph)] = "encoder"
        if (chain := chain_of(exported, graph)) and len(graph.inputs) == 1:
            codes[chain] = "fused"
    if is_zero_shot(exported):
        codes["classify"] = "zero_shot"
    elif classifier_graph(exported) is not None:
        codes["classify"] = "classify"
    elif segmenter_graph(exported) is not None:
        codes["segment"] = "segment"
    if (use := use_of(exported)) is not None:
        codes[use] = blip_code(exported)
    return {model: Path(__file__).with_name(f"{name}_model.py.txt") for model, name in codes.items()}


def _code_of_versions(repository: Path, codes: Mapping[str, Path]) -> Files:
    """Return today's model.py for each one that all versions of a repository have."""
    return {
        f"{model}/{number}/{CODE}": code
        for model, code in codes.items()
        for number in versions_of(repository, model)
        if (repository / model / str(number) / CODE).is_file()
    }


def _code_of_repository(repository: Path) -> Files:
    release = _read_release(repository, served_version(repository))
    return _code_of_versions(repository, _codes(release.export, repository.name))


def _index(folder: Path, exported: Exported) -> Files:
    """Return an index's files. Raises ArtifactError for one that was made with another model."""
    from clipress.serve.index import open_index

    embedder(exported, TEXT)
    index = open_index(folder)
    if (index.lineage, index.dim) != (exported.lineage_hash, exported.embed_dim):
        raise ArtifactError(
            f"Index {folder}: expected lineage {exported.lineage_hash} and {exported.embed_dim} dimensions, as "
            f"{exported.stage} has; found {index.lineage} and {index.dim}. Make the index again with this model."
        )
    return {
        f"index/{path.relative_to(folder).as_posix()}": path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != LOCK
    }


def _write(repository: Repository, added: Mapping[str, Files], release: Release, version: int) -> None:
    """Replace a repository by one that has the added files as `version`, older ones that are kept, and serves `version`."""
    folder, exported = repository.folder, release.export
    served = _served(repository, release)
    made = configs(served, release.search)
    if added:
        _check_clients(folder, made)
    older = versions_of(folder)
    kept = _kept_versions(repository, version)
    if version < max(older, default=0):
        for config in made.values():
            config.version_policy.specific.versions.append(version)
    codes = {model: code for model, code in _codes(exported, repository.backend).items() if model in made}
    code = _code_of_versions(folder, codes)
    around = warm_up_files(made, exported.preprocess.size)
    around |= {name: source for name, source in code.items() if int(name.split("/")[1]) in kept}
    if repository.settings.checksums:
        new = {f"{model}/{version}/{name}": content for model in made for name, content in added.get(model, {}).items()}
        sums = sums_of(folder, _files_of_versions(folder, made, kept), around | new)
        for config in made.values():
            list_checksums(config, sums, version)
        around[SUMS] = sums_text(sums)
    around |= {f"{model}/config.pbtxt": config_text(config).encode() for model, config in made.items()}
    around["README.md"] = readme(served, version, release.search, options_for(made.values())).encode()
    if not added and kept.issuperset(older) and all(holds(folder / name, content) for name, content in around.items()):
        return  # A server that uses this folder is not disturbed.

    def fill(aside: Path) -> None:
        copies: dict[Path, Path] = {}  # files that two models share are copied once
        for model in made:
            (aside / model).mkdir()
            for number in kept.intersection(versions_of(folder, model)):
                shutil.copytree(folder / model / str(number), aside / model / str(number), copy_function=link)
            for name, content in added.get(model, {}).items():
                put(aside / model / str(version) / name, content, copies)
        for name, content in around.items():
            put(aside / name, content, copies)

    write_whole(folder, fill)


def _files_of_versions(repository: Path, models: Iterable[str], versions: Collection[int]) -> Iterator[str]:
    """Yield the files that a repository has of some versions of its models."""
    for model in models:
        for number in versions_of(repository, model):
            if number in versions:
                folder = repository / model / str(number)
                yield from (f"{model}/{number}/{name}" for name in _names_in(folder))


def _kept_versions(repository: Repository, version: int) -> set[int]:
    """Return the versions that stay when `version` is to be served: the newest ones, that one, and the one served so far."""
    known = versions_of(repository.folder)
    newest = sorted({*known, version})[-(repository.settings.keep or 0) :]
    return {*newest, version, *([served_version(repository.folder)] if known else [])}


def _served(repository: Repository, release: Release) -> Served:
    exported, backend = release.export, repository.backend
    sizes = {
        graph: sizing(exported, graph, backend, repository.settings, repository.bench) for graph in exported.graphs
    }
    fused = {graph for graph, size in sizes.items() if size.small and _can_fuse(release, graph)}
    return Served(exported, backend, repository.settings, sizes, release.engines, fused)


def _can_fuse(release: Release, graph: str) -> bool:
    one = release.export.graphs[graph]
    return release.fusible and len(one.inputs) == 1 and chain_of(release.export, one) is not None


def _check_clients(repository: Path, made: Mapping[str, ModelConfig]) -> None:
    """Raise ExportError if clients of the existing repository could not use the new version."""
    for name, config in made.items():
        path = repository / name / "config.pbtxt"
        if not path.is_file():
            continue
        old = config_from(path.read_text(encoding="utf-8"))
        known = {one.name for one in old.input}
        required = [one for one in config.input if one.name in known or not one.optional]
        if (list(old.input), list(old.output)) != (required, list(config.output)):
            raise ExportError(
                f"{name} in {repository} takes {_form(old.input)} and gives {_form(old.output)}; the new export takes "
                f"{_form(config.input)} and gives {_form(config.output)}, which existing clients do not expect. "
                "Move or delete that folder to start a new repository."
            )


def _form(tensors: Sequence[Any]) -> str:
    return ", ".join(f"{tensor.name} {list(tensor.dims)}" for tensor in tensors)


def _first_model(repository: Path) -> str:
    """Return a model that every version has."""
    models = [path.parent.name for path in repository.glob("*/config.pbtxt")]
    return min((model for model in models if model != SEARCH), default="")


def versions_of(repository: Path, model: str | None = None) -> list[int]:
    """Return the versions of a repository, or of one of its models, oldest first."""
    model = model or _first_model(repository)
    folder = repository / model
    if not model or not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.glob("[1-9]*") if path.name.isdigit())


def _read_release(repository: Path, version: int) -> Release:
    path = repository / _first_model(repository) / str(version) / RELEASE
    try:
        return Release.model_validate(read_json(path), context=path.parent)
    except ValidationError as error:
        raise ArtifactError(f"{path}, {first_problem(error)}. Delete {repository} and do: clipress serve RUN") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} cannot be read ({error}): this version is damaged, or was not written by clipress. "
            f"Move {repository} away and do: clipress serve RUN"
        ) from None


def _same(files: Files, folder: Path) -> bool:
    """Return whether a version has these files. The code may differ: it is replaced in all versions."""
    return _names_in(folder) == set(files) and all(holds(folder / name, files[name]) for name in files.keys() - {CODE})


def _names_in(folder: Path) -> set[str]:
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if "__pycache__" not in path.parts}  # servers leave those behind
