"""Training checkpoints: written atomically, the last two kept, unreadable ones skipped.

A checkpoint holds everything the next step depends on, so a resumed run ends bit for bit where an uninterrupted one does
(on CPU). Every process writes its own file, since pruning scores differ between processes.
"""

from __future__ import annotations

import logging
import pickle
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from clipress.errors import first_line
from clipress.storage import flush, writing

log = logging.getLogger("clipress.checkpoint")
KEEP_LAST = 2


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], rank: int = 0) -> None:
    """Write the state after `step` steps to a temporary file, flush it and rename it into place."""
    target = folder / f"rank{rank}-{step:08}.pt"
    aside = target.with_suffix(".tmp")
    try:
        with writing(target):
            folder.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as file:
                torch.save(state, file)
            flush(aside)
            aside.replace(target)
            flush(folder)
            for _, old in _saved(folder, rank)[:-KEEP_LAST]:
                old.unlink(missing_ok=True)
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def steps_saved(folder: Path, rank: int = 0) -> list[int]:
    """Return the steps this process has checkpoints for, oldest first."""
    return [step for step, _ in _saved(folder, rank)]


def load_checkpoint(folder: Path, step: int, rank: int = 0) -> dict[str, Any] | None:
    """Read a checkpoint: tensors and plain values only. Returns None, with a warning, if it cannot be read."""
    path = folder / f"rank{rank}-{step:08}.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        log.warning("%s cannot be read (%s). Using the previous checkpoint.", path, first_line(error))
        return None


def _saved(folder: Path, rank: int) -> list[tuple[int, Path]]:
    found = [(re.fullmatch(rf"rank{rank}-(\d+)\.pt", path.name), path) for path in folder.glob(f"rank{rank}-*.pt")]
    return sorted((int(match.group(1)), path) for match, path in found if match)
