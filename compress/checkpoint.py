"""Training checkpoints: written atomically beside the training, the last two kept, unreadable ones skipped.

A checkpoint holds everything the next step depends on, so a resumed run ends bit for bit where an uninterrupted one does
(on CPU). Every process writes a file: the first one what all have in common, each one its own random state and pruning scores.
"""

from __future__ import annotations

import logging
import pickle
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from clipress.errors import first_line
from clipress.storage import flush, writing

log = logging.getLogger("clipress.checkpoint")
KEEP_LAST = 2
SHORTEST, LARGEST_SHARE = 60.0, 0.02  # with `auto`: seconds between two, and what part of the time they may take


class Checkpoints:
    """The checkpoints of a running stage: when one is due, and a thread that writes one at a time.

    The state is copied to the host before training goes on, on a GPU without waiting for the copy. An error of the thread
    is raised by whichever method is called next. Leaving the `with` block waits for the file under way.

    Args:
        folder: where they go; None writes none.
        every: steps between two; 0 writes none; `auto` lets a minute pass, or so much time that they take 2 % of it.
        rank: number of this process.
    """

    def __init__(self, folder: Path | None, every: int | Literal["auto"], rank: int = 0) -> None:
        self.folder, self.every, self.rank = folder, every if folder is not None else 0, rank
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: Future[float] | None = None
        self._buffers: list[Tensor] = []
        self._last, self._cost = time.perf_counter(), 0.0

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self._thread.shutdown()
        if kind is None:
            self.wait()

    def is_due(self, steps: int) -> bool:
        """Return whether to save after so many steps."""
        if self._under_way is not None and self._under_way.done():
            self.wait()
        if self.every != "auto":
            return bool(self.every) and steps % self.every == 0
        passed = time.perf_counter() - self._last
        return self._under_way is None and passed > max(SHORTEST, self._cost / LARGEST_SHARE)

    def save(self, steps: int, state: dict[str, Any]) -> None:
        """Copy the state after so many steps and have it written. Waits for the file before it."""
        began = time.perf_counter()
        self.wait()
        copied = self._on_host(state)
        self._last = time.perf_counter()
        self._under_way = self._thread.submit(self._write, steps, copied, self._last - began)

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk. Raises ArtifactError if it could not be written."""
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            self._cost = under_way.result()

    def _write(self, steps: int, copied: tuple[dict[str, Any], Any], held: float) -> float:
        """Write a file. Returns the seconds that it took, with those that training was held up before."""
        state, event = copied
        began = time.perf_counter()
        if event is not None:
            event.synchronize()
        save_checkpoint(self.folder, steps, state, self.rank)
        return held + time.perf_counter() - began

    def _on_host(self, state: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """Return a copy in the buffers of the last checkpoint, and what to wait for until it is complete."""
        unused, used, copies, on_gpu = self._buffers, [], {}, False

        def copied(tensor: Any) -> Any:
            nonlocal on_gpu
            if not isinstance(tensor, Tensor):
                return tensor
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)  # shared weights are copied once
            if key not in copies:
                fits = len(used) < len(unused) and _alike(unused[len(used)], tensor)
                buffer = unused[len(used)] if fits else _host_buffer(tensor)
                used.append(buffer)
                copies[key] = buffer.copy_(tensor.detach(), non_blocking=True)
                on_gpu = on_gpu or tensor.is_cuda
            return copies[key]

        found, self._buffers = tree_map(copied, state), used
        event = torch.cuda.Event() if on_gpu else None
        if event is not None:
            event.record()
        return found, event


def _host_buffer(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def _alike(buffer: Tensor, tensor: Tensor) -> bool:
    return buffer.shape == tensor.shape and buffer.dtype == tensor.dtype and buffer.is_pinned() == tensor.is_cuda


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
