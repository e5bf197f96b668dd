"""`clipress serve`, `triton` and `index`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from clipress.commands.options import FOLDER, PORT, given, run_argument, served_option, stage_option


@click.command()
@run_argument
@served_option
@click.option(
    "--backend",
    "backends",
    multiple=True,
    help="onnxruntime, python or tensorrt; repeatable.  [default: the recipe's]",
)
@click.option("--max-batch", type=click.IntRange(1), help="Maximum batch size.  [default: the recipe's]")
@click.option(
    "--keep",
    type=click.IntRange(1),
    help="Remove older versions but the newest so many and the served one.  [default: all]",
)
@click.option("--version", type=click.IntRange(1), help="Write nothing; serve this version of the models.")
@click.option("--roll-back", is_flag=True, help="Write nothing; serve the version before the current one.")
def serve(
    run: Path,
    stage: str | None,
    backends: tuple[str, ...],
    max_batch: int | None,
    keep: int | None,
    version: int | None,
    roll_back: bool,
) -> None:
    """Write Triton model repositories.

    A changed export becomes a new version of the models. Start a server with `clipress triton RUN`, or with the
    command in the repository's README.
    """
    from clipress.workflow.serve import ServeRequest, serve_run, switch_version

    settings = given(backend=backends, max_batch=max_batch, keep=keep)
    if version or roll_back:
        switch_version(run, version, settings, click.echo)
    else:
        serve_run(run, ServeRequest(stage, settings), click.echo)


@click.command()
@run_argument
@click.option("--stage", help="Write the repository of this artifact first.  [default: serve the existing one]")
@click.option("--host", help="Interface to listen on.  [default: 127.0.0.1]")
@click.option("--http-port", type=PORT, help="[default: any free port]")
@click.option("--grpc-port", type=PORT, help="[default: any free port]")
@click.option("--metrics-port", type=PORT, help="[default: any free port]")
def triton(run: Path, stage: str | None, **listen: Any) -> None:
    """Start a Triton server for a run.

    It serves RUN's repository of the python backend until Ctrl-C; the repository is written first if it is missing.
    The server is the `tritonserver` on PATH; without one, it is downloaded once (about 60 MB).
    """
    from clipress.workflow.serve import start_triton

    start_triton(run, stage, given(**listen), click.echo)


@click.command()
@click.argument("images", required=False)
@click.option("--out", type=FOLDER, required=True, help="The index: created, replaced, or changed.")
@click.option("--run", type=FOLDER, help="Run folder whose exported image encoder is used.")
@stage_option
@click.option("--model", type=FOLDER, help="An export folder or an exported artifact, instead of a run.")
@click.option(
    "--kind",
    type=click.Choice(["flat", "ivf", "hnsw"]),
    help="flat is exact, the others are approximate.  [default: flat up to a million images, then ivf]",
)
@click.option("--add", is_flag=True, help="Add new images to an existing index, and replace those that have changed.")
@click.option(
    "--check",
    type=click.Choice(["stat", "content"]),
    help="How --add will notice changed images: by size and time of their files, or by their bytes.  [default: stat]",
)
@click.option("--remove", multiple=True, metavar="KEY", help="Remove an entry; repeatable.")
@click.option(
    "--threads", type=click.IntRange(0), default=0, show_default=True, help="Number of threads; 0: one per core."
)
def index(
    images: str | None,
    out: Path,
    run: Path | None,
    stage: str | None,
    model: Path | None,
    kind: str | None,
    add: bool,
    check: str | None,
    remove: tuple[str, ...],
    threads: int,
) -> None:
    """Index images for search by text.

    IMAGES is a folder of images, or webdataset shards. The command may be stopped or killed; run it again to resume.
    Unreadable images are skipped and listed. An entry's key is its path, or shard and record.
    """
    from clipress.workflow.index import IndexRequest, index_images, remove_from_index

    if remove:
        if images or add or kind or check or run or model:
            raise click.UsageError("--remove takes no other option but --out.")
        left = remove_from_index(out, remove)
        click.echo(f"Removed {len(remove)} entries, {left.count:,} left: {out}")
        return
    if images is None:
        raise click.UsageError("IMAGES is required: a folder of images, or shards.")
    if (run is None) == (model is None):
        raise click.UsageError("Set exactly one of --run and --model.")
    if add and (kind or check):
        raise click.UsageError("--kind and --check cannot be changed: --add keeps those of the index.")
    if run is not None:
        from clipress.workflow.kept import choose_artifact
        from clipress.workflow.outline import read_outline

        say = partial(click.echo, err=True)
        model = run / choose_artifact(run, read_outline(run), stage, say, "Indexing with", "onnxruntime").stage
    request = IndexRequest(images, model, kind, threads, add, check or "stat")
    made = index_images(request, out, lambda line: click.echo(line, err=True))
    click.echo(f"Index of {made.count:,} images, {made.dim} dimensions, {made.kind}: {out}")
