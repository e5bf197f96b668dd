"""`clipress study`."""

from __future__ import annotations

from pathlib import Path

import click

from clipress.commands.options import FILE, FOLDER


@click.command()
@click.argument("file", type=FILE)
@click.option("--runs", type=FOLDER, help="Where the runs go.  [default: runs/studies/<name>]")
@click.option("--out", type=FOLDER, default=Path("studies"), show_default=True, help="Where the tables go.")
@click.option(
    "--jobs", type=click.IntRange(1), default=1, show_default=True, help="Concurrent runs; they share the cores."
)
def study(file: Path, runs: Path | None, out: Path, jobs: int) -> None:
    """Compare methods over ratios and seeds.

    FILE names a base recipe and the methods. Each run has its own process, so that its memory can be measured. Finished
    runs are kept. The results become one table.
    """
    from clipress.studies.methods import run_study

    click.echo(run_study(file, runs, out, jobs))
