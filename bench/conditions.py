"""The conditions of a measurement: everything that a number depends on."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from clipress.bench.latency import RENEWING, turn_ms
from clipress.bench.results import UNREAD, Conditions
from clipress.bench.settings import BenchSettings
from clipress.data.eval_sets import EvalSet
from clipress.runtime.cpu import processor
from clipress.version import __version__


def conditions(
    settings: BenchSettings,
    sets: Sequence[EvalSet],
    cpus: list[int] | None,
    devices: Sequence[str],
    about: Mapping[str, Any],
) -> Conditions:
    """Record the conditions. `cpus` are those the measurement was pinned to; `about` has what the caller knows."""
    return Conditions(
        **about,
        **time_and_machine(),
        **{name: known for name in ("onnxruntime", "openvino", "torch", "numpy") if (known := _version(name))},
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()}",
        devices=tuple(dict.fromkeys(devices)),
        threads=settings.threads,
        cpu_affinity="not known" if cpus is None else cpus,
        omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
        backends=settings.backends,
        dtype_of_torch=settings.dtype,
        warm_up_ms=settings.warm_up,
        duration_ms=settings.duration,
        iterations_at_least=settings.iterations,
        interleaved=True,
        turn_ms=turn_ms(settings.duration),
        sessions=f"opened anew each round where that takes no more than {RENEWING} turns",
        order="rounds of one turn each, every other round backwards",
        clock="host, from the call to the result (perf_counter)",
        transfers="none: inputs and outputs stay where the model runs",
        ratios="Hodges-Lehmann over rounds of the log ratio of medians, 95 % interval of Wilcoxon's signed ranks",
        data={s.name: _described(s) for s in sets},
        protocol="text_rK: text for an image, any own caption counts; image_rK: image for a text; ties count as wrong; "
        "standard errors count an image and its captions as one",
    )


def time_and_machine() -> dict[str, Any]:
    """Return what every measurement records: when, by which clipress, on which CPU, and how busy it was."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "clipress": __version__,
        **processor().record(),
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }


def _described(one: EvalSet) -> dict[str, Any]:
    left_out = {UNREAD: len(one.unread)} if one.unread else {}
    return {"items": len(one.source), **left_out, "fingerprint": one.source.fingerprint}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # onnxruntime-gpu has another name
        return None
