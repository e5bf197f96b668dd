"""Measure a Triton server under load: a running one, or one started for a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from clipress.bench.fail_if import gate_from
from clipress.bench.server.load import Windows
from clipress.bench.server.requests import model_names, request_templates
from clipress.bench.server.results import LoadResults, load_table, write_load
from clipress.bench.server.run import PLACES, bench_server, broken_by_load, loads_from, places_of
from clipress.errors import RecipeError, nearest
from clipress.progress import Say
from clipress.recipe import overridden
from clipress.runtime.export_folder import read_export
from clipress.serve.client import address_from
from clipress.serve.triton_install import find_triton
from clipress.serve.triton_server import TritonServer
from clipress.tasks import graphs_of, model_from_artifact
from clipress.workflow.export import export_artifacts
from clipress.workflow.exported import export_of
from clipress.workflow.plan import Plan, read_plan
from clipress.workflow.serve import choose_served, write_repositories

Address = tuple[str, str, bool]


@dataclass(frozen=True)
class LoadRequest:
    """The server to measure, and the loads."""

    windows: Windows
    stage: str | None = None
    """Default: the artifact that is served."""
    url: str | None = None
    """A running server; default: one that is started for the run."""
    models: tuple[str, ...] = ()
    concurrency: str | None = None
    request_rate: str | None = None
    fail_if: tuple[str, ...] = ()
    out: Path | None = None
    """Where load.json goes; default: <run>/bench."""
    command: str = ""
    """Recorded in the results."""


@dataclass(frozen=True)
class MeasuredLoads:
    """Results, and a message for each condition of `fail_if` that holds."""

    results: LoadResults
    broken: list[str]


def bench_run_server(run: Path, request: LoadRequest, say: Say) -> MeasuredLoads:
    """Measure every model of a server under every load; write load.json and report its table."""
    loads = loads_from(request.concurrency, request.request_rate)
    gates = [gate_from(text, PLACES) for text in request.fail_if]
    address = address_from(request.url) if request.url else None
    plan = read_plan(run)
    stage = choose_served(run, plan, say, request.stage)
    models = _choose_models(request.models, model_names(graphs_of(model_from_artifact(run / stage))))
    broken_by_load(gates, places_of(models, loads))  # Unknown metrics fail before anything is measured.
    if address is None:
        export_artifacts(run, plan, [stage], say)
    templates = request_templates(read_export(export_of(run, stage)), plan.test_sets())
    about = {"recipe": plan.recipe.name, "stage": stage, "command": request.command}
    with nullcontext(address) if address else _started_server(run, plan, stage, say) as server:
        results = bench_server(server, [templates[model] for model in models], loads, request.windows, about)
    written = write_load(results, request.out or run / "bench")
    say(f"{load_table(results)}\nResults, with the times of every request: {written}")
    return MeasuredLoads(results, broken_by_load(gates, results.rows))


def _choose_models(names: Sequence[str], known: Sequence[str]) -> list[str]:
    if not known:
        raise RecipeError(
            "Expected graphs that take images or texts, or a BLIP's; this run's have other inputs, for which there are no requests."
        )
    for name in names:
        if name not in known:
            raise RecipeError(f"--model {name}: expected one of the models that can be loaded.{nearest(name, known)}")
    return list(dict.fromkeys(names or known))


@contextmanager
def _started_server(run: Path, plan: Plan, stage: str, say: Say) -> Iterator[Address]:
    """Serve a run on this machine from its python repository, which is written first if it is out of date."""
    settings = overridden(plan.serve, {"backend": "python"}, "serve")
    repository = write_repositories(run, stage, settings, say)["python"]
    with TritonServer(repository, triton=find_triton(say)) as server:
        yield "http", server.http, False
