"""`clipress plan`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from clipress.commands.options import recipe_argument, set_option

if TYPE_CHECKING:
    from clipress.workflow.forecast import Forecast

MEMORY = ("weights", "teachers", "ema", "optimizer", "gradients", "batch", "activations", "peak")


@click.command()
@recipe_argument
@set_option
@click.option(
    "--processes",
    type=click.IntRange(1),
    default=lambda: int(os.environ.get("WORLD_SIZE", 1)),
    help="Processes of the run, as torchrun would start them.  [default: 1]",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, sizes in bytes.")
def plan(recipe: str, sets: tuple[str, ...], processes: int, as_json: bool) -> None:
    """Say what a recipe needs before it runs.

    Parameters, steps, memory per device and files on disk, and what will be exported, measured and served. Nothing is
    trained and no weights are read; only the data is opened. With a GPU, a step with random weights is timed as well.
    """
    from clipress.recipe import overrides_from
    from clipress.workflow.recipes import open_recipe

    opened = open_recipe(recipe, overrides_from(sets))
    from clipress.workflow.forecast import forecast  # This imports torch: an invalid recipe fails before.

    found = forecast(opened, processes)
    for line in [json.dumps(found.as_json(), indent=1)] if as_json else _lines(found):
        click.echo(line)


def _lines(found: Forecast) -> Iterator[str]:
    count = f"{found.processes} process{'es' if found.processes > 1 else ''}"
    yield f"{found.recipe}: {count}, {found.device}, {found.precision}"
    stages = [(f"teacher/{stage.name}", stage) for teacher in found.teachers for stage in teacher.stages]
    stages += [(stage.name, stage) for stage in found.stages]
    work = [("stage", "kind", "parameters (M)", "trained (M)", "steps", "items seen", "checkpoint")]
    memory = [("memory per device", *MEMORY)]
    for name, stage in stages:
        needs = stage.needs
        trained, checkpoint = (f"{needs.trained / 1e6:.2f}", _size(needs.checkpoint)) if needs else ("-", "-")
        size = f"{stage.params / 1e6:.2f}"
        work.append((name, stage.kind, size, trained, f"{stage.steps:,}", f"{stage.pairs:,}", checkpoint))
        memory.append((name, *(_size(getattr(needs, column)) if needs else "-" for column in MEMORY)))
    for rows, words in ((work, 2), (memory, 1)):
        yield ""
        yield from _table(rows, words)
    yield ""
    yield from _notes(found)


def _table(rows: Sequence[Sequence[str]], words: int) -> Iterator[str]:
    """Align the first `words` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if at < words else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells)


def _notes(found: Forecast) -> Iterator[str]:
    """Say what the table has no column for."""
    for teacher in found.teachers:
        how = (
            "runs at every step" if teacher.cache_bytes is None else f"embeddings on disk, {_size(teacher.cache_bytes)}"
        )
        made = (
            f", made first by {len(teacher.stages)} stage(s), unless it is kept from before" if teacher.stages else ""
        )
        yield f"Teacher: {teacher.name}, {teacher.params / 1e6:.2f} M parameters, {how}{made}."
    for stage in found.stages:
        if stage.params_after != stage.params:
            yield f"{stage.name}: about {stage.params_after / 1e6:.2f} M parameters remain."
        if stage.measured is not None:
            took, peak = stage.measured.seconds, _size(stage.measured.peak_bytes)
            hours = took * stage.steps / 3600
            yield f"{stage.name}: measured on this GPU {took:.3f} s a step ({hours:.1f} h in all), peak {peak}."
        for note in stage.notes:
            yield f"{stage.name}: {note}."
    disk = found.disk
    yield (
        f"Disk: {_size(disk.total)} at most: artifacts {_size(disk.artifacts)}, checkpoints {_size(disk.checkpoints)} while a "
        f"stage runs, teachers' embeddings {_size(disk.teacher_caches)}, exports about {_size(disk.exports)}."
    )
    targets = "".join(f", {name}" for name in found.targets)
    yield f"Export: ONNX{targets} of {', '.join(found.artifacts)}."
    measured = found.measured
    batches = ", ".join(map(str, measured["batch"]))
    yield f"Measure: {', '.join(measured['backends'])} at batch {batches}; accuracy on {', '.join(measured['sets'])}."
    yield f"Serve: {found.artifacts[-1]}, or what the measurement keeps instead, with Triton's {' and '.join(found.served)}."


def _size(count: int) -> str:
    """Format bytes in MB, or in GB from one on."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB" if count else "0"
