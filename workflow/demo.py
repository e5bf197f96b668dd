"""The demo page of a run, on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipress.data.prompts import check_labels, read_templates
from clipress.errors import ArtifactError, RecipeError, nearest
from clipress.export.layouts.web import LABELS, TEMPLATE, Page, reason_against, site_of
from clipress.progress import Say
from clipress.recipe import RECIPE
from clipress.runtime.export_folder import Exported, read_export
from clipress.runtime.sessions import ONNX_RUNTIME
from clipress.serve.page_server import PageServer, runs_of
from clipress.serve.signals import ended_by_signals
from clipress.workflow.exported import DESCRIPTION
from clipress.workflow.kept import choose_artifact
from clipress.workflow.outline import read_outline


@dataclass(frozen=True)
class DemoRequest:
    """What the page shows."""

    stage: str | None = None
    """Shown first; default: what bench kept."""
    compare: str | None = None
    """The other one of `Compare`; default: the first that was exported."""
    labels: Sequence[str] = LABELS
    template: str = TEMPLATE
    python: bool = False
    """Run the graphs here with ONNX Runtime, instead of in the browser."""
    port: int = 0
    """0: any free one."""


def serve_page(run: Path, request: DemoRequest, say: Say, opened: Callable[[str], None] = lambda url: None) -> None:
    """Serve the page of a run until Ctrl-C or SIGTERM. `opened` is called with its address. For the main thread."""
    with ended_by_signals(), page_of(run, request, say) as server:
        say(f"{server.url} shows {', '.join(_names(server))}. Ctrl-C ends it.")
        opened(server.url)
        server.serve_forever()


def page_of(run: Path, request: DemoRequest, say: Say) -> PageServer:
    """Return the server of a run's page, which listens already.

    Raises ArtifactError for a run without exports to show, DataError and RecipeError for what cannot be asked for.
    """
    check_labels(request.labels)
    template, *more = read_templates(request.template)
    if more:
        raise RecipeError(
            f"--template {request.template}: expected one template, found {1 + len(more)}. Give one, as in '{TEMPLATE}'."
        )
    models = _shown(run, say)
    names = [model.stage for model in models]
    for option, name in (("--stage", request.stage), ("--compare", request.compare)):
        if name is not None and name not in names:
            raise RecipeError(f"{option} {name}: the page has no such model.{nearest(name, names)}")
    chosen = request.stage or _chosen(run, names, say)
    page = Page(run.name, chosen, request.compare or names[0], request.labels, template, request.python)
    return PageServer(site_of(models, page), runs_of(models) if request.python else {}, request.port)


def _shown(run: Path, say: Say) -> list[Exported]:
    """Return the exports that the page can show, in the order in which they were made."""
    folders = [path.parent for path in run.glob(f"export/*/{DESCRIPTION}")] or [
        path.parent for path in [run / DESCRIPTION] if path.is_file()
    ]
    if not folders:
        raise ArtifactError(
            f"{run}: expected a run with exports, or an export folder, found neither. Run: clipress export {run}"
        )
    models = []
    for exported in map(read_export, sorted(folders, key=lambda folder: (folder / DESCRIPTION).stat().st_mtime_ns)):
        if reason := reason_against(exported):
            say(f"{exported.stage} is left out: {reason}.")
        else:
            models.append(exported)
    if not models:
        raise ArtifactError(f"{run}: none of its exports can be shown. Try: clipress predict {run} IMAGES")
    return models


def _chosen(run: Path, names: Sequence[str], say: Say) -> str:
    """Return the model that bench kept, or the last one."""
    if not (run / RECIPE).is_file():  # an export folder
        return names[-1]
    stage = choose_artifact(run, read_outline(run), None, say, "Showing", ONNX_RUNTIME).stage
    return stage if stage in names else names[-1]


def _names(server: PageServer) -> list[str]:
    return sorted({name.split("/")[1] for name in server.site if name.startswith("models/")})
