"""The record each stage adds to its artifact: inputs, settings, versions, machine and duration."""

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
    """Describe a stage before it runs. The hash covers everything that affects the result.

    Args:
        stage: the stage.
        seed: the recipe's seed.
        data: fingerprint of the training data.
        parents: records of the earlier stages.
        teacher: hash of the teachers, or `none`.
        fabric: where the stage runs.
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
    """Describe the hardware, which can affect the last bits of a result."""
    gpu = torch.cuda.get_device_name(fabric.device) if fabric.device.type == "cuda" else None
    return {
        "processor": platform.processor() or platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": gpu or "cpu",
        "processes": fabric.world_size,
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages that affect what a stage computes."""
    known = {"clipress": __version__}
    for package in ("torch", "open_clip_torch", "nvidia-modelopt", "lightning-fabric", "numpy"):
        try:
            known[package] = version(package)
        except PackageNotFoundError:
            known[package] = "absent"
    return known


def peak_memory_mb() -> int:
    """Return the peak memory of the GPU, or of the process if there is no GPU."""
    import resource

    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e6)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)
