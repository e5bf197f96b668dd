"""Files beside the two towers of an export folder, on request, each put together from theirs and held against them.

    <folder>/classifier.onnx   pixel_values f32 [batch, 3, S, S] -> probabilities f32 [batch, C] of labels baked in
    <folder>/joint.onnx        pixel_values [image_batch, 3, S, S], input_ids i64 [text_batch, L]
                               -> image_embeds, text_embeds, logits_per_image f32 [image_batch, text_batch]
    <folder>/<any>.fp16.onnx   what image.onnx, text.onnx and the two above compute, in float16; int8-fp16 where it is INT8

Inputs and outputs of float16 files are float32. They are for GPUs; a session on the CPU needs
`disabled_optimizers=["NchwcTransformer"]`, or ONNX Runtime crashes on their convolutions.

Nothing else is needed to use one: its metadata (metadata.py) hold what the towers' hold, and what makes it different.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx

from clipress.data.eval_sets import EvalSet
from clipress.data.prompts import check_labels, read_classes, read_templates
from clipress.data.tokens import tokenizer_from_spec
from clipress.export import merge as compose
from clipress.export import metadata, parity
from clipress.export.int8_graph import is_portable
from clipress.export.precision import lower
from clipress.export.settings import OnnxSettings
from clipress.metrics.classify import softmax
from clipress.metrics.zeroshot import embed_labels
from clipress.runtime.export_folder import Exported, read_export
from clipress.runtime.onnx_session import self_test_of
from clipress.storage import write_bytes_whole

NAMES = {"image": "pixel_values", "text": "input_ids"}
TOWERS_OF = {"classifier": ("image",), "joint": ("image", "text")}
PROMPTS = 32  # held in memory at once
Check = Callable[[Path], dict[str, float]]
"""What holds a file against the towers' files: returns figures, raises ExportError."""


@dataclass(frozen=True)
class Variant:
    """A file to be, `<name>.onnx`."""

    name: str
    about: dict[str, Any]
    """What its metadata say that the towers' do not."""
    build: Callable[[Mapping[str, np.ndarray]], tuple[onnx.ModelProto, Check]]
    """Real inputs of both towers -> the graph, and its check on them, of a file in a folder that goes away."""


def variants_from_export(folder: Path, settings: OnnxSettings, sets: Sequence[EvalSet]) -> dict[str, Path]:
    """Write what the settings ask for beside an export's towers, each checked on real samples before it is put there.

    One that is there already, of these very towers and settings, is taken as it is. Returns the files by their names.
    Raises ExportError when one does not agree with the towers, DataError for labels or templates that cannot be used.
    """
    exported = read_export(folder)
    wanted = _wanted(exported, settings)
    missing = [one for one in wanted if not _is_made(folder, one)]
    if missing:
        tokenize = tokenizer_from_spec(exported.tokenizer.model_dump())
        inputs = parity.samples(exported.preprocess, tokenize, sets)
        described = metadata.told(onnx.load(exported.onnx("image"))) or {}
    for one in missing:
        _write(folder, one, described, inputs)
    return {one.name: _path(folder, one) for one in wanted}


def label_embeddings(exported: Exported, labels: Sequence[str], templates: Sequence[str]) -> np.ndarray:
    """Return one unit vector per label, float32 [C, D], by the export's text tower: the mean over the templates."""
    encode, tokenize = parity.runner(exported.onnx("text")), tokenizer_from_spec(exported.tokenizer.model_dump())

    def encode_all(prompts: Sequence[str]) -> np.ndarray:
        parts = (prompts[start : start + PROMPTS] for start in range(0, len(prompts), PROMPTS))
        return np.concatenate([encode(tokenize(part)) for part in parts])

    return embed_labels(encode_all, labels, templates)


def _wanted(exported: Exported, settings: OnnxSettings) -> list[Variant]:
    labels = settings.labels
    if settings.labels_file is not None:
        labels = read_classes(settings.labels_file).names  # ImageNet's has names that are there twice
    elif labels is not None:
        check_labels(labels)
    templates = read_templates(settings.templates) if labels is not None else ()
    classes = cache(lambda: label_embeddings(exported, labels, templates))  # long for long lists, and used twice

    def composed(source: Exported) -> list[Variant]:
        made = [_classifier(source, labels, templates, classes)] if labels is not None else []
        return [*made, _joint(source)] if settings.joint else made

    wanted = composed(exported)
    if settings.fp16:
        source = exported.for_gpus()
        wanted += [_lowered(source, one) for one in (*(_tower(source, tower) for tower in NAMES), *composed(source))]
    return wanted


def _tower(exported: Exported, tower: str) -> Variant:
    """Return a tower's own file, as what others are made from."""

    def build(_: Mapping[str, np.ndarray]) -> tuple[onnx.ModelProto, Check]:
        return onnx.load(exported.onnx(tower)), lambda _: {}

    return Variant(tower, _made_of(exported, tower), build)


