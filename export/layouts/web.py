"""A folder that any static host can serve: a page that runs the models in the browser, on a camera or a folder of images.

    index.html, style.css, *.js      the page
    vendor/                          onnxruntime-web and Hugging Face's tokenizers, with their licences
    site.json                        what the page offers, and what it has to know of every model
    models/<stage>/image.onnx, …     the graphs as they were exported, and the tokenizer's files

`make web` puts vendor/ beside the page, from npm; the wheel has it.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from clipress.errors import BackendMissing, ExportError
from clipress.export.layouts import LAYOUTS, LayoutJob
from clipress.export.layouts.tokenizer_files import write_tokenizer
from clipress.runtime.export_folder import Exported
from clipress.runtime.served import IMAGE, TEXT

PAGE = Path(__file__).with_name("web")
VENDOR = PAGE / "vendor"
LABELS = ("a person", "a cat", "a dog", "a plant", "a cup", "a screen", "a hand", "a wall")
TEMPLATE = "a photo of {}"


@dataclass(frozen=True)
class Page:
    """What the page offers beside its models."""

    title: str
    chosen: str
    """Stage of the model that is shown first."""
    compared: str
    """Stage of the model that `Compare` puts on the left."""
    labels: Sequence[str] = LABELS
    template: str = TEMPLATE
    python: bool = False
    """Whether the page's server runs the graphs, instead of the browser."""


@LAYOUTS.register("web")
def write(job: LayoutJob, folder: Path) -> None:
    """Write the page with one model."""
    exported = job.exported
    for name, content in site_of([exported], Page(exported.stage, exported.stage, exported.stage)).items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            target.write_bytes(content)
        else:
            shutil.copyfile(content, target)


def site_of(models: Sequence[Exported], page: Page) -> dict[str, Path | bytes]:
    """Return every file of the page by its path in the folder: where it is, or its bytes.

    Raises ExportError for a model that the page has no view for, and BackendMissing if `make web` was not run.
    """
    if not VENDOR.is_dir():
        raise BackendMissing(
            "The page needs onnxruntime-web: expected it in clipress/export/layouts/web/vendor, which the wheel has, found "
            "nothing. In a checkout: make web (needs npm)."
        )
    site = _page(unpacked=not page.python)
    for exported in models:
        site |= {f"models/{exported.stage}/{name}": content for name, content in _files(exported).items()}
    offered = {
        **{"title": page.title, "chosen": page.chosen, "compared": page.compared, "python": page.python},
        **{"labels": list(page.labels), "template": page.template, "models": [_about(one) for one in models]},
    }
    return {**site, "site.json": json.dumps(offered, indent=1, ensure_ascii=False).encode()}


def reason_against(exported: Exported) -> str | None:
    """Return why the page has no view for a model; None if it has."""
    graphs = exported.graphs
    classifies = graphs.keys() == {IMAGE} and graphs[IMAGE].agrees == "logits" and exported.labels is not None
    if classifies or graphs.keys() == {IMAGE, TEXT}:
        return None
    return f"the page shows CLIPs and classifiers with labels, and this is a model for '{exported.task}'"


def _page(unpacked: bool) -> dict[str, Path | bytes]:
    """Return the files that do not depend on models; packed ones run graphs in the browser, and come `unpacked` or not at all."""
    found: dict[str, Path | bytes] = {}
    for path in sorted(PAGE.rglob("*")):
        name = path.relative_to(PAGE).as_posix()
        if path.suffix == ".gz":
            if unpacked:  # It takes a while.
                found[name.removesuffix(".gz")] = gzip.decompress(path.read_bytes())
        elif path.is_file() and not path.name.startswith("."):
            found[name] = path
    return found


def _about(exported: Exported) -> dict[str, Any]:
    """Return what the page has to know of a model."""
    if reason := reason_against(exported):
        raise ExportError(f"{exported.folder}: {reason}.")
    about = {
        "name": exported.stage,
        "precision": exported.precision,
        "bytes": exported.bytes,
        "preprocess": exported.preprocess.model_dump(),
        "labels": exported.labels,
        "logit_scale": exported.logit_scale,
        "logit_bias": exported.logit_bias,
        TEXT: None,
    }
    for name, graph in exported.graphs.items():
        data = exported.data(name)
        about[name] = {
            "file": exported.onnx(name).name,
            "data": data and data.name,
            "input": graph.inputs[0].name,
            "output": graph.outputs[0].name,
        }
    if TEXT in exported.graphs:
        ids = exported.graphs[TEXT].inputs[0]
        about[TEXT] |= {"length": ids.shape[0], "takes_any_length": ids.end is not None}
    return about


def _files(exported: Exported) -> dict[str, Path | bytes]:
    """Return a model's files by name."""
    found: dict[str, Path | bytes] = {}
    for name in exported.graphs:
        found |= {path.name: path for path in (exported.onnx(name), exported.data(name)) if path is not None}
    if exported.tokenizer is not None:
        with TemporaryDirectory() as folder:
            write_tokenizer(exported, Path(folder))
            found |= {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    return found
