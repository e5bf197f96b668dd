"""Shared by tests: the tiny recipe and helpers that run commands."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from click.testing import CliRunner, Result

from clipress.models.tiny import tiny_architecture

SOURCES = [{"format": "scenes", "weight": 3, "limit": 96}, {"format": "digits", "limit": 96}]
HELD_OUT = [{"format": "scenes", "split": "test", "limit": 24}, {"format": "digits", "split": "test", "limit": 48}]
DATA = {"train": SOURCES, "val": HELD_OUT, "test": HELD_OUT, "augment": {"shift": 1}}
SHORT = {"steps": 6, "batch_size": 32}
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "teacher": {
        "recipe": {
            "name": "tiny-teacher",
            "student": tiny_architecture(),
            "data": {"train": SOURCES},
            "stages": [{"distill": {"name": "teacher", **SHORT, "steps": 30, "lr": 2e-3}}],
        }
    },
    "data": DATA,
    "stages": [
        {
            "prune": {
                "budget": {"params": 0.5},
                "align": {"head_dim": 4, "ffn": 16},
                "update_every": 2,
                "distill_losses": ["affinity"],
                **SHORT,
            }
        },
        {"distill": {"losses": ["contrastive", "feature"], **SHORT}},
        {"sparsify": SHORT},
        {"quantize": {"calibrate": 32, **SHORT, "steps": 2}},
    ],
    "export": {"onnx": {"exporter": "torchscript"}},
    "bench": {"batch": [1, 2], "warm_up": 0, "duration": 1, "iterations": 3},
    "serve": {"max_batch": 4},
}


HOLDER = """
import sys, time
from pathlib import Path
from clipress.storage import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
"""A program that holds a folder's lock until its input ends or it is killed."""


@contextmanager
def lock_held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Let another process hold a folder's lock meanwhile."""
    command = [sys.executable, "-c", HOLDER, folder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process


def tiny_inputs(batch=3):
    """Return random images and texts that fit `tiny_architecture`."""
    import torch

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 400, (batch, 24), generator=generator)
    ids[:, -1] = 49407
    return torch.randn(batch, 3, 32, 32, generator=generator), ids


def write_recipe(recipe: dict[str, Any], folder: Path) -> Path:
    path = folder / "recipe-under-test.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def shorten(recipe: dict[str, Any]) -> None:
    """Make every stage of a recipe in epochs two steps of four items, in place."""
    for stage in recipe["stages"]:
        (settings,) = stage.values()
        del settings["epochs"]
        settings |= {"steps": 2, "batch_size": 4} | ({"calibrate": 4} if "calibrate" in settings else {})


def shipped_in_two_steps(name: str, changed: dict[str, Any], folder: Path) -> list[Path]:
    """Run a shipped recipe that prunes, two steps per stage, with other sections or parts of its data. Returns the artifacts.

    Every step of every stage has a finite loss.
    """
    import clipress
    from clipress.artifact import read_header
    from clipress.compress.pipeline import compress
    from clipress.compress.plan import compress_plan_from
    from clipress.recipe import Recipe, checked, read_recipe

    recipe = read_recipe(Path(clipress.__file__).parent / "configs" / f"{name}.yaml").model_dump(exclude_none=True)
    recipe |= {**changed, "data": recipe["data"] | {"workers": 0} | changed.get("data", {})}
    shorten(recipe)
    recipe["stages"][0]["prune"] |= {"calibrate": 4, "align": {"head_dim": 1, "ffn": 1}}
    folders = compress(compress_plan_from(checked(Recipe, recipe, "")), folder, lambda _: None)
    for made in folders[1:]:
        details = read_header(made)["lineage"][-1]["details"]
        assert details["steps"] == 2 and math.isfinite(details["last"]["loss"])
    return folders


def torchrun(*words: object) -> subprocess.CompletedProcess[str]:
    """Run a script with its arguments, or `-m` and a module, in two processes on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


class SourceAround:
    """Another source, for tests to override some of it."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getattr__(self, name):
        return getattr(self.source, name)


def clipress(*arguments: object) -> Result:
    """Run a command in this process."""
    from clipress.cli import main

    return CliRunner().invoke(main, [str(argument) for argument in arguments])
