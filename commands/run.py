"""`clipress run`, `compress` and `embed`."""

from __future__ import annotations

from pathlib import Path

import click

from clipress.commands.options import FOLDER, out_option, recipe_argument, resume_option, set_option


@click.command()
@recipe_argument
@out_option
@set_option
@resume_option
def run(recipe: str, out: Path | None, sets: tuple[str, ...], resume: bool) -> None:
    """Compress, export, bench and serve, as a recipe says.

    RECIPE is a YAML file, or the name of a shipped recipe such as demo. Finished stages are kept. The command may be
    stopped or killed at any time; run it again to resume. On SIGTERM or Ctrl-C, training writes a checkpoint after the
    current step, and the command exits with 75 or 130.
    """
    import clipress
    from clipress.recipe import overrides_from

    done = clipress.run(recipe, out, overrides_from(sets), resume, click.echo)
    if done.served is not None:
        click.echo(f"Try it: {done.predict_command}")


@click.command()
@recipe_argument
@out_option
@set_option
@resume_option
def compress(recipe: str, out: Path | None, sets: tuple[str, ...], resume: bool) -> None:
    """Run a recipe's stages, each into an artifact.

    The command may be stopped or killed at any time, see `clipress run --help`.
    """
    from clipress.recipe import overrides_from
    from clipress.storage import is_first_process
    from clipress.workflow.recipes import open_recipe

    opened = open_recipe(recipe, overrides_from(sets))
    from clipress.workflow.compress import compress  # This imports torch: an invalid recipe fails before.

    folder, plan = compress(opened, out, resume, click.echo)
    if is_first_process():
        click.echo(f"{len(plan.artifacts)} artifacts in {folder}: {', '.join(plan.artifacts)}")


@click.command()
@recipe_argument
@click.option("--out", type=FOLDER, help="Where caches go.  [default: teacher-embeddings in $CLIPRESS_CACHE]")
@click.option("--views", type=click.IntRange(1), help="Augmented views per image.  [default: the recipe's, or 1]")
@click.option(
    "--dtype",
    type=click.Choice(["fp16", "bf16"]),
    help="Data type of the stored embeddings.  [default: the recipe's, or fp16]",
)
@click.option(
    "--teacher",
    "teachers",
    multiple=True,
    type=FOLDER,
    help="Artifact to embed with; repeatable.  [default: the recipe's teachers]",
)
@set_option
def embed(
    recipe: str,
    out: Path | None,
    views: int | None,
    dtype: str | None,
    teachers: tuple[Path, ...],
    sets: tuple[str, ...],
) -> None:
    """Cache a teacher's embeddings of the training data.

    Training with `teacher.cache` then reads the embeddings instead of running the teacher. The command may be stopped
    or killed; run it again to resume. Under torchrun the processes share the work.
    """
    from clipress.recipe import overrides_from
    from clipress.storage import is_first_process
    from clipress.workflow.recipes import open_recipe

    opened = open_recipe(recipe, overrides_from(sets))
    from clipress.workflow.compress import EmbedOptions, embed  # This imports torch: an invalid recipe fails before.

    folders = embed(opened, EmbedOptions(out, views, dtype, teachers), click.echo)
    if is_first_process():
        click.echo(f"{len(folders)} caches: {', '.join(map(str, folders))}")
