"""Write Triton model repositories, switch their versions, and start a server on one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipress.export.exported import is_exported
from clipress.export.settings import OnnxSettings
from clipress.progress import Say
from clipress.recipe import checked, overridden
from clipress.runtime.sessions import ONNX_RUNTIME
from clipress.serve.settings import ServeSettings
from clipress.serve.triton_repo import (
    has_outdated_code,
    serve_version,
    served_version,
    triton_repo_from_export,
    update_code,
    versions_of,
)
from clipress.serve.triton_server import serve_until_stopped
from clipress.storage import locked_and_swept
from clipress.workflow.exported import export_of
from clipress.workflow.kept import Artifacts, choose_artifact, results_of
from clipress.workflow.outline import Outline, read_outline


@dataclass(frozen=True)
class ServeRequest:
    """What writing the repositories changes in the run's recipe."""

    stage: str | None = None
    """Default: the artifact that bench kept."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings that replace those of `serve`."""


def serve_run(run: Path, request: ServeRequest, say: Say) -> dict[str, Path]:
    """Write a run's model repositories, exporting first if needed; return their folders by backend."""
    outline = read_outline(run)
    with locked_and_swept(run):
        settings = _settings(outline, request.settings)
        stage = choose_served(run, outline, say, request.stage)
        _export_if_needed(run, stage, outline, say)
        return write_repositories(run, stage, settings, say)


def switch_version(run: Path, version: int | None, settings: Mapping[str, Any], say: Say) -> None:
    """Serve another version of a run's models from its repositories; None: the version before the current one."""
    outline = read_outline(run)
    with locked_and_swept(run):
        wanted = _settings(outline, settings)
        for backend in wanted.backend:
            repository = run / "triton" / backend
            before = versions_of(repository)
            now = serve_version(repository, version, wanted, results_of(run))
            say(f"Version {now} is served from {repository}")
            _say_removed(repository, before, say)


def start_triton(run: Path, stage: str | None, listen: Mapping[str, Any], say: Say) -> None:
    """Start Triton on a run's python repository and keep it running until Ctrl-C or SIGTERM.

    The repository is served as it is, with the code of the installed clipress; it is written first if it is missing or if
    a stage is named. `listen` may hold `host`, `http_port`, `grpc_port` and `metrics_port`.
    """
    read_outline(run)  # The folder must be a run.
    repository = run / "triton" / "python"
    if stage is not None or not repository.is_dir():
        serve_run(run, ServeRequest(stage, {"backend": "python"}), say)
    if has_outdated_code(repository):
        with locked_and_swept(run):
            update_code(repository)
    serve_until_stopped(repository, say, **listen)


def choose_served(run: Path, outline: Artifacts, say: Say, stage: str | None = None) -> str:
    """Return the artifact to serve: the one named, or what bench kept in ONNX Runtime, which Triton's backends run."""
    return choose_artifact(run, outline, stage, say, "Serving", ONNX_RUNTIME).stage


def write_repositories(run: Path, stage: str, settings: ServeSettings, say: Say) -> dict[str, Path]:
    """Write the model repositories of an exported artifact; return their folders by backend."""
    before = {backend: versions_of(run / "triton" / backend) for backend in settings.backend}
    written = triton_repo_from_export(export_of(run, stage), run / "triton", settings, results_of(run))
    for repository in written:
        say(f"Triton model repository of {stage}, version {served_version(repository)}: {repository}")
        _say_removed(repository, before[repository.name], say)
    return {repository.name: repository for repository in written}


def _say_removed(repository: Path, before: Sequence[int], say: Say) -> None:
    if removed := sorted(set(before).difference(versions_of(repository))):
        say(f"Removed version{'s' * (len(removed) > 1)} {', '.join(map(str, removed))} from {repository}")


def _settings(outline: Outline, replaced: Mapping[str, Any]) -> ServeSettings:
    return overridden(checked(ServeSettings, outline.recipe.serve, "serve"), replaced, "serve")


def _export_if_needed(run: Path, stage: str, outline: Outline, say: Say) -> None:
    """Export an artifact unless that has been done: a machine that serves exports has no torch."""
    if is_exported(
        run / stage, run / "export" / stage, checked(OnnxSettings, outline.recipe.export.get("onnx"), "export.onnx")
    ):
        return
    from clipress.workflow.export import export_artifacts
    from clipress.workflow.plan import read_plan

    export_artifacts(run, read_plan(run), [stage], say)
