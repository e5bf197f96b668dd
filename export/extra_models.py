"""Optional files beside an export's graphs, made from the graphs' files and compared with them.

    <folder>/classifier.onnx   pixel_values f32 [batch, 3, S, S] -> probabilities f32 [batch, C]; CLIP only
    <folder>/joint.onnx        pixel_values [image_batch, 3, S, S], input_ids i64 [text_batch, L]
                               -> image_embeds, text_embeds, logits_per_image f32 [image_batch, text_batch]; CLIP only
    <folder>/<any>.fp16.onnx   any graph, classifier or joint file in float16; int8-fp16 where it is INT8

Inputs and outputs of float16 files are float32. They are for GPUs; a session on the CPU needs
`disabled_optimizers=["NchwcTransformer"]`, or ONNX Runtime crashes on their convolutions.

A file needs nothing else: its metadata (metadata.py) are those of the graphs' files plus what makes it different.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx

from clipress.data.eval_sets import EvalSet
from clipress.data.prompts import check_labels, read_classes, read_templates
from clipress.errors import ExportError
from clipress.export import merge, metadata, onnx_file, parity
from clipress.export.int8_graph import is_portable
from clipress.export.precision import lower
from clipress.export.settings import OnnxSettings
from clipress.metrics.evaluate import encode_texts
from clipress.metrics.zeroshot import embed_labels, label_probabilities
from clipress.runtime.export_folder import Exported, read_export
from clipress.runtime.graph import Arrays, Run
from clipress.runtime.onnx_session import run_from_onnx, self_test_of
from clipress.tasks import task_named
from clipress.tasks.clip import INPUTS, OUTPUTS, SIDES, Clip, encoder

IMAGE, TEXT = SIDES
PROMPTS = 32  # Held in memory at once.
Samples = Mapping[str, Arrays]
"""Real inputs of every graph."""
Check = Callable[[Path], dict[str, float]]
"""Compares a file with the graphs' files: returns figures, raises ExportError."""


@dataclass(frozen=True)
class ExtraModel:
    """A file to write, `<name>.onnx`."""

    name: str
    graphs: tuple[str, ...]
    """The graphs it is made from."""
    about: dict[str, Any]
    """Metadata that differ from those of the graphs' files."""
    build: Callable[[Samples], tuple[onnx.ModelProto, Check]]
    """Returns the ONNX model, and how its file is compared with the sources on samples."""


def extra_models_from_export(folder: Path, settings: OnnxSettings, sets: Sequence[EvalSet]) -> dict[str, Path]:
    """Write the extra files of the settings into an export folder, after comparing each with its sources.

    A file that was made from these graphs with these settings is kept. Returns the files by name. Raises ExportError
    when one does not agree with its sources or the task cannot have it, DataError for labels or templates that cannot
    be used.
    """
    exported = read_export(folder)
    wanted = _wanted(exported, settings)
    missing = [one for one in wanted if not _is_made(folder, one)]
    if missing:
        task = task_named(exported.task)
        samples = parity.samples_from_export(exported, sets)
        described = metadata.read_metadata(onnx_file.read(exported.onnx(task.main_graph))) or {}
    for one in missing:
        _write(exported, one, described, samples)
    return {one.name: _path(folder, one) for one in wanted}


def files_of(exported: Exported) -> dict[tuple[str, str], Path]:
    """Return an export's files by graph, or `joint`, and precision: the graphs', and the extra ones that were made of them."""
    for_gpus = exported.for_gpus()
    parts = (*(_graph(for_gpus, name) for name in exported.graphs), _joint(for_gpus))
    lowered = [(one.name, _in_float16(for_gpus, one)) for one in parts]
    extra = {("joint", exported.precision): _joint(exported)}
    extra |= {(name, one.about["precision"]): one for name, one in lowered}
    graphs = {(name, exported.precision): exported.onnx(name) for name in exported.graphs}
    return graphs | {key: _path(exported.folder, one) for key, one in extra.items() if _is_made(exported.folder, one)}


def label_embeddings(exported: Exported, labels: Sequence[str], templates: Sequence[str]) -> np.ndarray:
    """Return one unit vector per label, float32 [C, D], from the text graph: the mean over the templates."""
    encode = encoder({TEXT: run_from_onnx(exported.onnx(TEXT))}, TEXT)
    return embed_labels(partial(encode_texts, encode, exported.tokenize(), batch=PROMPTS), labels, templates)


