"""Export targets, which are made from ONNX exports: their registry; one file each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipress.data.eval_sets import EvalSet
from clipress.progress import Say
from clipress.recipe import Section
from clipress.registry import Registry


@dataclass(frozen=True)
class TargetJob:
    """The inputs of a target."""

    exports: Mapping[str, Path]
    """Export folders by the names of their artifacts."""
    home: Path
    """The folder of the exports, for files that belong to all of them."""
    open_sets: Callable[[], list[EvalSet]]
    """Opens real data, to compare results with the ONNX files."""
    say: Say


@dataclass(frozen=True)
class Target:
    """One export target: the type of its settings in a recipe, and the function that makes it."""

    settings: type[Section]
    make: Callable[[TargetJob, Any], None]


TARGETS: Registry[Target] = Registry("export target", "clipress.export")


def target(name: str, settings: type[Section]) -> Callable[[Callable], Callable]:
    """Register a function `(job, settings)` as an export target; its settings are `export.<name>` in a recipe."""

    def add(make: Callable[[TargetJob, Any], None]) -> Callable[[TargetJob, Any], None]:
        TARGETS.register(name)(Target(settings, make))
        return make

    return add
