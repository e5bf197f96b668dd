"""The command line: parse -> settings -> one call -> where the result is. Everything heavy is imported inside commands."""

from __future__ import annotations

import logging
import os
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from clipress import __version__
from clipress.errors import ArtifactError, ClipressError, DataError, RecipeError, Stopped, nearest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from clipress.bench.run import Subject
    from clipress.bench.settings import BenchSettings
    from clipress.compress.plan import Plan
    from clipress.data.eval_sets import EvalSet
    from clipress.metrics.outcomes import Outcomes
    from clipress.serve.settings import ServeSettings

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)
PORT = click.IntRange(1, 65535)


class Commands(click.Group):
    """Commands in the order they are declared; a user's mistake is one message and exit code 2."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Stopped as stop:
            from clipress.storage import is_first_process

            if is_first_process():
                click.echo(stop, err=True)
            ctx.exit(stop.exit_code)
        except KeyboardInterrupt:
            click.echo("Stopped by Ctrl-C. What was finished is kept; the same command goes on from there.", err=True)
            ctx.exit(130)
        except ClipressError as error:
            shown = click.ClickException(str(error))
            shown.exit_code = error.exit_code
            raise shown from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="clipress")
@click.option("--verbose", is_flag=True, help="Show the warnings of the libraries underneath.")
def main(verbose: bool) -> None:
    """Make a CLIP small, fast and servable.

    `run` does everything a recipe asks for; the four verbs under it do one part each and meet in the run folder.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    if not verbose:
        warnings.filterwarnings("ignore")
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


RECIPE_ARGUMENT = click.argument("recipe", metavar="RECIPE")
SET_OPTION = click.option(
    "--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override, such as stages.0.prune.steps=10."
)
FRESH_OPTION = click.option(
    "--resume/--fresh",
    default=True,
    help="Go on from what is finished and from the last checkpoint, or do every stage over.  [default: --resume]",
)
OUT_OPTION = click.option("--out", type=FOLDER, help="Run folder.  [default: runs/<name of the recipe>]")
RUN_ARGUMENT = click.argument("run", type=FOLDER)
LABELS = ("labels", "labels_file")
TEMPLATES = "Prompt with {} for the name, `openai` or `simple`; may be given several times."
STAGE_OPTION = click.option("--stage", help="Name of the artefact.  [default: the last one]")


@main.command()
@RECIPE_ARGUMENT
@OUT_OPTION
@SET_OPTION
@FRESH_OPTION
def run(recipe: str, out: Path | None, sets: tuple[str, ...], resume: bool) -> None:
    """Compress, export, bench and serve, as a recipe says.

    RECIPE is a YAML file, or the name of a shipped one (demo). Stages that are finished are not done again. It may be
    stopped or killed at any time: the same command goes on. On SIGTERM a stage that trains writes a checkpoint after the
    step in hand and the command exits with 75; on Ctrl-C likewise, with 130.
    """
    from clipress.storage import is_first_process

    folder, plan = _compress(recipe, out, sets, resume)
    if not is_first_process():  # the others were there to train
        return
    _hold(folder)
    _export(folder, plan, plan.artifacts)
    _engines(folder, plan, plan.artifacts)
    _bench_run(folder, plan)
    served = _served(folder, plan)
    _serve(folder, plan, served, None, None)
    other = "" if served == plan.artifacts[-1] else f" --stage {served}"
    click.echo(f"Try it: clipress predict {folder} IMAGE --labels NAME,NAME{other}")


@main.command()
@RECIPE_ARGUMENT
@OUT_OPTION
@SET_OPTION
@FRESH_OPTION
def compress(recipe: str, out: Path | None, sets: tuple[str, ...], resume: bool) -> None:
    """Run a recipe's stages: each leaves an artefact in the run folder.

    May be stopped or killed at any time, see `clipress run --help`.
    """
    from clipress.storage import is_first_process

    folder, plan = _compress(recipe, out, sets, resume)
    if is_first_process():
        click.echo(f"{len(plan.artifacts)} artefacts in {folder}: {', '.join(plan.artifacts)}")


@main.command()
@RECIPE_ARGUMENT
@click.option("--out", type=FOLDER, help="Where caches go.  [default: teacher-embeddings in $CLIPRESS_CACHE]")
@click.option("--views", type=click.IntRange(1), help="Augmented views per picture.  [default: the recipe's, or 1]")
@click.option(
    "--dtype", type=click.Choice(["fp16", "bf16"]), help="Of what is stored.  [default: the recipe's, or fp16]"
)
@click.option(
    "--teacher",
    "teachers",
    multiple=True,
    type=FOLDER,
    help="Artefact to embed with; may be given several times.  [default: the recipe's teacher]",
)
@SET_OPTION
def embed(
    recipe: str,
    out: Path | None,
    views: int | None,
    dtype: str | None,
    teachers: tuple[Path, ...],
    sets: tuple[str, ...],
) -> None:
    """Embed a recipe's training data with its teacher, once.

    Training with `teacher.cache` looks the embeddings up instead of running the teacher. What is finished is not done
    again, also after a kill. Under torchrun processes share the work.
    """
    from clipress.recipe import read_recipe

    read = read_recipe(_recipe_path(recipe), sets)
    from clipress.compress.teacher_cache import embed_recipe

    folders = embed_recipe(_checked(read), out, views, dtype, teachers, click.echo)
    from clipress.storage import is_first_process

    if is_first_process():
        click.echo(f"{len(folders)} caches: {', '.join(map(str, folders))}")


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--stage", "stages", multiple=True, help="Only this artefact; may be given several times.  [default: all]"
)
@click.option("--tensorrt", is_flag=True, help="Build TensorRT engines too, and fail where that cannot be done.")
@click.option("--precision", type=click.Choice(["fp32", "fp16", "bf16"]), help="Of engines.  [default: the recipe's]")
@click.option("--foreign", is_flag=True, help="Build an ONNX file that clipress did not make.")
@click.option("--labels", help="Also write classifier.onnx, an image classifier of these names, split by commas.")
@click.option("--labels-file", type=FILE, help="The same from a text file, one per line, or `imagenet`.")
@click.option("--template", "templates", multiple=True, help=f"{TEMPLATES}  [default: the recipe's]")
@click.option(
    "--verify",
    "verified",
    is_flag=True,
    help="Export nothing: run the self-tests of exported files on this machine. RUN may be an export folder or a file.",
)
def export(
    run: Path,
    stages: tuple[str, ...],
    tensorrt: bool,
    precision: str | None,
    foreign: bool,
    labels: str | None,
    labels_file: Path | None,
    templates: tuple[str, ...],
    verified: bool,
) -> None:
    """Export a run's artefacts to ONNX, each checked against torch, and to TensorRT, each checked against ONNX Runtime.

    RUN may be one ONNX file, taken to the machine with the GPU on its own: clipress export image.onnx --tensorrt

    Every file carries a self-test, so that a machine or a runtime on which INT8 overflows is noticed. clipress runs it when
    it opens a file; to run it by hand where files were copied to: clipress export --verify FOLDER
    """
    if verified:
        if stages or tensorrt or precision or foreign or labels is not None or labels_file or templates:
            raise RecipeError("--verify exports nothing and takes no other option.")
        _verify(run)
        return
    if not tensorrt and (precision or foreign):
        raise RecipeError("--precision and --foreign are about engines: add --tensorrt.")
    if run.suffix == ".onnx":
        if not tensorrt:
            raise RecipeError(
                f"{run} is exported already. To build its TensorRT engine: clipress export {run} --tensorrt"
            )
        if labels is not None or labels_file or templates:
            raise RecipeError("A classifier is put together from both towers: give --labels with the run folder.")
        _engine(run, precision, foreign)
        return
    plan = _plan_of(run)
    _hold(run)
    names = [_chosen(plan, stage) for stage in stages] or plan.artifacts
    asked = _label_settings(labels, labels_file, templates)
    if templates and not any((plan.recipe.export.get("onnx") or {}).get(key) or asked.get(key) for key in LABELS):
        raise RecipeError("--template is about the prompts of a classifier's labels: add --labels or --labels-file.")
    _export(run, plan, names, **asked)
    _engines(run, plan, names, tensorrt, precision)


