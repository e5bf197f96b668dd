"""clipress: compress, export, measure and serve CLIP models.

    run = clipress.run("recipe.yaml", out="runs/mine")
    model = clipress.load("runs/mine/int8")
    model.classify("cat.jpg", labels=["cat", "dog"])

Importing clipress loads nothing heavy, and `load` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from clipress.version import __version__

if TYPE_CHECKING:
    from clipress.serve.classify import LoadedModel
    from clipress.workflow.api import load, run
    from clipress.workflow.outcome import Run

__all__ = ["LoadedModel", "Run", "__version__", "load", "run"]

_HOMES = {
    "LoadedModel": "clipress.serve.classify",
    "Run": "clipress.workflow.outcome",
    "load": "clipress.workflow.api",
    "run": "clipress.workflow.api",
}


def __getattr__(name: str) -> Any:
    """Import the public API when it is first used."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'clipress' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
