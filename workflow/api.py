"""The public Python API: `clipress.run` and `clipress.load`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipress.errors import missing_extras_named
from clipress.progress import Say
from clipress.serve.classify import LoadedModel
from clipress.workflow.exported import find_export
from clipress.workflow.outcome import Run
from clipress.workflow.recipes import open_recipe


def run(
    recipe: str | Path,
    out: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = True,
    say: Say = lambda line: None,
) -> Run:
    """Compress, export, bench and serve as a recipe says, like `clipress run`.

    A run that was stopped at any point is resumed by the same call.

    Args:
        recipe: a YAML file, or the name of a shipped recipe such as "demo".
        out: the run folder; default: runs/<name of the recipe>.
        overrides: recipe values by place, such as {"stages.0.prune.budget.params": 0.5}.
        resume: keep finished stages and continue from the last checkpoint; otherwise redo every stage.
        say: receives progress, line by line; `print` shows it.

    Raises:
        RecipeError: the recipe is missing or invalid. Nothing has been written.
        BackendMissing: the extra clipress[compress] is not installed.
        ClipressError: the base class of all errors caused by the input.
    """
    opened = open_recipe(recipe, overrides)
    with missing_extras_named():  # This imports torch, which takes seconds: an invalid recipe fails before.
        from clipress.workflow.run import run_recipe

    return run_recipe(opened, None if out is None else Path(out), resume, say)


def load(path: str | Path, threads: int = 0, runtime: str = "onnxruntime") -> LoadedModel:
    """Load an exported model for inference with ONNX Runtime, for which the extra clipress[serve] is enough, or OpenVINO.

    Args:
        path: an export folder, or an artifact of a run: `runs/mine/int8` loads `runs/mine/export/int8`.
        threads: threads inside one operator; 0: one per core.
        runtime: "onnxruntime" or "openvino", which is an extra.

    Raises:
        ArtifactError: there is no export at `path`, or its files are damaged.
        BackendMissing: the extra clipress[serve] or clipress[openvino] is not installed.
    """
    with missing_extras_named():
        return LoadedModel(find_export(Path(path)), threads, runtime)