def _verify(source: Path) -> None:
    from clipress.export.verify import verify
    from clipress.runtime.cpu import processor

    click.echo(str(processor()))
    for one in verify(source):
        mode = ", in exact mode" if one.exact_mode else ""
        click.echo(
            f"{one.path}: {one.precision}, agrees with exact arithmetic (least cosine {one.least_cosine:.6f}{mode}; "
            f"{one.milliseconds:.0f} ms)"
        )


class RunByDefault(click.Group):
    """`bench RUN` is `bench run RUN`; `bench costs RUN` is a command of its own. The same for `serve`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        known = not args or args[0] in (*self.commands, *ctx.help_option_names)
        return super().parse_args(ctx, args if known else ["run", *args])


class BenchCommands(RunByDefault):
    """`bench RUN --backend triton` is `bench load RUN`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for at, word in enumerate(args):
            length = 1 if word == "--backend=triton" else 2 if args[at : at + 2] == ["--backend", "triton"] else 0
            if length:
                left = args[:at] + args[at + length :]
                return super().parse_args(ctx, ["load", *(left[1:] if left[:1] == ["run"] else left)])
        return super().parse_args(ctx, args)


@main.group(cls=BenchCommands)
def bench() -> None:
    """Measure accuracy, size and latency: clipress bench RUN. Its options: clipress bench run --help.

    Of a server: clipress bench RUN --backend triton. Its options: clipress bench load --help.
    """


@bench.command("run")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--stage",
    "stages",
    multiple=True,
    help="Artefact; may be given several times.  [default: all; of several runs the last]",
)
@click.option(
    "--runner",
    "--backend",
    "backends",
    multiple=True,
    help="onnxruntime, onnxruntime-cuda, torch, torch-compiled or tensorrt; may be given several times; or triton, see "
    "clipress bench load --help.  [default: the recipe's]",
)
@click.option("--batch", type=click.IntRange(1), multiple=True, help="May be given several times.")
@click.option("--threads", type=click.IntRange(1), help="Inside one operator.")
@click.option("--cpus", help="CPUs to stay on, split by commas; 'any': wherever the system likes.")
@click.option("--warm-up", type=click.IntRange(0), help="Milliseconds.")
@click.option("--duration", type=click.IntRange(0), help="Milliseconds per model, tower and batch, at least.")
@click.option("--iterations", type=click.IntRange(1), help="Queries per model, tower and batch, at least.")
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), help="Of the torch runners; bf16 needs a GPU.")
@click.option("--two-four", is_flag=True, default=None, help="2:4 weights as such in torch; needs a GPU and bf16.")
@click.option("--profile", is_flag=True, help="Also tell where ONNX Runtime spends its time, by operator and block.")
@click.option("--no-accuracy", is_flag=True, help="Measure cost and latency only.")
@click.option(
    "--fail-if",
    "gates",
    multiple=True,
    metavar="GATE",
    help="Exit with 1 if this is true, such as 'p99_ms > 10' or 'p99_ms{stage=int8, batch=8} > 10'; several allowed.",
)
@click.option(
    "--out", type=FOLDER, help="Where the figures go.  [default: RUN/bench; RUN/bench/compared for a comparison]"
)
@click.pass_context
def bench_run(
    ctx: click.Context,
    runs: tuple[Path, ...],
    stages: tuple[str, ...],
    cpus: str | None,
    profile: bool,
    no_accuracy: bool,
    gates: tuple[str, ...],
    out: Path | None,
    **asked: Any,
) -> None:
    """Measure artefacts side by side. `clipress bench RUN` is the same.

    One RUN: all its artefacts. With --stage, or several RUNs: a comparison with the first one named, every ratio with a
    95 % interval. All take turns in one process; settings and data are those of the first run's recipe.
    """
    from clipress.bench.fail_if import broken, check, gate_from
    from clipress.bench.report import comparison
    from clipress.bench.settings import Backend, BenchSettings
    from clipress.recipe import checked

    wanted = [gate_from(text) for text in gates]
    plans = [_plan_of(run) for run in runs]
    for backend in asked["backends"]:
        if backend not in get_args(Backend):
            raise RecipeError(f"--runner {backend}: there is no such runner.{nearest(backend, get_args(Backend))}")
    asked |= {"cpus": _cpus(cpus)}
    raw = {**plans[0].recipe.bench, **{key: value for key, value in asked.items() if value not in (None, ())}}
    settings = checked(BenchSettings, raw, "bench")
    if len(runs) == 1:
        chosen = [(runs[0], plans[0], [_chosen(plans[0], name) for name in stages] or plans[0].artifacts)]
    else:
        chosen = [
            (run, plan, [_chosen(plan, name) for name in stages or (None,)])
            for run, plan in zip(runs, plans, strict=True)
        ]
    compared = len(runs) > 1 or bool(stages)
    subjects = _subjects([(run, stage) for run, _, names in chosen for stage in names], len(runs) > 1)
    sets = [] if no_accuracy else _test_sets(plans[0])
    check(wanted, [subject.name for subject in subjects], settings.backends, settings.batch, [s.name for s in sets])
    if any(not backend.startswith("torch") for backend in settings.backends):
        for run, plan, names in chosen:
            _hold(run)
            _export(run, plan, names)
    results = _bench(
        subjects,
        settings,
        sets,
        out or runs[0] / "bench" / ("compared" if compared else ""),
        {"recipe": plans[0].recipe.name, "command": _command(ctx)},
        profiled=profile,
    )
    if compared:
        click.echo(comparison(results))
    _tell_broken(ctx, broken(wanted, results))


