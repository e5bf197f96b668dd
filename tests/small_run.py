"""Shared by the runs of tasks other than CLIP's: a short recipe of every stage, and the run that it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from helpers import clipress

STAGES = ["teacher", "pruned", "recovered", "sparse", "int8"]
SHORT = {"steps": 4, "batch_size": 16}


def recipe_of(
    task: str, source: str, student: Mapping[str, Any], held_out: int, losses: Sequence[str] = ()
) -> dict[str, Any]:
    """Return a recipe on an embedded set, `held_out` of whose items are evaluated; its teacher is trained for 30 steps.

    The cut model recovers by `losses`; by default by the task's own, by logits and by tokens.
    """
    train = [{"format": source, "limit": 64}]
    teacher = {
        "name": "dense",
        "task": task,
        "student": dict(student),
        "data": {"train": train},
        "stages": [{"distill": {**SHORT, "steps": 30, "lr": 2e-3}}],
    }
    sets = {split: [{"format": source, "split": split, "limit": held_out}] for split in ("val", "test")}
    return {
        "name": "small",
        "task": task,
        "teacher": {"recipe": teacher},
        "data": {"train": train, **sets},
        "stages": [
            {"prune": {"budget": {"params": 0.5}, "align": {"head_dim": 4, "ffn": 16}, **SHORT}},
            {"distill": {"losses": list(losses or (task, "logits", "tokens")), **SHORT}},
            {"sparsify": SHORT},
            {"quantize": {"calibrate": 16, **SHORT}},
        ],
        "export": {"onnx": {"exporter": "torchscript"}},
        "bench": {"batch": [1], "warm_up": 0, "duration": 1, "iterations": 2},
    }


def run_of(recipe: Mapping[str, Any], folder: Path) -> tuple[Path, Result]:
    """Run a recipe in a folder, with a cache of its own. Returns the run folder and what the command printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPRESS_CACHE", str(folder / "cache"))
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        result = clipress("run", folder / "recipe.yaml", "--out", folder / "run")
    assert result.exit_code == 0, result.output
    return folder / "run", result
