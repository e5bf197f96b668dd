"""Recipes of version 1: the keys that have been renamed since. `upgrade` reads them as today's.

Old names of losses are in compress/losses, since a plugin may register a loss under one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TRAINING_KEYS = {"clip": "grad_clip_norm", "decay": "lr_schedule", "warmup": "warmup_ratio", "queue": "queue_size"}
STAGE_KEYS = {
    "distill": TRAINING_KEYS,
    "prune": {
        **TRAINING_KEYS,
        "frozen": "final_fraction",
        "interval": "update_every",
        "guide": "distill_losses",
        "floor": "min_keep",
    },
    "sparsify": TRAINING_KEYS,
    "quantize": {**TRAINING_KEYS, "keep": "exclude"},
}
"""By kind of stage. Version 1 had these four; stages of plugins name their settings as they like."""
RUNTIME_KEYS = {
    "accumulate": "grad_cache_chunks",
    "checkpoint": "checkpoint_every",
    "checkpointing": "grad_checkpointing",
}
SOURCE_KEYS = {"share": "weight"}
BENCH_KEYS = {"max_loss": "max_accuracy_drop", "two_four": "use_sparse_kernels"}
SECTIONS = {"runtime": RUNTIME_KEYS, "bench": BENCH_KEYS}


def upgrade(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's mapping with old keys replaced; what has another form is left for validation."""
    new = dict(raw)
    if isinstance(new.get("stages"), list):
        new["stages"] = [_stage(entry) for entry in new["stages"]]
    if isinstance(new.get("data"), Mapping):
        new["data"] = {key: _sources(value) for key, value in new["data"].items()}
    for section, keys in SECTIONS.items():
        if section in new:
            new[section] = _renamed(new[section], keys)
    if "teacher" in new:
        teachers = new["teacher"]
        new["teacher"] = [_teacher(one) for one in teachers] if isinstance(teachers, list) else _teacher(teachers)
    return new


def upgraded_path(path: Sequence[str]) -> list[str]:
    """Return the path of one value, such as [runtime, accumulate], with an old key replaced."""
    keys: Mapping[str, str] = {}
    match path:
        case ["runtime" | "bench" as section, key, *rest]:
            keys = SECTIONS[section]
        case ["data", _, _, key, *rest]:
            keys = SOURCE_KEYS
        case ["stages", _, str(kind), key, *rest]:
            keys = STAGE_KEYS.get(kind, {})
        case ["teacher", "recipe", *rest] | ["teacher", _, "recipe", *rest]:
            return [*path[: len(path) - len(rest)], *upgraded_path(rest)]
        case _:
            return [*path]
    return [*path[: len(path) - len(rest) - 1], keys.get(key, key), *rest]


def _renamed(section: Any, keys: Mapping[str, str]) -> Any:
    """Rename keys of a mapping; an old key beside its new one is left, to be refused as unknown."""
    if not isinstance(section, Mapping):
        return section
    return {keys[key] if key in keys and keys[key] not in section else key: value for key, value in section.items()}


def _stage(entry: Any) -> Any:
    if not isinstance(entry, Mapping):
        return entry
    return {kind: _renamed(settings, STAGE_KEYS.get(kind, {})) for kind, settings in entry.items()}


def _sources(value: Any) -> Any:
    return [_renamed(one, SOURCE_KEYS) for one in value] if isinstance(value, list) else value


def _teacher(teacher: Any) -> Any:
    if isinstance(teacher, Mapping) and isinstance(teacher.get("recipe"), Mapping):
        return {**teacher, "recipe": upgrade(dict(teacher["recipe"]))}
    return teacher