def _tell_broken(ctx: click.Context, broken: list[str]) -> None:
    """Exit with 1 where a gate is broken."""
    for line in broken:
        click.echo(f"Broken: {line}", err=True)
    if broken:
        ctx.exit(1)


def _cpus(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [] if text == "any" else [int(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"--cpus {text}: numbers split by commas are asked for, such as 0,1, or 'any'.") from None


def _subjects(artifacts: list[tuple[Path, str]], several_runs: bool) -> list[Subject]:
    """Name what is measured: by its stage, by run and stage where there are several runs; the same one twice is told apart."""
    from clipress.bench.run import Subject

    names: list[str] = []
    for run, stage in artifacts:
        name = f"{run.resolve().name}/{stage}" if several_runs else stage
        number = sum(known == name or known.startswith(f"{name} #") for known in names)
        names.append(f"{name} #{number + 1}" if number else name)
    return [
        Subject(name, run / stage, run / "export" / stage) for name, (run, stage) in zip(names, artifacts, strict=True)
    ]


def _command(ctx: click.Context) -> str:
    """Return the command as it was typed, for the record."""
    import shlex

    name = [] if ctx.info_name == "run" else [ctx.info_name]
    words = ["clipress", "bench", *name, *map(str, ctx.params.get("runs") or [ctx.params["run"]])]
    for option in ctx.command.params:
        value = ctx.params.get(option.name)
        if isinstance(option, click.Option) and value not in (None, (), False):
            for one in value if isinstance(value, tuple) else (value,):
                words += [option.opts[0]] if one is True else [option.opts[0], str(one)]
    return shlex.join(words)


@bench.command("load")
@RUN_ARGUMENT
@STAGE_OPTION
@click.option("--url", help="A server that runs, http://host:8000 or grpc://host:8001.  [default: one for RUN, here]")
@click.option(
    "--model",
    "models",
    multiple=True,
    help="embed_image, image_encoder or embed_text; may be given several times.  [default: all]",
)
@click.option("--concurrency", help="Requests at any time, such as 1,8,32 or 1:32, which doubles.  [default: 1,8,32]")
@click.option("--request-rate", help="Requests per second, answered or not, such as 100,200 or 100:500:100.")
@click.option("--window", type=click.IntRange(1), default=2000, show_default=True, help="Milliseconds.")
@click.option("--warm-up", type=click.IntRange(0), default=1000, show_default=True, help="Milliseconds per load.")
@click.option(
    "--stability",
    type=click.FloatRange(0),
    default=10,
    show_default=True,
    help="Percent by which the last three windows may differ; else there are more of them.",
)
@click.option("--trials", type=click.IntRange(3), default=10, show_default=True, help="Windows at most.")
@click.option(
    "--fail-if",
    "gates",
    multiple=True,
    metavar="GATE",
    help="Exit with 1 if this is true, such as 'p99_ms{model=embed_image, concurrency=32} > 50'; several allowed.",
)
@click.option("--out", type=FOLDER, help="Where load.json goes.  [default: RUN/bench]")
@click.pass_context
def bench_load(
    ctx: click.Context,
    run: Path,
    stage: str | None,
    url: str | None,
    models: tuple[str, ...],
    concurrency: str | None,
    request_rate: str | None,
    gates: tuple[str, ...],
    out: Path | None,
    **measured: float,
) -> None:
    """Put load on a Triton server. `clipress bench RUN --backend triton` is the same.

    Without --url, one is started for RUN's repository, and stopped. Requests are RUN's test pictures, and texts that no
    request had before.
    """
    from clipress.bench.fail_if import gate_from
    from clipress.bench.server.load import Windows
    from clipress.bench.server.run import (
        MODELS,
        PLACES,
        bench_server,
        broken_by_load,
        load_table,
        loads_from,
        places_of,
        questions,
        write_load,
    )
    from clipress.runtime.export_folder import read_export
    from clipress.serve.client import address_from

    for model in models:
        if model not in MODELS:
            raise RecipeError(f"--model {model}: load is not made for it.{nearest(model, MODELS)}")
    loads, wanted = loads_from(concurrency, request_rate), [gate_from(text, PLACES) for text in gates]
    broken_by_load(wanted, places_of(models or MODELS, loads))
    plan = _plan_of(run)
    name = _chosen(plan, stage) if stage else _served(run, plan)
    server = address_from(url) if url else None
    if url is None:
        _export(run, plan, [name])
    made = questions(read_export(_exported(run, name)), _test_sets(plan))
    asked = [made[model] for model in dict.fromkeys(models or MODELS)]
    about = {"recipe": plan.recipe.name, "stage": name, "command": _command(ctx)}
    with _server_of(run, plan, name) if url is None else nullcontext(server) as there:
        results = bench_server(there, asked, loads, Windows(**measured), about)
    written = write_load(results, out or run / "bench")
    click.echo(f"{load_table(results)}\nFigures, and every request's times: {written}")
    _tell_broken(ctx, broken_by_load(wanted, results["rows"]))


@contextmanager
def _server_of(run: Path, plan: Plan, stage: str) -> Iterator[tuple[str, str, bool]]:
    """Serve a run here, by the repository of the python backend, which is written if need be."""
    from clipress.serve.triton_install import find_triton
    from clipress.serve.triton_server import TritonServer

    repository = _serve(run, plan, stage, ("python",), None)["python"]
    with TritonServer(repository, triton=find_triton(click.echo)) as server:
        yield "http", server.http, False


@bench.command()
@RUN_ARGUMENT
@click.option("--stage", help="Artefact whose blocks are measured.  [default: the first one]")
@click.option("--out", type=FILE, required=True, help="Where the table goes.")
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--duration", type=click.IntRange(1), default=200, show_default=True, help="Milliseconds per width.")
def costs(run: Path, stage: str | None, out: Path, batch: int, threads: int, duration: int) -> None:
    """Measure what blocks cost at smaller widths here: the table that a latency budget of `prune` reads."""
    import json

    from clipress.bench.latency_table import cost_table
    from clipress.progress import progress_bar
    from clipress.runtime.cpu import processor
    from clipress.storage import write_text_whole
    from clipress.tasks import model_from_artifact

    plan = _plan_of(run)
    model = model_from_artifact(run / (_chosen(plan, stage) if stage else plan.artifacts[0]))
    with progress_bar(8, "costs", "kind") as bar:
        table = cost_table(model, batch, threads, duration, lambda _: bar.update())
    write_text_whole(out, json.dumps(table | {"conditions": processor().record()}, indent=1) + "\n")
    click.echo(f"Cost table: {out}. Use it: prune: {{budget: {{latency: 0.5, costs: {out}}}}}")


@main.group(cls=RunByDefault)
def serve() -> None:
    """Write what a server needs: clipress serve RUN. Its options: clipress serve run --help."""


@serve.command("run")
@RUN_ARGUMENT
@click.option("--stage", help="Name of the artefact.  [default: what bench keeps of the last one]")
@click.option(
    "--backend",
    "backends",
    multiple=True,
    help="onnxruntime, python or tensorrt; may be given several times.  [default: the recipe's]",
)
@click.option("--max-batch", type=click.IntRange(1), help="Largest batch the server makes.  [default: the recipe's]")
@click.option("--version", type=click.IntRange(1), help="Write nothing new; let this version of the models be served.")
@click.option("--roll-back", is_flag=True, help="The same with the version before the one that is served.")
@click.option("--run", "start", is_flag=True, help="Then start Triton on the one of the python backend, until Ctrl-C.")
@click.option("--host", help="Interface that the server listens on.  [default: 127.0.0.1]")
@click.option("--http-port", type=PORT, help="[default: any free one]")
@click.option("--grpc-port", type=PORT, help="[default: any free one]")
@click.option("--metrics-port", type=PORT, help="[default: any free one]")
def serve_run(
    run: Path,
    stage: str | None,
    backends: tuple[str, ...],
    max_batch: int | None,
    version: int | None,
    roll_back: bool,
    start: bool,
    **listen: Any,
) -> None:
    """Write Triton model repositories from an artefact of a run, and with --run serve it here. `clipress serve RUN` is
    the same.

    A changed export becomes a new version of the models. The server is the `tritonserver` on PATH; where there is none, one
    is fetched once, some 60 MB.
    """
    if not start and _given(**listen):
        raise RecipeError("--host and the ports are about a server that runs: add --run.")
    plan = _plan_of(run)
    with _held(run):
        if version or roll_back:
            repositories = _serve_version(run, plan, backends or None, max_batch, version)
        else:
            name = _chosen(plan, stage) if stage else _served(run, plan)
            _export(run, plan, [name])
            repositories = _serve(run, plan, name, backends or None, max_batch)
    if start:
        from clipress.serve.triton_server import serve_until_stopped

        if "python" not in repositories:
            raise RecipeError(
                f"--run serves the python backend; found {', '.join(repositories)}: add --backend python."
            )
        serve_until_stopped(repositories["python"], click.echo, **_given(**listen))


@serve.command("index")
@click.argument("images", required=False)
@click.option("--out", type=FOLDER, required=True, help="The index: made, replaced, or changed.")
@click.option("--run", type=FOLDER, help="Run folder whose exported image tower embeds.")
@STAGE_OPTION
@click.option("--model", type=FOLDER, help="An export folder, or an exported artefact, instead of a run.")
@click.option(
    "--kind",
    type=click.Choice(["flat", "ivf", "hnsw"]),
    help="flat is exact; the others look at a part only.  [default: flat up to a million pictures, then ivf]",
)
@click.option("--add", is_flag=True, help="Put the pictures into the index that is there.")
@click.option("--remove", multiple=True, metavar="KEY", help="Take an entry out; may be given several times.")
@click.option("--threads", type=click.IntRange(0), default=0, show_default=True, help="0: one per core.")
def serve_index(
    images: str | None,
    out: Path,
    run: Path | None,
    stage: str | None,
    model: Path | None,
    kind: str | None,
    add: bool,
    remove: tuple[str, ...],
    threads: int,
) -> None:
    """Embed pictures, a folder of them or webdataset shards, and make an index to search them by text.

    What is embedded already is kept when this is stopped, and the next run goes on there. Pictures that cannot be read
    are left out and named. An entry's key is its path, or shard and record.
    """
    if remove:
        if images or add or kind or run or model:
            raise click.UsageError("--remove is given with --out alone.")
        from clipress.serve.index import change_index

        left = change_index(out, remove)
        click.echo(f"{len(remove)} entries are taken out, {left.count:,} are left: {out}")
        return
    if images is None:
        raise click.UsageError("IMAGES is asked for: a folder of pictures, or shards.")
    if (run is None) == (model is None):
        raise click.UsageError("Either --run or --model is asked for.")
    if add and kind:
        raise click.UsageError("--kind is chosen when an index is made; --add keeps it.")
    from clipress.serve.indexing import index_images

    export = _exported(run, _chosen(_plan_of(run), stage)) if run else _export_of(model)
    made = index_images(images, export, out, kind, threads, add, lambda line: click.echo(line, err=True))
    click.echo(f"Index of {made.count:,} pictures, {made.dim} numbers each, {made.kind}: {out}")


@main.command()
@click.argument("images", nargs=-1, required=True, metavar="[RUN] IMAGES...", type=click.Path(path_type=Path))
@click.option("--labels", help="Names to choose from, split by commas.")
@click.option("--labels-file", type=FILE, help="The same from a text file, one per line.")
@click.option(
    "--template",
    "templates",
    multiple=True,
    default=("a photo of a {}",),
    show_default=True,
    help="Prompt; may be given several times.",
)
@STAGE_OPTION
@click.option("--url", help="Ask a server instead of a run: http://host:8000 or grpc://host:8001.")
@click.option(
    "--in-flight", type=click.IntRange(1), default=16, show_default=True, help="Requests to a server at once."
)
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=60, show_default=True, help="Seconds.")
@click.option("--json", "as_json", is_flag=True, help="A line of JSON per picture, with every label's probability.")
def predict(
    images: tuple[Path, ...],
    labels: str | None,
    labels_file: Path | None,
    templates: tuple[str, ...],
    stage: str | None,
    url: str | None,
    in_flight: int,
    timeout: float,
    as_json: bool,
) -> None:
    """Classify pictures among labels, with ONNX Runtime alone, or by a server that --url names.

    IMAGES are pictures, folders of them, or - to read paths from standard input. A server's answers are printed as they
    come, and what it cannot take is told at the end.
    """
    from clipress.serve.classify import Classifier, labels_from

    names = labels_from(labels, labels_file)
    if url is not None:
        if stage:
            raise click.UsageError("--stage is about a run; a server has its own.")
        pictures = _pictures(images)
        if Path("-") not in images:  # so that the bar knows how many there are
            pictures = list(pictures)
        _predict_by(url, pictures, names, templates, in_flight, timeout, as_json)
        return
    run, *given = images
    if not given:
        raise click.UsageError("Missing argument 'IMAGES...': pictures after the run, or --url.")
    plan = _plan_of(run)
    classifier = Classifier(_exported(run, _chosen(plan, stage)))
    pictures = list(_pictures(given))
    for image, row in zip(pictures, classifier.probabilities(pictures, names, templates), strict=True):
        click.echo(_prediction(image, names, row, as_json))


def _predict_by(
    url: str,
    pictures: Iterable[Path],
    names: list[str],
    templates: tuple[str, ...],
    in_flight: int,
    timeout: float,
    as_json: bool,
) -> None:
    import json
    import sys

    from clipress.serve.client import Client

    total, failed = 0, []
    bar = not sys.stdout.isatty()  # on a screen the answers themselves show how far it is
    with Client(url, timeout=timeout, in_flight=in_flight, progress=bar) as client:
        for total, answer in enumerate(client.classified(pictures, names, templates), 1):  # noqa: B007
            if answer.value is not None:
                click.echo(_prediction(answer.item, names, answer.value, as_json))
                continue
            failed.append(f"{answer.item}: {answer.error}")
            if as_json:
                click.echo(json.dumps({"image": str(answer.item), "error": answer.error}))
            else:
                click.echo(failed[-1], err=True)
    if failed:
        raise DataError(f"{len(failed)} of {total} pictures are not classified; the first: {failed[0]}")


def _pictures(given: Iterable[Path]) -> Iterator[Path]:
    """Yield pictures one by one: of a folder all, of `-` those that standard input names."""
    from clipress.data.formats.files import images_under

    for path in given:
        if str(path) == "-":
            yield from (Path(line.rstrip("\r\n")) for line in click.get_text_stream("stdin") if line.strip())
        elif path.is_dir():
            yield from (path / name for name in images_under(path))
        else:
            yield path


def _prediction(image: Path, names: list[str], row: Any, as_json: bool) -> str:
    if as_json:
        import json

        shares = {name: round(float(share), 6) for name, share in zip(names, row, strict=True)}
        return json.dumps({"image": str(image), "probabilities": shares})
    ranked = sorted(zip(names, row, strict=True), key=lambda pair: -pair[1])
    return f"{image}: " + "  ".join(f"{name} {float(p):.1%}" for name, p in ranked[:5])


@main.command("eval")
@RUN_ARGUMENT
@STAGE_OPTION
@click.option("--split", type=click.Choice(["val", "test"]), default="test", show_default=True)
@click.option("--compare", metavar="STAGE", help="Another artefact: print the difference to it, item by item.")
@click.option("--linear-probe", is_flag=True, help="Also fit a linear classifier to image embeddings of training data.")
@click.option("--json", "out", type=FILE, help="Write the figures to a file too.")
def evaluate_(
    run: Path, stage: str | None, split: str, compare: str | None, linear_probe: bool, out: Path | None
) -> None:
    """Print an artefact's accuracy in torch, without exporting it.

    Each figure has its standard error. A difference has the 95 % interval of a paired bootstrap: both artefacts answer
    the same items.
    """
    from clipress.data.eval_sets import evalsets, probe_sets
    from clipress.data.sources import fingerprint
    from clipress.metrics.outcomes import paired_difference, percent, standard_error

    plan = _plan_of(run)
    specs = getattr(plan.data, split)
    if not specs:
        raise RecipeError(f"The recipe of {run} names no '{split}' data to evaluate on.")
    name, other = _chosen(plan, stage), _chosen(plan, compare, "--compare") if compare else None
    sets, probes = evalsets(specs), probe_sets(specs, plan.data.train) if linear_probe else []
    items = _items(run / name, sets, probes)
    others = _items(run / other, sets, probes) if other else {}
    if other:
        click.echo(f"{name} minus {other}, with the 95 % interval of a paired bootstrap, on the right")
    metrics: dict[str, dict[str, Any]] = {}
    for key, outcomes in items.items():
        value, error = percent(outcomes), standard_error(outcomes)
        metrics[key] = {"percent": value, "se": error, "items": len(outcomes.values), "tied": outcomes.tied}
        line = f"{key:<32} {value:6.2f} ± {error:4.2f} %"
        if other:
            found = paired_difference(outcomes, others[key])
            metrics[key] |= {"difference": found.value, "interval": [found.low, found.high]}
            line += f"   {found.value:+6.2f} [{found.low:+.2f}, {found.high:+.2f}]"
        click.echo(line)
    if out:
        import json

        from clipress.storage import write_text_whole

        conditions = {"clipress": __version__, "backend": "torch", "split": split, "data": fingerprint(specs)}
        content = {"schema_version": 1, "stage": name, "compare": other, "conditions": conditions, "metrics": metrics}
        write_text_whole(out, json.dumps(content, indent=1) + "\n")
        click.echo(f"Figures: {out}")


def _items(artifact: Path, sets: list[EvalSet], probes: list[tuple[EvalSet, EvalSet]]) -> dict[str, Outcomes]:
    """Evaluate an artefact in torch; on pairs of a training and a test set, by linear probe."""
    from clipress.metrics.evaluate import encode_all, evaluate_items
    from clipress.metrics.probe import linear_probe
    from clipress.tasks import model_from_artifact

    model = model_from_artifact(artifact)
    encode_image, encode_text = model.encoders()
    items = evaluate_items(encode_image, encode_text, sets, model.preprocess, model.tokenize())
    for train, test in probes:
        features = [encode_all(encode_image, part.pixel_batches(model.preprocess)) for part in (train, test)]
        found = linear_probe(features[0], train.labels(), features[1], test.labels())
        items |= {f"{test.name}/{metric}": outcomes for metric, outcomes in found.items()}
    return items


@main.command("import")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=FOLDER)
@click.option(
    "--format", "form", default="auto", show_default=True, help="openai, open_clip, clip-kd, tinyclip, upop or auto."
)
@click.option("--model", help="An open_clip model name, where the file cannot tell its architecture.")
def import_(checkpoint: Path, out: Path, form: str, model: str | None) -> None:
    """Turn a foreign CLIP checkpoint into an artefact, to be a recipe's teacher."""
    from clipress.artifact import HEADER, save_artifact

    if out.exists() and not (out / HEADER).is_file():
        raise ArtifactError(
            f"{out} was asked for; it is there and is no artefact. Nothing was changed: choose another."
        )
    from clipress.models.importers import artifact_from_checkpoint

    artifact = artifact_from_checkpoint(checkpoint, form, model)
    save_artifact(artifact, out)
    click.echo(f"{checkpoint}: {artifact.lineage[0]['format']}, {artifact.counts['params']:,} parameters -> {out}")