def _wanted(exported: Exported, settings: OnnxSettings) -> list[ExtraModel]:
    labels = settings.labels
    if settings.labels_file is not None:
        labels = read_classes(settings.labels_file).names  # ImageNet's list has duplicate names.
    elif labels is not None:
        check_labels(labels)
    if not isinstance(task_named(exported.task), Clip):
        _refuse_clip_files(exported, labels is not None, settings.joint)
    templates = read_templates(settings.templates) if labels is not None else ()
    classes = cache(lambda: label_embeddings(exported, labels, templates))  # Slow for long lists, and used twice.

    def merged(source: Exported) -> list[ExtraModel]:
        made = [_classifier(source, labels, templates, classes, settings.softmax)] if labels is not None else []
        return [*made, _joint(source)] if settings.joint else made

    wanted = merged(exported)
    if settings.fp16:
        source = exported.for_gpus()
        wanted += [
            _in_float16(source, one) for one in (*(_graph(source, name) for name in source.graphs), *merged(source))
        ]
    return wanted


def _refuse_clip_files(exported: Exported, labels: bool, joint: bool) -> None:
    task = f"{exported.folder} is a model for '{exported.task}'"
    if labels:
        raise ExportError(f"export.onnx.labels: zero-shot classifiers need a CLIP; {task}. Remove the labels.")
    if joint:
        raise ExportError(f"export.onnx.joint: a joint file needs a CLIP; {task}. Remove joint.")


def _graph(exported: Exported, name: str) -> ExtraModel:
    """Return a graph's own file, as a source of others."""

    def build(_: Samples) -> tuple[onnx.ModelProto, Check]:
        return onnx_file.read(exported.onnx(name)), lambda _: {}

    about = {"agrees": exported.graphs[name].agrees, **_made_of(exported, name)}
    return ExtraModel(name, (name,), about, build)


def _classifier(
    exported: Exported,
    labels: Sequence[str],
    templates: Sequence[str],
    embeddings: Callable[[], np.ndarray],
    softmax: bool,
) -> ExtraModel:
    scale, bias = exported.logit_scale, None if softmax else exported.logit_bias

    def build(samples: Samples) -> tuple[onnx.ModelProto, Check]:
        classes = embeddings()

        def from_graphs() -> Run:
            image = run_from_onnx(exported.onnx(IMAGE))

            def run(case: Arrays) -> dict[str, np.ndarray]:
                return {merge.PROBABILITIES: label_probabilities(image(case)[OUTPUTS[IMAGE]] @ classes.T, scale, bias)}

            return run

        def check(path: Path) -> dict[str, float]:
            cases, limits = _cases(samples, [IMAGE]), _limits("fp32", exported)
            return parity.compare_outputs(from_graphs, partial(run_from_onnx, path), cases, limits, path.name)

        return merge.classifier(onnx_file.read(exported.onnx(IMAGE)), classes, scale, bias), check

    about = {"labels": [*labels], "templates": [*templates], "probabilities": "softmax" if bias is None else "sigmoid"}
    about |= _made_of(exported)
    return ExtraModel("classifier", (IMAGE,), about, build)


def _joint(exported: Exported) -> ExtraModel:
    scale, bias = exported.logit_scale, exported.logit_bias

    def build(samples: Samples) -> tuple[onnx.ModelProto, Check]:
        def from_graphs() -> Run:
            runs = {side: run_from_onnx(exported.onnx(side)) for side in SIDES}

            def run(case: Arrays) -> dict[str, np.ndarray]:
                images, texts = (encoder(runs, side)(case[INPUTS[side]]) for side in SIDES)
                logits = scale * (images @ texts.T) + (bias or 0.0)
                return {OUTPUTS[IMAGE]: images, OUTPUTS[TEXT]: texts, merge.LOGITS: logits}

            return run

        def check(path: Path) -> dict[str, float]:
            cases, limits = _cases(samples, SIDES), _limits("fp32", exported)
            return parity.compare_outputs(from_graphs, partial(run_from_onnx, path), cases, limits, path.name)

        files = {side: onnx_file.read(exported.onnx(side)) for side in SIDES}
        return merge.joint(files, scale, bias), check

    return ExtraModel("joint", SIDES, _made_of(exported), build)


