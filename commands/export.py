"""`clipress export`."""

from __future__ import annotations

from pathlib import Path

import click

from clipress.commands.options import ANY_PATH, FILE, given, labels_given, template_option
from clipress.errors import RecipeError


@click.command()
@click.argument("run", type=ANY_PATH)
@click.option(
    "--stage", "stages", multiple=True, help="Artifact to export; repeatable.  [default: what bench kept, or all]"
)
@click.option("--all", "everything", is_flag=True, help="Export all artifacts.")
@click.option("--tensorrt", is_flag=True, help="Also build TensorRT engines; an error where that is impossible.")
@click.option(
    "--precision", type=click.Choice(["fp32", "fp16", "bf16"]), help="Precision of engines.  [default: the recipe's]"
)
@click.option("--foreign", is_flag=True, help="Allow an ONNX file that clipress did not export.")
@click.option("--labels", help="Also write classifier.onnx for these comma-separated labels.")
@click.option("--labels-file", type=FILE, help="The same from a text file, one label per line, or `imagenet`.")
@template_option(note="  [default: the recipe's]")
@click.option(
    "--layout",
    help="Also write a folder as another program has it: immich, open_clip, transformers, transformers.js, web.",
)
@click.option(
    "--verify",
    is_flag=True,
    help="Export nothing; run the self-tests of exported files on this machine. RUN may be an export folder or a file.",
)
def export(
    run: Path,
    stages: tuple[str, ...],
    everything: bool,
    tensorrt: bool,
    precision: str | None,
    foreign: bool,
    labels: str | None,
    labels_file: Path | None,
    templates: tuple[str, ...],
    layout: str | None,
    verify: bool,
) -> None:
    """Export artifacts to ONNX and TensorRT.

    Every ONNX file is compared with torch, and every engine with ONNX Runtime. RUN may be a single ONNX file, copied
    to a machine with a GPU:

    \b
      clipress export image.onnx --tensorrt

    Every file carries a self-test that detects INT8 overflow on other CPUs and runtimes. clipress runs it when it opens
    the file. To run it by hand:

    \b
      clipress export --verify FOLDER
    """
    onnx = labels_given(labels, labels_file, templates)
    if verify:
        if stages or everything or tensorrt or precision or foreign or onnx or layout:
            raise RecipeError("--verify exports nothing and takes no other option.")
        from clipress.workflow.verify import verify_export

        verify_export(run, click.echo)
        return
    if stages and everything:
        raise RecipeError("--all and --stage cannot be combined: leave one of them out.")
    if not tensorrt and (precision or foreign):
        raise RecipeError("--precision and --foreign require --tensorrt.")
    if run.suffix == ".onnx":
        if layout:
            raise RecipeError("--layout needs both encoders and the artifact: give it with the run folder.")
        _build_engine(run, tensorrt, precision, foreign, bool(onnx))
        return
    from clipress.workflow.export import ExportRequest, export_run

    engines = given(precision=precision) if tensorrt else None
    export_run(run, ExportRequest(stages, everything, onnx, engines, layout), click.echo)


def _build_engine(file: Path, tensorrt: bool, precision: str | None, foreign: bool, has_labels: bool) -> None:
    if not tensorrt:
        raise RecipeError(
            f"{file} is already exported. To build its TensorRT engine: clipress export {file} --tensorrt"
        )
    if has_labels:
        raise RecipeError("A classifier needs both encoders: give --labels with the run folder.")
    from clipress.workflow.engines import build_engine

    build_engine(file, given(precision=precision), foreign, click.echo)