@main.command()
@click.argument("file", type=FILE)
@click.option("--runs", type=FOLDER, help="Where the runs go.  [default: runs/studies/<name>]")
@click.option("--out", type=FOLDER, default=Path("studies"), show_default=True, help="Where the tables go.")
@click.option(
    "--jobs", type=click.IntRange(1), default=1, show_default=True, help="Runs at a time; they share the cores."
)
def study(file: Path, runs: Path | None, out: Path, jobs: int) -> None:
    """Run methods × ratios × seeds and gather them into one table; measure what a step costs where the file asks.

    Each run has a process of its own, so that its memory can be measured. Finished runs are not done again.
    """
    from clipress.studies.methods import run_study

    click.echo(run_study(file, runs, out, jobs))


@main.group()
def data() -> None:
    """Look at, gather and choose data."""


@data.command()
@click.argument("folder", type=FOLDER)
@click.option("--format", "form", type=click.Choice(["scenes", "digits"]), default="digits", show_default=True)
@click.option("--count", type=click.IntRange(1, 500), default=10, show_default=True)
def pictures(folder: Path, form: str, count: int) -> None:
    """Write pictures of an embedded set's test split as PNG files, with their captions beside them."""
    from PIL import Image

    from clipress.data.sources import open_source
    from clipress.data.spec import SourceSpec

    source = open_source(SourceSpec(format=form, split="test", limit=count))
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(len(source)):
        Image.fromarray(source.image(index)).save(folder / f"{form}-{index:03}.png")
        (folder / f"{form}-{index:03}.txt").write_text("\n".join(source.captions(index)) + "\n", encoding="utf-8")
    click.echo(f"{len(source)} pictures in {folder}")


