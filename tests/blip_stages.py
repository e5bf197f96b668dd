"""Shared by tests of BLIP's tasks: settings that cut a tiny one, and its export, read again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clipress.artifact import save_artifact
from clipress.bench.layers import ELSE, layer_costs
from clipress.data.eval_sets import EvalSet
from clipress.export.settings import OnnxSettings
from clipress.export.to_onnx import onnx_from_artifact
from clipress.models.load import Model, artifact_from_model
from clipress.runtime.graph import Run
from clipress.runtime.onnx_session import run_from_onnx
from clipress.tasks import model_from_artifact, task_named

UNALIGNED = {"head_dim": 1, "ffn": 1}
CUT = {"budget": {"params": 0.7}, "batch_size": 16, "lr": 1e-3, "align": UNALIGNED, "calibrate": 32}
"""Our search, to 70 % of the blocks' parameters."""
CUT_BY_UPOP = {
    "budget": {"upop": 0.5}, "criterion": "upop", "batch_size": 8, "lr": 1e-4, "update_every": 2, "align": UNALIGNED,
    "min_keep": {"head_dim": 0, "ffn": 0},
}  # fmt: skip


def exported(model: Model, sets: Sequence[EvalSet], home: Path) -> tuple[Model, dict[str, Run]]:
    """Save a model, load it again and export it. Returns what was loaded, and every graph's file as a function.

    The files are as precise as `home` is named, and every block of every tower costs something.
    """
    folder = save_artifact(artifact_from_model(model, ({"stage": "x", "hash": "abc"},), {}), home / "x")
    again = model_from_artifact(folder)
    found = onnx_from_artifact(folder, home / "export", OnnxSettings(), sets)
    assert found.precision == home.name
    macs = {(row["tower"], row["name"]): row["macs"] for row in layer_costs(again) if row["name"] != ELSE}
    assert {tower for tower, _ in macs} == {*task_named(model.task).towers} and all(macs.values())
    return again, {name: run_from_onnx(found.onnx(name)) for name in found.graphs}
