"""Tiny BLIPs as export folders. Their weights are random, and large enough that what they say depends on the image."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import yaml

from clipress.artifact import save_artifact
from clipress.data.eval_sets import EvalSet, evalsets
from clipress.data.spec import SourceSpec
from clipress.export.settings import OnnxSettings
from clipress.export.to_onnx import onnx_from_artifact
from clipress.models.load import Model, artifact_from_model
from clipress.tasks import model_from_artifact, task_named

DATA = {"retrieval": "scenes", "nlvr": "statements", "caption": "scenes", "vqa": "questions"}
SIZES = {
    "width": 32, "layers": 1, "heads": 2, "patch_size": 8, "image_size": 32, "text_width": 32, "text_layers": 1, "text_heads": 2,
    "context_length": 24,
}  # fmt: skip
LARGER = {"retrieval": 4, "nlvr": 4, "caption": 4, "vqa": 12}
MORE = {"retrieval": {"embed_dim": 16}, "vqa": {"answer_length": 4}}


@cache
def set_of(task: str) -> EvalSet:
    """Return the images and texts that a task is measured on."""
    (one,) = evalsets([SourceSpec(format=DATA[task], split="val", limit=12)])
    return one


def images_of(task: str) -> list:
    """Return the images of `set_of`, as arrays."""
    return [set_of(task).source.image(place) for place in range(len(set_of(task).source))]


def texts_of(task: str) -> list[str]:
    """Return the first text of every image of `set_of`."""
    return [set_of(task).source.captions(place)[0] for place in range(len(set_of(task).source))]


def write_blip(task: str, home: Path) -> tuple[Path, Model]:
    """Write a run folder with an artifact and its export. Returns the export, and the artifact's model in torch."""
    section = {**SIZES, **MORE.get(task, {}), "vocabulary": {"format": DATA[task], "limit": 40}}
    data = {"train": [{"format": DATA[task]}]}
    recipe = {
        "name": task,
        "task": task,
        "student": section,
        "data": data,
        "stages": [{"distill": {"name": "dense", "steps": 1}}],
    }
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    model = task_named(task).student_from(section, None, 0)
    with torch.no_grad():
        for weight in model.module.parameters():
            if weight.ndim > 1:
                weight.mul_(LARGER[task])
    folder = save_artifact(artifact_from_model(model, ({"stage": "dense", "hash": "abc"},), {}), home / "dense")
    onnx_from_artifact(folder, home / "export" / "dense", OnnxSettings(exporter="torchscript"), [set_of(task)])
    return home / "export" / "dense", model_from_artifact(folder)
