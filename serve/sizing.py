"""How many instances and threads an encoder gets, and which batch is best: the rule behind `auto`.

Small models gain nothing from threads: one thread each, and as many instances as cores. A larger model gets as many
threads as bring one item to about 20 ms by the bench's figures (threads taken to scale), and so many instances as the
cores then allow. Without figures, one thread per 64 MB of its file. On GPUs one instance is enough: its work is queued there
anyway, and a second one costs its memory again.

Of a model that takes less than a millisecond, what the server does around a run takes as long: it gets half as many
instances, and `embed_*` of the python backend, one instance per core, runs it in its own process (studies/serving.md).

The batch that the bench found the fastest per item is what the server forms by preference.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clipress.runtime.export_folder import Exported
from clipress.runtime.measured import Measurement, read_measurements
from clipress.serve.settings import ServeSettings

ITEM_MS = 20.0
THREAD_BYTES = 64 << 20
SMALL_MS = 1.0


@dataclass(frozen=True)
class Sizing:
    """Of one encoder."""

    instances: int
    threads: int
    preferred_batch: int | None
    small: bool = False
    """By the bench: what the server does around it takes as long."""


def sizing(exported: Exported, tower: str, backend: str, settings: ServeSettings, bench: Path | None) -> Sizing:
    """Return an encoder's sizes: the settings', else by the rule. `bench` is a results.json, which need not be there."""
    rows = [] if bench is None else _measured(bench, exported, tower, backend)
    cores = os.cpu_count() or 1
    threads = settings.threads if settings.threads != "auto" else min(cores, _threads(exported, tower, rows))
    small = backend != "tensorrt" and 0 < _item_ms(rows) < SMALL_MS
    by_cores = 1 if backend == "tensorrt" else max(1, cores // threads // (2 if small else 1))
    instances = settings.instances if settings.instances != "auto" else by_cores
    best = max(rows, key=lambda row: row.items_per_s).batch if rows else 1
    return Sizing(instances, threads, best if 1 < best < settings.max_batch else None, small)


def helpers(settings: ServeSettings, encoder: Sizing | None = None) -> int:
    """Return how many instances a model around the encoders gets: one per core, half as many before a very small encoder."""
    by_cores = max(1, (os.cpu_count() or 1) // (2 if encoder and encoder.small else 1))
    return by_cores if settings.instances == "auto" else settings.instances


def _threads(exported: Exported, tower: str, rows: Sequence[Measurement]) -> int:
    if alone := _item_ms(rows):
        return max(1, math.ceil(alone / ITEM_MS))
    return max(1, math.ceil(exported.files[tower].bytes / THREAD_BYTES))


def _item_ms(rows: Sequence[Measurement]) -> float:
    """Return what one item takes on one thread; 0: not measured."""
    return next((row.median_ms * row.threads for row in rows if row.batch == 1), 0.0)


def _measured(bench: Path, exported: Exported, graph: str, backend: str) -> list[Measurement]:
    """Return what the bench measured of one graph of this very model; figures of another training say nothing."""
    runner = "tensorrt" if backend == "tensorrt" else "onnxruntime"
    rows = read_measurements(bench, exported.stage, exported.lineage_hash, runner)
    return [row for row in rows if row.tower == graph]
