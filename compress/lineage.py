"""The record that each stage leaves in its artifact: what it was made from, with what, and how long it took."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

from clipress.compress.stage import Stage
from clipress.recipe import digest
from clipress.version import __version__

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Lineage = tuple[dict[str, Any], ...]
"""One record per stage, oldest first."""


def record_of(stage: Stage, seed: int, data: str, parents: Lineage, teacher: str, fabric: Fabric) -> dict[str, Any]:
    """Describe a stage before it runs. Its hash depends on everything that decides its result.

    data: fingerprint of the training data; teacher: hash of the teachers, or `none`.
    """
    settings, parent, known = stage.settings.model_dump(mode="json"), parents[-1]["hash"], versions()
    return {
        "stage": stage.name,
        "kind": stage.kind,
        "settings": settings,
        "seed": seed,
        "data": data,
        "parent": parent,
        "teacher": teacher,
        "versions": known,
        "machine": machine(fabric),
        "hash": digest(stage.kind, settings, seed, data, parent, teacher, known),
    }


def machine(fabric: Fabric) -> dict[str, Any]:
    """Return what decides the last bits of a result besides settings and versions."""
    gpu = torch.cuda.get_device_name(fabric.device) if fabric.device.type == "cuda" else None
    return {
        "processor": platform.processor() or platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": gpu or "cpu",
        "processes": fabric.world_size,
    }


def versions() -> dict[str, str]:
    """Return the versions that decide what a stage computes."""
    known = {"clipress": __version__}
    for package in ("torch", "open_clip_torch", "nvidia-modelopt", "lightning-fabric", "numpy"):
        try:
            known[package] = version(package)
        except PackageNotFoundError:
            known[package] = "absent"
    return known


def peak_memory_mb() -> int:
    """Return the most memory the process, or its GPU, has held so far."""
    import resource

    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e6)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)