def _in_float16(exported: Exported, one: ExtraModel) -> ExtraModel:
    """Return the float16 form of a graph, or of a file made from graphs."""
    precision = {"fp32": "fp16", "int8": "int8-fp16"}[exported.precision]

    def build(samples: Samples) -> tuple[onnx.ModelProto, Check]:
        full, _ = one.build(samples)

        def check(path: Path) -> dict[str, float]:
            found = partial(run_from_onnx, path, float16=True)
            if one.name in exported.graphs:  # One graph is in float16, and ranked with the others as they were.
                graphs = {name: partial(run_from_onnx, exported.onnx(name)) for name in exported.graphs}
                what = parity.Comparison(exported.graphs, samples, precision, dict.fromkeys(graphs, path.name))
                return parity.compare(what, parity.Openers(graphs), parity.Openers({**graphs, one.name: found}))
            source = path.with_name("full.onnx")
            onnx_file.write(full, source)
            # The difference of unit vectors whose cosine is at the limit.
            apart = math.sqrt(2 - 2 * parity.limits_of(precision).least_cosine)
            limits = _limits(precision, exported) | dict.fromkeys(OUTPUTS.values(), apart)
            cases = _cases(samples, one.graphs)
            return parity.compare_outputs(partial(run_from_onnx, source), found, cases, limits, path.name)

        return lower(full, "fp16"), check

    about = {**one.about, "tower": one.name, "precision": precision}
    return ExtraModel(f"{one.name}.{precision}", one.graphs, about, build)


def _cases(samples: Samples, graphs: Sequence[str]) -> list[Arrays]:
    """Return inputs by name in several batch sizes; a second graph has others than the first."""
    batches = [*parity.BATCHES, parity.AT_ONCE]
    cases: list[dict[str, np.ndarray]] = [{} for _ in batches]
    for place, graph in enumerate(graphs):
        sizes = batches[:: 1 if place == 0 else -1]
        for case, size in zip(cases, sizes, strict=True):
            case |= {name: rows[:size] for name, rows in samples[graph].items()}
    return cases


def _limits(precision: str, exported: Exported) -> dict[str, float]:
    """Return the largest allowed difference per output: what counts as an equal score, scaled as the output is."""
    scale, equal = exported.logit_scale, parity.limits_of(precision).equal
    # Softmax at least halves the difference of logits.
    return {
        **dict.fromkeys(OUTPUTS.values(), equal),
        merge.LOGITS: scale * equal,
        merge.PROBABILITIES: scale * equal / 2,
    }


def _made_of(exported: Exported, *graphs: str) -> dict[str, Any]:
    return {"made_of": {name: exported.files[name].sha256 for name in graphs or exported.files}}


def _write(exported: Exported, one: ExtraModel, described: Mapping[str, Any], samples: Samples) -> None:
    """Write a file aside, compare it with its sources, and put it in place."""
    folder = exported.folder
    model, check = one.build(samples)
    portable = is_portable(model)
    metadata.stamp(model, {"portable": portable})
    with TemporaryDirectory(dir=folder, prefix=".") as aside:
        path = Path(aside) / f"{one.name}.onnx"
        onnx_file.write(model, path)
        del model
        figures = check(path)
        graphs = [exported.graphs[name] for name in one.graphs]
        test = self_test_of(path, graphs, float16="16" in one.about.get("precision", ""))
        about = {**described, **metadata.ends_of(*graphs), "tower": one.name, **one.about, "parity": figures}
        metadata.stamp_file(path, about | {"portable": portable, "self_test": test})
        onnx_file.move(path, _path(folder, one))


def _is_made(folder: Path, one: ExtraModel) -> bool:
    """Return whether a file exists that was made from the same graphs with the same settings."""
    try:
        found = metadata.read_metadata(onnx_file.read(_path(folder, one))) or {}
    except Exception:  # It is missing or damaged; protobuf's errors have no common type.
        return False
    return {key: found.get(key) for key in one.about} == one.about


def _path(folder: Path, one: ExtraModel) -> Path:
    return folder / f"{one.name}.onnx"
