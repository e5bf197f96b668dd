"""`clipress show` and `import`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import click

from clipress.commands.options import ANY_PATH, FOLDER


@click.command()
@click.argument("artifact", type=FOLDER)
def show(artifact: Path) -> None:
    """Describe an artifact, or list those of a run."""
    from clipress.artifact import read_header

    lines = _run_lines(artifact) if (artifact / "recipe.yaml").is_file() else _artifact_lines(read_header(artifact))
    for line in lines:
        click.echo(line)


def _run_lines(run: Path) -> Iterator[str]:
    from clipress.artifact import HEADER, read_header
    from clipress.workflow.outline import read_outline

    for name in read_outline(run).artifacts:
        if (run / name / HEADER).is_file():
            yield f"{name:<12} {read_header(run / name)['counts']['params']:>12,} parameters"
        else:
            yield f"{name:<12} not made yet"


def _artifact_lines(header: dict[str, Any]) -> Iterator[str]:
    counts = header["counts"]
    yield (
        f"parameters {counts['params']:,} (without embeddings {counts['params_without_embeddings']:,}, "
        f"in blocks {counts['block_params']:,})"
    )
    for name, shape in header["shapes"].items():
        if "heads" in shape:
            ffn = f", ffn {shape['ffn']}" if "ffn" in shape else ""  # cross-attentions have records of their own
            yield f"  {name}: {shape['heads']} heads, qk {shape['qk_dim']}, v {shape['v_dim']}{ffn}"
        else:
            yield f"  {name}: " + ", ".join(f"{key} {value}" for key, value in shape.items())
    for key in ("sparsity", "quantization"):
        if header.get(key):
            yield from _method_lines(key, header[key])
    for record in header["lineage"]:
        yield f"stage {record['stage']} ({record.get('kind', 'start')}) {record['hash']}"
    for key, value in header["metrics"].get("accuracy", {}).items():
        yield f"  {key} {value:.2f} % ({header['metrics']['conditions']['split']})"


def _method_lines(key: str, method: dict[str, Any]) -> Iterator[str]:
    layers = method.get("weights") or method.get("modules")
    bits = {True: ", weights in 7 bits", False: ", weights in 8 bits"}.get(method.get("portable"), "")
    yield f"{key}: {method.get('pattern') or method.get('dtype')} on {len(layers)} layers{bits}"
    for name, reason in method.get("skipped", {}).items():
        yield f"  {name} stays dense: {reason}"


@click.command("import")
@click.argument("checkpoint", type=ANY_PATH)
@click.argument("out", type=FOLDER)
@click.option(
    "--format",
    "form",
    default="auto",
    show_default=True,
    help="openai, open_clip, transformers, mobileclip, clip-kd, tinyclip, upop, deit, segmenter, blip or auto.",
)
@click.option(
    "--model",
    help="An open_clip model name, if the file does not contain its architecture; of a pretrained BLIP, the task: "
    "retrieval, nlvr, caption or vqa.",
)
@click.option(
    "--weights",
    "which",
    type=click.Choice(["raw", "ema"]),
    help="Raw or averaged weights; default: raw ones if there are any.",
)
@click.option("--base", type=FOLDER, help="Of an adapter (PEFT): the folder or artifact it is merged into.")
def import_(
    checkpoint: Path,
    out: Path,
    form: str,
    model: str | None,
    which: Literal["raw", "ema"] | None,
    base: Path | None,
) -> None:
    """Import a third-party CLIP, ViT classifier, Segmenter or BLIP.

    The artifact in OUT can be a recipe's teacher. Nothing is unpickled.
    """
    from clipress.workflow.artifacts import import_checkpoint

    made = import_checkpoint(checkpoint, out, form, model, which, base)
    record = made.lineage[-1]
    taken = f" ({record['taken']})" if record["taken"] else ""
    click.echo(f"{checkpoint}: {record['format']}{taken}, {made.counts['params']:,} parameters -> {out}")
    for line in _imported(made):
        click.echo(f"  {line}")


def _imported(made: Any) -> Iterator[str]:
    """Say what the weights alone do not show: activation and tokenizer, or classes, and the preprocessing in the artifact."""
    p, words = made.preprocess, made.tokenizer
    if words is not None:
        tanh = (made.architecture.get("text_cfg", {}).get("act_kwargs") or {}).get("approximate") == "tanh"
        activation = "QuickGELU" if made.architecture.get("quick_gelu") else "GELU by tanh" if tanh else "GELU"
        yield f"activation: {activation}"
        yield f"tokenizer: {words['name']}, {words['context_length']} ids"
    elif labels := made.architecture.get("labels"):
        yield f"classes: {len(labels):,}, {', '.join(labels[:3])}, ..."
    mean, std = (", ".join(f"{value:.4g}" for value in p[key]) for key in ("mean", "std"))
    source = made.lineage[-1]["preprocess"]
    resize = p["resize_mode"] + (f", crop_pct {p['crop_pct']:.4g}" if p["crop_pct"] < 1 else "")
    yield f"preprocessing, {source}: {p['size']} pixels, {p['interpolation']}, {resize}; mean {mean}; std {std}"