def _classifier(
    exported: Exported, labels: Sequence[str], templates: Sequence[str], embeddings: Callable[[], np.ndarray]
) -> Variant:
    def build(inputs: Mapping[str, np.ndarray]) -> tuple[onnx.ModelProto, Check]:
        classes, scale = embeddings(), exported.logit_scale
        image = parity.all_outputs(exported.onnx("image"))

        def by_towers(case: parity.Feeds) -> dict[str, np.ndarray]:
            return {"probabilities": softmax(scale * (image(case)["image_embeds"] @ classes.T))}

        def check(path: Path) -> dict[str, float]:
            limits = _limits("fp32", scale)
            return parity.same_outputs(by_towers, parity.all_outputs(path), _cases(inputs, "image"), limits, path.name)

        return compose.classifier(onnx.load(exported.onnx("image")), classes, scale), check

    return Variant("classifier", {"labels": [*labels], "templates": [*templates], **_made_of(exported)}, build)


def _joint(exported: Exported) -> Variant:
    scale, bias = exported.logit_scale, exported.logit_bias

    def build(inputs: Mapping[str, np.ndarray]) -> tuple[onnx.ModelProto, Check]:
        image, text = (parity.runner(exported.onnx(tower)) for tower in ("image", "text"))

        def by_towers(case: parity.Feeds) -> dict[str, np.ndarray]:
            images, texts = image(case["pixel_values"]), text(case["input_ids"])
            logits = scale * (images @ texts.T) + (bias or 0.0)
            return {"image_embeds": images, "text_embeds": texts, "logits_per_image": logits}

        def check(path: Path) -> dict[str, float]:
            cases, limits = _cases(inputs, "image", "text"), _limits("fp32", scale)
            return parity.same_outputs(by_towers, parity.all_outputs(path), cases, limits, path.name)

        return compose.joint(onnx.load(exported.onnx("image")), onnx.load(exported.onnx("text")), scale, bias), check

    return Variant("joint", _made_of(exported), build)


def _lowered(exported: Exported, one: Variant) -> Variant:
    """Return a file in float16 of what a tower is, or of what is put together from towers."""
    precision = {"fp32": "fp16", "int8": "int8-fp16"}[exported.precision]

    def build(inputs: Mapping[str, np.ndarray]) -> tuple[onnx.ModelProto, Check]:
        full, _ = one.build(inputs)

        def check(path: Path) -> dict[str, float]:
            if one.name in NAMES:  # one tower is lowered, and ranked with the other as it was
                towers = {tower: parity.runner(exported.onnx(tower)) for tower in NAMES}
                found = {**towers, one.name: parity.runner(path, float16=True)}
                return parity.compare(towers, found, inputs, precision, dict.fromkeys(NAMES, path.name))
            source = path.with_name("full.onnx")
            onnx.save(full, source)
            run, cases = parity.all_outputs(path, float16=True), _cases(inputs, *TOWERS_OF[one.name])
            apart = math.sqrt(2 - 2 * parity.LIMITS[precision][0])  # unit vectors of the least cosine are
            limits = _limits(precision, exported.logit_scale) | {"image_embeds": apart, "text_embeds": apart}
            return parity.same_outputs(parity.all_outputs(source), run, cases, limits, path.name)

        return lower(full, "fp16"), check

    return Variant(f"{one.name}.{precision}", {**one.about, "tower": one.name, "precision": precision}, build)


def _cases(inputs: Mapping[str, np.ndarray], *towers: str) -> list[parity.Feeds]:
    """Return inputs by their names, in batches that differ where there are two."""
    columns = []
    for tower in towers:
        sizes = (*parity.BATCHES, len(inputs[tower]))
        columns.append([(NAMES[tower], inputs[tower][:n]) for n in (reversed(sizes) if tower == "text" else sizes)])
    return [dict(case) for case in zip(*columns, strict=True)]


def _limits(precision: str, scale: float) -> dict[str, float]:
    """Return how far outputs may be off: what counts as an equal score, scaled as they are."""
    equal = parity.LIMITS[precision][2]
    embeds = dict.fromkeys(("image_embeds", "text_embeds"), equal)
    # softmax at least halves what logits are off by
    return {**embeds, "logits_per_image": scale * equal, "probabilities": scale * equal / 2}


def _made_of(exported: Exported, *towers: str) -> dict[str, Any]:
    return {"made_of": {tower: exported.files[tower].sha256 for tower in towers or exported.files}}


def _write(folder: Path, one: Variant, described: Mapping[str, Any], inputs: Mapping[str, np.ndarray]) -> None:
    """Write a variant aside, check it, and put it in place."""
    model, check = one.build(inputs)
    metadata.stamp_portable(model)
    with TemporaryDirectory(dir=folder, prefix=".") as aside:
        path = Path(aside) / f"{one.name}.onnx"
        onnx.save(model, path)
        figures = check(path)
        test = self_test_of(path, float16="16" in one.about.get("precision", ""))
    about = {**described, "tower": one.name, **one.about, "parity": figures}
    metadata.stamp(model, about | {"portable": is_portable(model), "self_test": test})
    write_bytes_whole(_path(folder, one), model.SerializeToString())


def _is_made(folder: Path, one: Variant) -> bool:
    """Tell whether a variant is there, of the same towers and settings."""
    try:
        found = metadata.told(onnx.load(_path(folder, one))) or {}
    except Exception:  # not there or damaged: protobuf's own errors have no common type
        return False
    return {key: found.get(key) for key in one.about} == one.about


def _path(folder: Path, one: Variant) -> Path:
    return folder / f"{one.name}.onnx"
