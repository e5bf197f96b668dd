"""`clipress demo`."""

from __future__ import annotations

from pathlib import Path

import click

from clipress.commands.options import FILE, FOLDER, given


@click.command()
@click.argument("run", type=FOLDER)
@click.option("--stage", help="Model to show first.  [default: the last one, or what bench kept instead]")
@click.option("--compare", metavar="STAGE", help="The other model of Compare.  [default: the first one]")
@click.option("--labels", help="Comma-separated labels to begin with.")
@click.option("--labels-file", type=FILE, help="The same from a text file, one label per line.")
@click.option("--template", help="Prompt with {} for the label.  [default: a photo of {}]")
@click.option("--python", is_flag=True, help="Run the models with ONNX Runtime on this machine, not in the browser.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="[default: any free port]")
@click.option("--open/--no-open", "opens", default=True, help="Open the page in a browser.  [default: --open]")
def demo(
    run: Path,
    stage: str | None,
    compare: str | None,
    labels: str | None,
    labels_file: Path | None,
    template: str | None,
    python: bool,
    port: int,
    opens: bool,
) -> None:
    """Show a run's models on a page in the browser.

    It classifies what a camera sees, searches a folder of images by words, and compares two models. The models run in the
    browser; the page listens on this machine only, and images and video stay there. RUN is a run with exports, or an export
    folder. To put the page on a web server: clipress export RUN --layout web
    """
    from clipress.workflow.demo import DemoRequest, serve_page

    words = {}
    if labels is not None or labels_file is not None:
        from clipress.workflow.predict import labels_from

        words["labels"] = labels_from(labels, labels_file)
    request = DemoRequest(stage, compare, python=python, port=port, **words, **given(template=template))
    serve_page(run, request, click.echo, click.launch if opens else lambda url: None)
