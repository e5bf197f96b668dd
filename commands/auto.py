"""`clipress auto`."""

from __future__ import annotations

from pathlib import Path

import click

from clipress.commands.options import FOLDER, given


@click.command()
@click.argument("model")
@click.option("--data", required=True, help="A recipe, or a YAML file with train, val and test.")
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="TARGET",
    help="Such as 'latency<=5ms', 'latency{tower=image}<=5ms', 'size<=40MB'; repeatable.",
)
@click.option(
    "--max-accuracy-drop",
    type=click.FloatRange(0),
    metavar="POINTS",
    help="Points of R@1 and top-1, on average, that the validation data may lose, with a standard error to spare.",
)
@click.option(
    "--steps", type=click.IntRange(0), default=0, show_default=True, help="Steps of recovery; 0 trains nothing."
)
@click.option(
    "--lr", type=click.FloatRange(0, min_open=True), help="Learning rate of recovery.  [default: as in distill]"
)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Items of a timed query.")
@click.option("--threads", type=click.IntRange(1), help="Threads of a timed query.  [default: as in bench]")
@click.option(
    "--tries", type=click.IntRange(1), default=8, show_default=True, help="Bisections of the budget, at most."
)
@click.option("--int8/--no-int8", default=True, help="Try every model in INT8 too.  [default: --int8]")
@click.option("--vocabulary", is_flag=True, help="Keep only the tokens that the training texts need.")
@click.option("--out", type=FOLDER, default=Path("runs/auto"), show_default=True, help="Run folder of what was found.")
def auto(
    model: str,
    data: str,
    targets: tuple[str, ...],
    max_accuracy_drop: float | None,
    steps: int,
    lr: float | None,
    batch: int,
    threads: int | None,
    tries: int,
    int8: bool,
    vocabulary: bool,
    out: Path,
) -> None:
    """Find the smallest model that holds a line.

    MODEL is an artifact's folder, or an open_clip model as NAME:TAG or NAME:WEIGHTS-FILE. With a target, the most accurate
    model within it is found; with --max-accuracy-drop alone, the smallest one. Nothing is trained unless --steps allows
    it. What is found becomes a run folder with a recipe that can be run again.
    """
    from clipress.workflow.targets import target_from

    wanted = tuple(map(target_from, targets))
    from clipress.workflow.auto import (
        AutoRequest,
        auto,
        sections_of,
        teacher_of,
    )  # This imports torch: mistakes fail before.

    request = AutoRequest(
        teacher=teacher_of(model),
        sections=sections_of(data),
        out=out,
        targets=wanted,
        max_accuracy_drop=max_accuracy_drop,
        steps=steps,
        lr=lr,
        bench=given(batch=(batch,), threads=threads),
        tries=tries,
        int8=int8,
        vocabulary=vocabulary,
    )
    done = auto(request, click.echo)
    click.echo(f"Try it: {done.predict_command}")
