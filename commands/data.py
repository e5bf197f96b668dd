"""The group `clipress data`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from clipress.commands.options import FILE, FOLDER, template_option


@click.group()
def data() -> None:
    """Prepare data: sample, download and filter."""


@data.command()
@click.argument("folder", type=FOLDER)
@click.option("--format", "form", type=click.Choice(["scenes", "digits"]), default="digits", show_default=True)
@click.option("--count", type=click.IntRange(1, 500), default=10, show_default=True, help="Number of images.")
def images(folder: Path, form: str, count: int) -> None:
    """Write images of an embedded test set.

    The images are PNG files, each with its captions in a text file.
    """
    from clipress.workflow.data import write_images

    click.echo(f"{write_images(folder, form, count)} images in {folder}")


@data.command()
@click.argument("classes", type=FILE)
@template_option(default=("a photo of a {}",))
@click.option("--out", type=FILE, required=True, help="A text file, one prompt per line; .json: prompts by class.")
def prompts(classes: Path, templates: tuple[str, ...], out: Path) -> None:
    """Write the prompts of a class list.

    CLASSES is a file with one name per line, or `imagenet`.
    """
    from clipress.workflow.data import write_prompts

    lines, names = write_prompts(classes, templates, out)
    click.echo(f"{lines} prompts of {names} classes: {out}")


@data.command()
@click.argument("urls", type=FILE)
@click.option("--out", type=FOLDER, required=True, help="Where the shards go.")
@click.option(
    "--size", type=click.IntRange(16), default=256, show_default=True, help="Maximum shorter side, in pixels."
)
@click.option("--per-shard", type=click.IntRange(1), default=10_000, show_default=True, help="Images per shard.")
@click.option("--processes", type=click.IntRange(1), default=1, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=64, show_default=True, help="Concurrent downloads.")
@click.option("--timeout", type=click.IntRange(1), default=10, show_default=True, help="Seconds per image.")
@click.option("--url-key", default="url", show_default=True, help="Column of a csv, jsonl or parquet file.")
@click.option("--caption-key", default="caption", show_default=True, help="Column of a csv, jsonl or parquet file.")
def download(urls: Path, out: Path, **settings: Any) -> None:
    """Download images from a table of URLs.

    URLS is a table of URLs and captions, such as Conceptual Captions' TSV files.
    """
    from clipress.workflow.data import download_images

    download_images(urls, out, **settings)
    click.echo(f"Shards: {out}. Use them: data: {{train: [{{format: webdataset, shards: {out}}}]}}")


@data.command("filter")
@click.argument("images", type=FOLDER)
@click.option("--prompts", "prompts_file", type=FILE, required=True, help="One prompt per line, or JSON.")
@click.option("--model", type=FOLDER, required=True, help="The teacher's artifact.")
@click.option("--keep", type=click.FloatRange(0, 1, min_open=True), help="Fraction of the images to keep.")
@click.option("--count", type=click.IntRange(1), help="Number of images to keep.")
@click.option(
    "--near-duplicates",
    type=click.FloatRange(-1, 1),
    metavar="COSINE",
    help="Skip images this close to a better one, such as 0.95.",
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Images decoded concurrently.")
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
    """Keep the images nearest to a list of prompts.

    A teacher embeds both; each image is scored by its best prompt.
    """
    if (keep is None) == (count is None):
        raise click.UsageError("Set exactly one of --keep and --count.")
    from clipress.workflow.filter import FilterRequest, filter_images

    request = FilterRequest(images, prompts_file, model, keep, count, near_duplicates, threads)
    kept, total = filter_images(request, out)
    use = f"{{format: images, images: {images}, annotations: {out}}}"
    click.echo(f"{kept} of {total} images: {out}. Use them: data: {{train: [{use}]}}")
