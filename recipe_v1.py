"""Recipes of version 1: the keys and names that have been renamed since. `upgrade` reads them as today's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STAGE_KEYS = {
    "clip": "grad_clip_norm",
    "decay": "lr_schedule",
    "warmup": "warmup_ratio",
    "queue": "queue_size",
    "frozen": "final_fraction",
    "interval": "update_every",
    "guide": "distill_losses",
    "floor": "min_keep",
    "keep": "exclude",
}
RUNTIME_KEYS = {
    "accumulate": "grad_cache_chunks",
    "checkpoint": "checkpoint_every",
    "checkpointing": "grad_checkpointing",
}
SOURCE_KEYS = {"share": "weight"}
BENCH_KEYS = {"max_loss": "max_accuracy_drop", "two_four": "use_sparse_kernels"}
LOSSES = {"ita": "momentum-contrastive", "labels": "classification", "ce": "embedding-ce", "kl": "embedding-kl"}


def upgrade(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's mapping with old keys and names replaced; what has another form is left for validation."""
    new = dict(raw)
    if isinstance(new.get("stages"), list):
        new["stages"] = [_stage(entry) for entry in new["stages"]]
    if isinstance(new.get("data"), Mapping):
        new["data"] = {key: _sources(value) for key, value in new["data"].items()}
    for section, keys in (("runtime", RUNTIME_KEYS), ("bench", BENCH_KEYS)):
        if section in new:
            new[section] = _renamed(new[section], keys)
    if "teacher" in new:
        teachers = new["teacher"]
        new["teacher"] = [_teacher(one) for one in teachers] if isinstance(teachers, list) else _teacher(teachers)
    return new


def _renamed(section: Any, keys: Mapping[str, str]) -> Any:
    """Rename keys of a mapping; an old key beside its new one is left, to be refused as unknown."""
    if not isinstance(section, Mapping):
        return section
    return {keys[key] if key in keys and keys[key] not in section else key: value for key, value in section.items()}


def _stage(entry: Any) -> Any:
    if not isinstance(entry, Mapping):
        return entry
    stages = {kind: _renamed(settings, STAGE_KEYS) for kind, settings in entry.items()}
    for settings in stages.values():
        for key in ("losses", "distill_losses") if isinstance(settings, dict) else ():
            if key in settings:
                settings[key] = _losses(settings[key])
    return stages


def _losses(losses: Any) -> Any:
    if isinstance(losses, Mapping):
        return {LOSSES.get(name, name): value for name, value in losses.items()}
    if isinstance(losses, list | tuple):
        return [LOSSES.get(name, name) if isinstance(name, str) else name for name in losses]
    return losses


def _sources(value: Any) -> Any:
    return [_renamed(one, SOURCE_KEYS) for one in value] if isinstance(value, list) else value


def _teacher(teacher: Any) -> Any:
    if isinstance(teacher, Mapping) and isinstance(teacher.get("recipe"), Mapping):
        return {**teacher, "recipe": upgrade(dict(teacher["recipe"]))}
    return teacher