@data.command()
@click.argument("classes", type=FILE)
@click.option("--template", "templates", multiple=True, default=("a photo of a {}",), show_default=True, help=TEMPLATES)
@click.option("--out", type=FILE, required=True, help="A text file, one prompt per line; .json: prompts by class.")
def prompts(classes: Path, templates: tuple[str, ...], out: Path) -> None:
    """Write the prompts of a class list: a file with one name per line, or `imagenet`."""
    import json

    from clipress.data.prompts import prompts_by_class, read_classes, read_templates
    from clipress.storage import write_text_whole

    shapes = [shape for template in templates for shape in read_templates(template)]
    told = prompts_by_class(read_classes(classes).names, shapes)
    lines = [prompt for _, own in told for prompt in own]
    by_class: dict[str, list[str]] = {}
    for name, own in told:
        by_class.setdefault(name, own)  # the same name has the same prompts
    text = json.dumps(by_class, indent=1, ensure_ascii=False) if out.suffix == ".json" else "\n".join(lines)
    write_text_whole(out, text + "\n")
    click.echo(f"{len(lines)} prompts of {len(told)} classes: {out}")


@data.command()
@click.argument("urls", type=FILE)
@click.option("--out", type=FOLDER, required=True, help="Where the shards go.")
@click.option(
    "--size", type=click.IntRange(16), default=256, show_default=True, help="Shorter side at most, in pixels."
)
@click.option("--per-shard", type=click.IntRange(1), default=10_000, show_default=True, help="Pictures per shard.")
@click.option("--processes", type=click.IntRange(1), default=1, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=64, show_default=True, help="Downloads at once.")
@click.option("--timeout", type=click.IntRange(1), default=10, show_default=True, help="Seconds per picture.")
@click.option("--url-key", default="url", show_default=True, help="Column of a csv, jsonl or parquet file.")
@click.option("--caption-key", default="caption", show_default=True, help="Column of a csv, jsonl or parquet file.")
def download(urls: Path, out: Path, **settings: Any) -> None:
    """Download pictures by a table of addresses and captions, such as Conceptual Captions' TSV files."""
    from clipress.data.download import download

    download(urls, out, **settings)
    click.echo(f"Shards: {out}. Use them: data: {{train: [{{format: webdataset, shards: {out}}}]}}")


