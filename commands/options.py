"""Arguments and options that several commands share."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)
ANY_PATH = click.Path(path_type=Path)
PORT = click.IntRange(1, 65535)

recipe_argument = click.argument("recipe", metavar="RECIPE")
run_argument = click.argument("run", type=FOLDER)
set_option = click.option(
    "--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override a setting, such as stages.0.prune.steps=10."
)
resume_option = click.option(
    "--resume/--fresh",
    default=True,
    help="Keep finished stages and continue from the last checkpoint, or redo every stage.  [default: --resume]",
)
out_option = click.option("--out", type=FOLDER, help="Run folder.  [default: runs/<name of the recipe>]")
stage_option = click.option("--stage", help="Artifact of the run.  [default: the last one, or what bench kept instead]")
served_option = click.option("--stage", help="Artifact to serve.  [default: the last one, or what bench kept instead]")


def template_option(default: tuple[str, ...] = (), note: str = "") -> Any:
    """Return the option `--template`."""
    return click.option(
        "--template",
        "templates",
        multiple=True,
        default=default,
        show_default=bool(default),
        help=f"Prompt with {{}} for the label, `openai` or `simple`; repeatable.{note}",
    )


def fail_if_option(example: str) -> Any:
    """Return the option `--fail-if`."""
    return click.option(
        "--fail-if",
        multiple=True,
        metavar="CONDITION",
        help=f"Exit with 1 if this is true, such as '{example}'; repeatable.",
    )


def given(**options: Any) -> dict[str, Any]:
    """Return the options that were set on the command line."""
    return {name: value for name, value in options.items() if value not in (None, ())}


def labels_given(labels: str | None, file: Path | None, templates: tuple[str, ...]) -> dict[str, Any]:
    """Return the export settings of label options; labels replace both kinds of labels in the recipe."""
    found: dict[str, Any] = {"templates": templates if len(templates) != 1 else templates[0]} if templates else {}
    if labels is None and file is None:
        return found
    names = None if labels is None else [name.strip() for name in labels.split(",") if name.strip()]
    return {**found, "labels": names, "labels_file": file}


def command_line(ctx: click.Context) -> str:
    """Return the command as it was typed, for the record."""
    runs = ctx.params.get("runs") or [ctx.params["run"]]
    words = ["clipress", ctx.info_name, *map(str, runs)]
    for option in ctx.command.params:
        value = ctx.params.get(option.name)
        if isinstance(option, click.Option) and value not in (None, (), False):
            for one in value if isinstance(value, tuple) else (value,):
                words += [option.opts[0]] if one is True else [option.opts[0], str(one)]
    return shlex.join(words)


def exit_if_broken(ctx: click.Context, broken: list[str]) -> None:
    """Report broken `--fail-if` conditions and exit with 1 if there are any."""
    for line in broken:
        click.echo(f"Broken: {line}", err=True)
    if broken:
        ctx.exit(1)
