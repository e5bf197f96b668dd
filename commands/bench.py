"""`clipress bench`, `bench-server` and `latency-table`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from clipress.commands.options import (
    ANY_PATH,
    FILE,
    FOLDER,
    command_line,
    exit_if_broken,
    fail_if_option,
    given,
    run_argument,
    served_option,
)
from clipress.errors import RecipeError


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=ANY_PATH)
@click.option(
    "--stage", "stages", multiple=True, help="Artifact; repeatable.  [default: all; of several runs the last]"
)
@click.option(
    "--runner",
    "--backend",
    "backends",
    multiple=True,
    help="onnxruntime, onnxruntime-cuda, openvino, torch, torch-compiled or tensorrt; repeatable.  "
    "[default: the recipe's]",
)
@click.option("--batch", type=click.IntRange(1), multiple=True, help="Batch size; repeatable.")
@click.option("--threads", type=click.IntRange(1), help="Threads inside one operator.")
@click.option("--cpus", help="CPUs to run on, such as 0,1; 'any' leaves it to the system.")
@click.option("--warm-up", type=click.IntRange(0), help="Milliseconds before measuring.")
@click.option("--duration", type=click.IntRange(0), help="Minimum milliseconds per model, encoder and batch size.")
@click.option("--iterations", type=click.IntRange(1), help="Minimum queries per model, encoder and batch size.")
@click.option(
    "--dtype", type=click.Choice(["fp32", "bf16"]), help="Data type of the torch runners; bf16 requires a GPU."
)
@click.option(
    "--sparse-kernels",
    "use_sparse_kernels",
    is_flag=True,
    default=None,
    help="Sparse kernels for 2:4 weights in torch; GPU and bf16 only.",
)
@click.option("--profile", is_flag=True, help="Also profile ONNX Runtime by operator and block.")
@click.option("--no-accuracy", is_flag=True, help="Measure cost and latency only.")
@fail_if_option("p99_ms{stage=int8, batch=8} > 10")
@click.option("--out", type=FOLDER, help="Where results go.  [default: RUN/bench; RUN/bench/compared for a comparison]")
@click.pass_context
def bench(
    ctx: click.Context,
    runs: tuple[Path, ...],
    stages: tuple[str, ...],
    cpus: str | None,
    profile: bool,
    no_accuracy: bool,
    fail_if: tuple[str, ...],
    out: Path | None,
    **settings: Any,
) -> None:
    """Measure accuracy, size and latency.

    For one RUN: all its artifacts. With --stage or several RUNs: a comparison with the first one, every ratio with a 95 %
    interval. All models take turns in one process. Settings and data are those of the first run's recipe.
    """
    from clipress.workflow.bench import BenchRequest, bench_runs

    wanted = given(**settings, cpus=_cpus(cpus))
    request = BenchRequest(stages, wanted, fail_if, not no_accuracy, profile, out, command_line(ctx))
    exit_if_broken(ctx, bench_runs(runs, request, click.echo).broken)


def _cpus(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [] if text == "any" else [int(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"--cpus {text}: expected comma-separated integers, such as 0,1, or 'any'.") from None


@click.command("bench-server")
@run_argument
@served_option
@click.option("--url", help="A running server, http://host:8000 or grpc://host:8001.  [default: start one for RUN]")
@click.option(
    "--model",
    "models",
    multiple=True,
    help="A model, such as embed_image, image_encoder, embed_text or caption; repeatable.  [default: all]",
)
@click.option("--concurrency", help="Concurrent requests, such as 1,8,32 or 1:32, which doubles.  [default: 1,8,32]")
@click.option("--request-rate", help="Requests per second, open loop, such as 100,200 or 100:500:100.")
@click.option("--window", type=click.IntRange(1), default=2000, show_default=True, help="Milliseconds per window.")
@click.option("--warm-up", type=click.IntRange(0), default=1000, show_default=True, help="Milliseconds per load.")
@click.option(
    "--stability",
    type=click.FloatRange(0),
    default=10,
    show_default=True,
    help="Percent by which the last three windows may differ; otherwise more are measured.",
)
@click.option("--trials", type=click.IntRange(3), default=10, show_default=True, help="Maximum number of windows.")
@fail_if_option("p99_ms{model=embed_image, concurrency=32} > 50")
@click.option("--out", type=FOLDER, help="Where load.json goes.  [default: RUN/bench]")
@click.pass_context
def bench_server(
    ctx: click.Context,
    run: Path,
    stage: str | None,
    url: str | None,
    models: tuple[str, ...],
    concurrency: str | None,
    request_rate: str | None,
    fail_if: tuple[str, ...],
    out: Path | None,
    **windows: float,
) -> None:
    """Measure a Triton server under load.

    Without --url, a server is started for RUN's repository and stopped afterwards. Requests contain RUN's test images
    and texts that are all different; those of a BLIP's models contain test images with their own texts.
    """
    from clipress.workflow.bench_server import LoadRequest, Windows, bench_run_server

    request = LoadRequest(
        Windows(**windows), stage, url, models, concurrency, request_rate, fail_if, out, command_line(ctx)
    )
    exit_if_broken(ctx, bench_run_server(run, request, click.echo).broken)


@click.command("latency-table")
@run_argument
@click.option("--stage", help="Artifact whose blocks are measured.  [default: the first one]")
@click.option("--out", type=FILE, required=True, help="Where the table goes.")
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Batch size.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads inside one operator.")
@click.option("--duration", type=click.IntRange(1), default=200, show_default=True, help="Milliseconds per width.")
def latency_table(run: Path, stage: str | None, out: Path, batch: int, threads: int, duration: int) -> None:
    """Measure block latency by width, for latency budgets.

    The table is measured on this machine. `prune` reads it: budget: {latency: 0.5, costs: TABLE}
    """
    from clipress.workflow.bench import LatencyTableRequest, measure_latency_table

    measure_latency_table(run, LatencyTableRequest(stage, batch, threads, duration), out)
    click.echo(f"Latency table: {out}. Use it: prune: {{budget: {{latency: 0.5, costs: {out}}}}}")
