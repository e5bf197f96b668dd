"""How many instances and threads the model of a graph gets, and which batch it prefers: the rule behind `auto`.

Small models gain nothing from threads: they get one thread each, and as many instances as there are cores. A larger model
gets as many threads as bring one item to about 20 ms by the benchmark's figures (assuming that threads scale), and as many
instances as the cores then allow. Without figures it gets one thread per 64 MB of its file. On GPUs one instance is enough:
the GPU queues the work anyway, and a second instance costs its memory again.

When a model takes less than a millisecond, the server spends as long around a run as in it. Such a model gets half as many
instances, and the python backend runs it inside `embed_*`, with one instance per core (studies/serving.md).

The server prefers the batch that was fastest per item in the benchmark.
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
    """The sizes of one graph's model."""

    instances: int
    threads: int
    preferred_batch: int | None
    small: bool = False
    """By the benchmark, the server spends as long around a run as in it."""


def sizing(exported: Exported, graph: str, backend: str, settings: ServeSettings, bench: Path | None) -> Sizing:
    """Return the sizes of a graph's model: the settings', else by the rule. `bench` is a results.json that may not exist."""
    rows = [] if bench is None else _measured(bench, exported, graph, backend)
    cores = os.cpu_count() or 1
    threads = settings.threads if settings.threads != "auto" else min(cores, _threads(exported, graph, rows))
    small = backend != "tensorrt" and 0 < _item_ms(rows) < SMALL_MS
    by_cores = 1 if backend == "tensorrt" else max(1, cores // threads // (2 if small else 1))
    instances = settings.instances if settings.instances != "auto" else by_cores
    best = max(rows, key=lambda row: row.items_per_s).batch if rows else 1
    return Sizing(instances, threads, best if 1 < best < settings.max_batch else None, small)


def helpers(settings: ServeSettings, encoder: Sizing | None = None) -> int:
    """Return how many instances a model around the encoders gets: one per core, half as many before a very small encoder."""
    by_cores = max(1, (os.cpu_count() or 1) // (2 if encoder and encoder.small else 1))
    return by_cores if settings.instances == "auto" else settings.instances


def _threads(exported: Exported, graph: str, rows: Sequence[Measurement]) -> int:
    if alone := _item_ms(rows):
        return max(1, math.ceil(alone / ITEM_MS))
    return max(1, math.ceil(exported.files[graph].bytes / THREAD_BYTES))


def _item_ms(rows: Sequence[Measurement]) -> float:
    """Return the time one item takes on one thread; 0 if it was not measured."""
    return next((row.median_ms * row.threads for row in rows if row.batch == 1), 0.0)


def _measured(bench: Path, exported: Exported, graph: str, backend: str) -> list[Measurement]:
    """Return what was measured of this very model's graph; figures of another training do not apply."""
    runner = "tensorrt" if backend == "tensorrt" else "onnxruntime"
    rows = read_measurements(bench, exported.stage, exported.lineage_hash, runner)
    own = [row for row in rows if row.tower == graph]
    usual = min((row.ids for row in own if row.ids), default=0)  # requests are captions, not the longest texts
    return [row for row in own if row.ids == usual]
