"""`clipress predict` and `eval`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipress.commands.options import ANY_PATH, FILE, FOLDER, run_argument, stage_option
from clipress.errors import DataError

if TYPE_CHECKING:
    from clipress.workflow.evaluate import Metric
    from clipress.workflow.predict import Server
    from clipress.workflow.predict_blip import Asked


@click.command()
@click.argument("images", nargs=-1, required=True, metavar="[RUN] IMAGES...", type=ANY_PATH)
@click.option("--labels", help="Comma-separated labels, or answers, to choose from.")
@click.option("--labels-file", type=FILE, help="The same from a text file, one label per line.")
@click.option(
    "--template",
    "templates",
    multiple=True,
    default=("a photo of a {}",),
    show_default=True,
    help="Prompt with {} for the label; repeatable.",
)
@click.option("--softmax", is_flag=True, help="Make a SigLIP's probabilities of the labels sum to 1, as a CLIP's do.")
@click.option("--question", help="Ask a BLIP for questions; it chooses among --labels, or writes the answer.")
@click.option("--statement", help="Ask a BLIP for statements whether this is true of two images.")
@click.option("--text", "texts", multiple=True, help="Rank the images by this with a BLIP for retrieval; repeatable.")
@stage_option
@click.option(
    "--runtime",
    type=click.Choice(["onnxruntime", "openvino"]),
    help="What runs the export.  [default: onnxruntime, or what bench kept]",
)
@click.option("--url", help="Use a server instead of a run: http://host:8000 or grpc://host:8001.")
@click.option("--in-flight", type=click.IntRange(1), default=16, show_default=True, help="Concurrent requests.")
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=60,
    show_default=True,
    help="Seconds per request.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON per image, with all probabilities.")
@click.option("--out", type=FOLDER, help="Folder for a Segmenter's overlays.  [default: RUN/predicted]")
def predict(
    images: tuple[Path, ...],
    labels: str | None,
    labels_file: Path | None,
    templates: tuple[str, ...],
    softmax: bool,
    question: str | None,
    statement: str | None,
    texts: tuple[str, ...],
    stage: str | None,
    runtime: str | None,
    url: str | None,
    in_flight: int,
    timeout: float,
    as_json: bool,
    out: Path | None,
) -> None:
    """Classify images, segment them, or ask a BLIP about them.

    A CLIP requires --labels or --labels-file; a classifier and a Segmenter have their own labels. A Segmenter's masks are
    written as overlays with a legend, and the shares of its labels are printed. A BLIP writes captions, answers a question,
    judges a statement about two images, or ranks images by texts. Runs the export of RUN on this machine, or uses the
    server at --url. IMAGES are files, folders, or - to read paths from standard input. A server's answers are
    printed as they arrive. Images that cannot be read are named, the others go on, and the exit code is 2.
    """
    from clipress.workflow.predict import Server, images_in, labels_from
    from clipress.workflow.predict_blip import Asked, is_asked, said_by_server, use_of_server

    asked = Asked(question, statement, texts)
    names = None if labels is None and labels_file is None else labels_from(labels, labels_file)
    if url is not None:
        if stage:
            raise click.UsageError("--stage selects an artifact of a run; it cannot be used with --url.")
        if runtime:
            raise click.UsageError("--runtime runs the export of a run; it cannot be used with --url.")
        server, files = Server(url, timeout, in_flight), images_in(images, click.get_text_stream("stdin"))
        if Path("-") not in images:
            files = list(files)  # A list gives the progress bar a total.
        model = use_of_server(server)
        if is_asked(model, asked, names):
            _print_said(said_by_server(server, model.use, files, asked, names, _has_bar()), as_json)
        else:
            _predict_with_server(server, files, names, templates, softmax, as_json)
        return
    run, *rest = images
    if not rest:
        raise click.UsageError("Missing argument 'IMAGES...': give images after the run, or use --url.")
    _predict_with_run(run, rest, stage, runtime, asked, names, templates, softmax, out, as_json)


def _predict_with_run(
    run: Path,
    images: Sequence[Path],
    stage: str | None,
    runtime: str | None,
    asked: Asked,
    names: list[str] | None,
    templates: Sequence[str],
    softmax: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    import clipress
    from clipress.workflow.kept import choose_artifact
    from clipress.workflow.outline import read_outline
    from clipress.workflow.predict import classified, images_in, labels_from, overlays_of_masks, read_images
    from clipress.workflow.predict_blip import is_asked, said_of

    chosen = choose_artifact(run, read_outline(run), stage, partial(click.echo, err=True), "Predicting with", runtime)
    model = clipress.load(run / chosen.stage, runtime=chosen.runtime)
    if model.segments and names is not None:
        raise click.UsageError("A Segmenter has its own labels: leave --labels and --labels-file out.")
    given = list(images_in(images, click.get_text_stream("stdin")))
    unread: list[str] = []

    def refused(image: Path, why: str) -> None:
        unread.append(why)
        click.echo(json.dumps({"image": str(image), "error": why}) if as_json else why, err=not as_json)

    read = read_images(given, model, refused)
    if is_asked(model, asked, names):
        _print_said(said_of(model, read, asked, names), as_json)
    elif model.segments:
        _print_masks(overlays_of_masks(model, read, out or run / "predicted"), as_json)
    else:
        names = names or model.labels or labels_from(None, None)
        for image, row in classified(model, read, names, templates, softmax):
            click.echo(_prediction(image, names, row, as_json))
    if unread:
        raise DataError(f"{len(unread)} of {len(given)} images could not be read; the first: {unread[0]}")


def _has_bar() -> bool:
    """Return whether a progress bar is shown: on a terminal the printed answers show the progress."""
    return not sys.stdout.isatty()


def _print_said(records: Iterable[Mapping[str, Any]], as_json: bool) -> None:
    """Print what a BLIP said. Raises DataError at the end if images failed."""
    total, failed = 0, []
    for total, record in enumerate(records, 1):  # noqa: B007
        if "error" in record:
            failed.append(f"{record['image']}: {record['error']}")
        if as_json:
            click.echo(json.dumps(record))
        else:
            click.echo(failed[-1] if "error" in record else _said(record), err="error" in record)
    if failed:
        raise DataError(f"{len(failed)} of {total} images failed; the first: {failed[0]}")


def _said(record: Mapping[str, Any]) -> str:
    """Return a line for what a BLIP said."""
    if "text" in record:
        best = "  ".join(f"{one['image']} {one['score']:.2f}" for one in record["images"][:5])
        return f"{record['text']}: {best}"
    if "statement" in record:
        return f"{', '.join(record['images'])}: {record['probability']:.1%} likely to be true"
    return f"{record['image']}: {record.get('answer', record.get('caption'))}"


def _print_masks(masks: Iterable[tuple[Path, Path, dict[str, float]]], as_json: bool) -> None:
    for image, overlay, shares in masks:
        if as_json:
            rounded = {name: round(share, 6) for name, share in shares.items()}
            click.echo(json.dumps({"image": str(image), "overlay": str(overlay), "shares": rounded}))
        else:
            parts = "  ".join(f"{name} {share:.1%}" for name, share in list(shares.items())[:5])
            click.echo(f"{image}: {parts} -> {overlay}")


def _predict_with_server(
    server: Server,
    files: Iterable[Path],
    labels: list[str] | None,
    templates: Sequence[str],
    softmax: bool,
    as_json: bool,
) -> None:
    from clipress.workflow.predict import labels_from, labels_of_server, predict_with_server

    known = labels_of_server(server)
    names = labels or known or labels_from(None, None)
    total, failed = 0, []
    answers = predict_with_server(server, files, names, known, templates, softmax, _has_bar())
    for total, answer in enumerate(answers, 1):  # noqa: B007
        if answer.value is not None:
            click.echo(_prediction(answer.item, names, answer.value, as_json))
            continue
        failed.append(f"{answer.item}: {answer.error}")
        if as_json:
            click.echo(json.dumps({"image": str(answer.item), "error": answer.error}))
        else:
            click.echo(failed[-1], err=True)
    if failed:
        raise DataError(f"{len(failed)} of {total} images could not be classified; the first: {failed[0]}")


def _prediction(image: Path, names: Sequence[str], probabilities: Sequence[float], as_json: bool) -> str:
    pairs = [(name, float(probability)) for name, probability in zip(names, probabilities, strict=True)]
    if as_json:
        return json.dumps({"image": str(image), "probabilities": {name: round(p, 6) for name, p in pairs}})
    ranked = sorted(pairs, key=lambda pair: -pair[1])
    return f"{image}: " + "  ".join(f"{name} {p:.1%}" for name, p in ranked[:5])


@click.command("eval")
@run_argument
@stage_option
@click.option("--split", type=click.Choice(["val", "test"]), default="test", show_default=True)
@click.option("--compare", metavar="STAGE", help="Another artifact: print the difference to it.")
@click.option("--linear-probe", is_flag=True, help="Also fit a linear classifier on image embeddings of training data.")
@click.option("--json", "out", type=FILE, help="Also write the metrics to a file.")
def eval_(run: Path, stage: str | None, split: str, compare: str | None, linear_probe: bool, out: Path | None) -> None:
    """Evaluate an artifact in torch.

    Nothing is exported. Records that cannot be read are named and left out, and the exit code is 2. Every metric has its
    standard error. A difference has the 95 % interval of a paired bootstrap
    over the same items.
    """
    from clipress.workflow.evaluate import evaluate_run, write_evaluation

    found = evaluate_run(run, stage, compare, split, linear_probe, click.echo)
    if found.compare:
        click.echo(f"{found.stage} minus {found.compare}, with the 95 % interval of a paired bootstrap, on the right")
    for name, metric in found.metrics.items():
        click.echo(f"{name:<32} {_metric(metric)}")
    if out:
        write_evaluation(found, out)
        click.echo(f"Metrics: {out}")
    if found.unread:
        records = [record for of_set in found.unread.values() for record in of_set]
        counted = f"{len(records)} unreadable record{'s' * (len(records) != 1)}"
        raise DataError(f"Left out {counted}; the first: {records[0]}")


def _metric(metric: Metric) -> str:
    text = f"{metric.percent:6.2f} ± {metric.standard_error:4.2f} %"
    if metric.interval is None:
        return text
    low, high = metric.interval
    return f"{text}   {metric.difference:+6.2f} [{low:+.2f}, {high:+.2f}]"