@data.command("filter")
@click.argument("images", type=FOLDER)
@click.option("--prompts", "prompts_file", type=FILE, required=True, help="One prompt per line, or JSON.")
@click.option("--model", type=FOLDER, required=True, help="Artefact of the teacher that compares.")
@click.option("--keep", type=click.FloatRange(0, 1, min_open=True), help="Part of the pictures to keep.")
@click.option("--count", type=click.IntRange(1), help="Number of pictures to keep.")
@click.option(
    "--near-duplicates",
    type=click.FloatRange(-1, 1),
    metavar="COSINE",
    help="Leave out pictures this near to a better one, such as 0.95.",
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Pictures decoded at once.")
@click.option("--out", type=FILE, required=True, help="The list: a TSV with filepath, score and prompt.")
def filter_(
    images: Path,
    prompts_file: Path,
    model: Path,
    keep: float | None,
    count: int | None,
    near_duplicates: float | None,
    threads: int,
    out: Path,
) -> None:
    """Keep the pictures that a teacher finds nearest to a list of prompts."""
    if (keep is None) == (count is None):
        raise click.UsageError("Either --keep or --count is asked for.")
    import torch

    from clipress.data.filter import embeddings, nearest_to_prompts, table
    from clipress.data.prompts import read_prompts
    from clipress.data.sources import open_source
    from clipress.data.spec import SourceSpec
    from clipress.metrics.evaluate import encode_texts
    from clipress.progress import progress_bar
    from clipress.storage import write_text_whole
    from clipress.tasks import model_from_artifact

    texts = read_prompts(prompts_file)
    source = open_source(SourceSpec(format="images", images=images))
    teacher = model_from_artifact(model)
    teacher.module.to("cuda" if torch.cuda.is_available() else "cpu")
    encode_image, encode_text = teacher.encoders()
    with progress_bar(len(source), "filter", "picture") as bar:
        seen, indices = embeddings(source, encode_image, teacher.preprocess, threads=threads, done=bar.update)
    wanted = encode_texts(encode_text, teacher.tokenize(), texts)
    chosen = nearest_to_prompts(seen, wanted, count or max(round(keep * len(source)), 1), near_duplicates)
    write_text_whole(out, table([source.paths[int(index)] for index in indices], chosen, texts))
    use = f"{{format: images, images: {images}, annotations: {out}}}"
    click.echo(f"{len(chosen)} of {len(source)} pictures: {out}. Use them: data: {{train: [{use}]}}")


@main.command()
@click.argument("artifact", type=FOLDER)
def show(artifact: Path) -> None:
    """Print what an artefact is and what was done to it, or what a run folder holds."""
    from clipress.artifact import read_header

    if (artifact / "recipe.yaml").is_file():
        plan = _plan_of(artifact)
        for name in plan.artifacts:
            there = (artifact / name / "clipress.json").is_file()
            counts = read_header(artifact / name)["counts"] if there else {}
            click.echo(f"{name:<12} " + (f"{counts['params']:>12,} parameters" if there else "not made yet"))
        return
    header = read_header(artifact)
    counts = header["counts"]
    click.echo(
        f"parameters {counts['params']:,} (without embeddings {counts['params_without_embeddings']:,}, "
        f"in blocks {counts['block_params']:,})"
    )
    for name, shape in header["shapes"].items():
        if "heads" not in shape:
            click.echo(f"  {name}: " + ", ".join(f"{key} {value}" for key, value in shape.items()))
            continue
        click.echo(f"  {name}: {shape['heads']} heads, qk {shape['qk_dim']}, v {shape['v_dim']}, ffn {shape['ffn']}")
    for key in ("sparsity", "quantization"):
        if header.get(key):
            held = header[key].get("weights") or header[key].get("modules")
            bits = {True: ", weights in 7 bits", False: ", weights in 8 bits"}.get(header[key].get("portable"), "")
            click.echo(f"{key}: {header[key].get('pattern') or header[key].get('dtype')} on {len(held)} layers{bits}")
            for name, reason in header[key].get("skipped", {}).items():
                click.echo(f"  {name} stays dense: {reason}")
    for record in header["lineage"]:
        click.echo(f"stage {record['stage']} ({record.get('kind', 'start')}) {record['hash']}")
    for key, value in header["metrics"].get("accuracy", {}).items():
        click.echo(f"  {key} {value:.2f} % ({header['metrics']['conditions']['split']})")


def _recipe_path(text: str) -> Path:
    """A file, or the name of a recipe that is shipped."""
    path, shipped = Path(text), Path(__file__).parent / "configs"
    if path.suffix in (".yaml", ".yml") or path.exists():
        return path
    names = {file.stem: file for file in shipped.glob("*.yaml")}
    if text not in names:
        raise RecipeError(
            f"Recipe '{text}' was asked for; it is neither a file nor a shipped recipe.{nearest(text, names)}"
        )
    return names[text]


def _compress(recipe: str, out: Path | None, sets: tuple[str, ...], resume: bool) -> tuple[Path, Plan]:
    from clipress.recipe import read_recipe

    read = read_recipe(_recipe_path(recipe), sets)
    from clipress.compress import pipeline  # after the recipe's outline is known to be right: this import takes seconds
    from clipress.compress.fabric import shut_down_distributed

    plan = _checked(read)
    folder = out or Path("runs") / read.name
    pipeline.compress(read, folder, click.echo, fresh=not resume)
    shut_down_distributed()
    return folder, plan


def _hold(run: Path) -> None:
    """Hold a run folder for this process until the command ends, and remove what killed ones left in it."""
    click.get_current_context().with_resource(_held(run))


@contextmanager
def _held(run: Path) -> Iterator[None]:
    from clipress.storage import locked, sweep

    with locked(run):
        sweep(run)
        yield


def _checked(recipe: Any) -> Plan:
    """Check every room's section before any work is done."""
    from clipress.bench.settings import BenchSettings
    from clipress.compress.plan import plan_from
    from clipress.export.settings import ExportSettings
    from clipress.recipe import checked
    from clipress.serve.settings import ServeSettings

    checked(ExportSettings, recipe.export, "export")
    checked(BenchSettings, recipe.bench, "bench")
    checked(ServeSettings, recipe.serve, "serve")
    return plan_from(recipe)


def _plan_of(run: Path) -> Plan:
    """Read the recipe that a run folder keeps."""
    from clipress.recipe import read_recipe

    kept = run / "recipe.yaml"
    if not kept.is_file():
        found = "no recipe.yaml in it" if run.is_dir() else "a file" if run.exists() else "no such folder"
        raise ArtifactError(
            f"A run folder was asked for at {run}; there is {found}. Make one with: clipress compress RECIPE"
        )
    return _checked(read_recipe(kept))


def _chosen(plan: Plan, stage: str | None, option: str = "--stage") -> str:
    if stage is not None and stage not in plan.artifacts:
        raise RecipeError(f"{option} {stage}: the run has no such artefact.{nearest(stage, plan.artifacts)}")
    return stage or plan.artifacts[-1]


def _exported(run: Path, stage: str) -> Path:
    folder = run / "export" / stage
    if not (folder / "export.json").is_file():
        raise ArtifactError(f"{folder} was asked for, and {stage} is not exported yet. Do: clipress export {run}")
    return folder


def _export_of(model: Path) -> Path:
    """Return an export folder, be it named itself or by the artefact that it was made of."""
    from clipress.artifact import HEADER

    return _exported(model.parent, model.name) if (model / HEADER).is_file() else model


def _test_sets(plan: Plan) -> list[EvalSet]:
    from clipress.data.eval_sets import evalsets

    return evalsets(plan.data.test or plan.data.val or plan.data.train)


def _label_settings(labels: str | None, file: Path | None, templates: tuple[str, ...]) -> dict[str, Any]:
    """Return the settings that options of `export` stand for; a list of labels takes the place of the recipe's."""
    given: dict[str, Any] = {"templates": templates if len(templates) != 1 else templates[0]} if templates else {}
    if labels is None and file is None:
        return given
    names = None if labels is None else [name.strip() for name in labels.split(",") if name.strip()]
    return {**given, "labels": names, "labels_file": file}


def _export(run: Path, plan: Plan, stages: list[str], **asked: Any) -> None:
    from clipress.data.eval_sets import evalsets
    from clipress.export.extra_models import extra_models_from_export
    from clipress.export.settings import ExportSettings, OnnxSettings
    from clipress.export.to_onnx import is_exported, onnx_from_artifact
    from clipress.recipe import checked

    recipe = checked(ExportSettings, plan.recipe.export, "export").onnx
    settings = checked(OnnxSettings, {**recipe.model_dump(), **asked}, "export.onnx")
    for stage in stages:
        target = run / "export" / stage
        if is_exported(run / stage, target, settings):
            click.echo(f"{stage}: exported already ({target})")
        else:
            made = onnx_from_artifact(
                run / stage, target, settings, _test_sets(plan), lambda: evalsets(plan.data.train)
            )
            cosines = ", ".join(f"{graph} {cosine:.6f}" for graph, cosine in made.least_cosines.items())
            click.echo(
                f"{stage}: {made.precision} ONNX, {made.bytes / 1e6:.1f} MB, agrees with torch (least cosine {cosines}) -> "
                f"{target}"
            )
        if not settings.wants_extra_models:  # data are opened for what is made only
            continue
        for name, path in extra_models_from_export(target, settings, _test_sets(plan)).items():
            click.echo(f"{stage}: {name}, agrees with the towers' files -> {path}")


def _engines(run: Path, plan: Plan, stages: list[str], asked: bool = False, precision: str | None = None) -> None:
    """Build engines where the recipe or the command asks for them; what cannot be done is an error only for the latter."""
    from clipress.recipe import checked

    raw = plan.recipe.export.get("tensorrt")
    if raw is None and not asked:
        return
    from clipress.export.settings import TensorRTSettings
    from clipress.export.to_tensorrt import engines_from_export, prepare_export
    from clipress.export.trtexec import write_script
    from clipress.runtime.tensorrt import find_machine

    settings = checked(TensorRTSettings, {**(raw or {}), **_given(precision=precision)}, "export.tensorrt")
    try:
        prepared = {stage: prepare_export(run / "export" / stage, settings) for stage in stages}
        script = write_script(
            run / "export" / "trtexec.sh", [one for towers in prepared.values() for one in towers.values()], settings
        )
        click.echo(f"The same engines by NVIDIA's own tool: {script}")
        machine = find_machine()
        for stage, towers in prepared.items():
            paths = engines_from_export(run / "export" / stage, towers, machine, settings, _test_sets(plan))
            _tell(stage, paths.values())
    except ClipressError as error:
        if asked:
            raise
        click.echo(f"TensorRT engines are left out: {error}")


def _engine(source: Path, precision: str | None, foreign: bool) -> None:
    from clipress.export.settings import TensorRTSettings
    from clipress.export.to_tensorrt import engine_from_onnx, prepare
    from clipress.runtime.tensorrt import find_machine

    settings = TensorRTSettings(**_given(precision=precision))
    prepared = prepare(source, source.parent, settings, foreign)
    _tell(source.stem, [engine_from_onnx(prepared, find_machine(), settings)])


def _tell(stage: str, engines: Iterable[Path]) -> None:
    from clipress.runtime.tensorrt import read_sidecar

    for path in engines:
        sidecar = read_sidecar(path)
        cosine = sidecar.parity[f"{sidecar.tower}_min_cosine"]
        click.echo(
            f"{stage}: {sidecar.precision} engine, agrees with ONNX Runtime (least cosine {cosine:.6f}) -> {path}"
        )


def _given(**options: Any) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def _bench_run(run: Path, plan: Plan) -> None:
    """Measure all artefacts of a run as its recipe says."""
    from clipress.bench.settings import BenchSettings
    from clipress.recipe import checked

    settings = checked(BenchSettings, plan.recipe.bench, "bench")
    about = {"recipe": plan.recipe.name, "command": f"clipress bench {run}"}
    subjects = _subjects([(run, stage) for stage in plan.artifacts], False)
    _bench(subjects, settings, _test_sets(plan), run / "bench", about)


def _bench(
    subjects: list[Subject],
    settings: BenchSettings,
    sets: list[EvalSet],
    folder: Path,
    about: dict[str, Any],
    profiled: bool = False,
) -> dict[str, Any]:
    """Measure, write results.json and report.html, print the table."""
    from clipress.bench.report import table, write_report
    from clipress.bench.run import bench, write_results

    results = bench(subjects, sets, settings, folder, about=about, profiled=profiled)
    written, page = write_results(results, folder), write_report(results, folder)
    click.echo(table(results))
    click.echo(f"Figures: {written}   Page to open in a browser: {page}")
    return results


def _served(run: Path, plan: Plan) -> str:
    """Return the artefact to serve where none is named: the last one, or what bench says to keep in its place."""
    from clipress.bench.selection import read_kept

    last, results = plan.artifacts[-1], run / "bench" / "results.json"
    kept = read_kept(results, run, last) or last
    if kept != last:
        click.echo(f"{kept} is served and not {last}, as {results} says. Override: clipress serve {run} --stage {last}")
    return kept


def _serve(
    run: Path, plan: Plan, stage: str, backends: tuple[str, ...] | None, max_batch: int | None
) -> dict[str, Path]:
    """Write the repositories; return each one's folder by its backend."""
    from clipress.serve.triton_repo import served_version, triton_repo_from_export

    settings, bench = _serve_settings(plan, backends, max_batch), run / "bench" / "results.json"
    repositories = triton_repo_from_export(_exported(run, stage), run / "triton", settings, bench)
    for repository in repositories:
        click.echo(f"Triton model repository of {stage}, version {served_version(repository)}: {repository}")
    return {repository.name: repository for repository in repositories}


def _serve_version(
    run: Path, plan: Plan, backends: tuple[str, ...] | None, max_batch: int | None, version: int | None
) -> dict[str, Path]:
    """Let an older version be served, the one before where none is named; return the repositories as `_serve` does."""
    from clipress.serve.triton_repo import serve_version

    settings = _serve_settings(plan, backends, max_batch)
    repositories = {backend: run / "triton" / backend for backend in settings.backend}
    for repository in repositories.values():
        now = serve_version(repository, version, settings, run / "bench" / "results.json")
        click.echo(f"Version {now} is served from {repository}")
    return repositories


def _serve_settings(plan: Plan, backends: tuple[str, ...] | None, max_batch: int | None) -> ServeSettings:
    from clipress.recipe import checked
    from clipress.serve.settings import ServeSettings

    return checked(ServeSettings, {**plan.recipe.serve, **_given(backend=backends, max_batch=max_batch)}, "serve")


if __name__ == "__main__":
    main()
