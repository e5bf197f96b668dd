"""`clipress bench-server RUN`: every model of a server under every load -> load.json and a table."""

from __future__ import annotations

import datetime
import io
import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipress import __version__
from clipress.bench.fail_if import OPERATORS, Gate, nowhere, unknown_metric
from clipress.bench.server.load import Load, Windows, measure, numbered, run
from clipress.bench.server.protocols import Question, checked_ask, open_wire
from clipress.data.eval_sets import EvalSet
from clipress.data.transforms import fitted, normalised
from clipress.errors import RecipeError
from clipress.progress import track
from clipress.runtime.cpu import processor
from clipress.runtime.export_folder import Exported
from clipress.storage import write_text_whole

SCHEMA_VERSION = 1
MODELS = ("embed_image", "image_encoder", "embed_text")
PICTURES = 64  # that requests take turns with; no cache of the server is for pictures
PLACES = ("model", "concurrency", "request_rate")
FIGURES = (
    *("infer_per_s", "mean_ms", "p50_ms", "p90_ms", "p95_ms", "p99_ms", "lag_p99_ms"),
    *("requests", "errors", "client_us", "client_cores"),
)


def loads_from(concurrency: str | None, request_rate: str | None) -> list[Load]:
    """Read sweeps: `1,8,32`; `1:32` doubles from 1 to 32; `10:50:10` goes in steps, as perf_analyzer's. Raises RecipeError."""
    if concurrency is None and request_rate is None:
        concurrency = "1,8,32"
    closed = [] if concurrency is None else _sweep("--concurrency", concurrency, int)
    open_ = [] if request_rate is None else _sweep("--request-rate", request_rate, float)
    return [Load(concurrency=int(value)) for value in closed] + [Load(request_rate=value) for value in open_]


def _sweep(option: str, text: str, kind: Callable[[str], float]) -> list[float]:
    try:
        values = _steps(*map(kind, text.split(":"))) if ":" in text else [kind(part) for part in text.split(",")]
    except (ValueError, TypeError):
        values = []
    if not values or min(values) <= 0 or not all(np.isfinite(values)):
        raise RecipeError(f"{option} {text}: numbers above 0 are asked for: 1,8,32 or START:END or START:END:STEP.")
    return values


def _steps(start: float, end: float, step: float | None = None) -> list[float]:
    values = [start]
    while values[-1] < (after := values[-1] + (values[-1] if step is None else step)) <= end:
        values.append(after)
    return values


def questions(exported: Exported, sets: Sequence[EvalSet]) -> dict[str, Question]:
    """Return what each model is asked: pictures of the test data in turns, and texts that no request had before."""
    found = [image for one in sets for image in _pictures(one)][:PICTURES]
    files = [_bytes_tensor(_jpeg(pixels)) for pixels in found]
    side = exported.preprocess.size
    pixels = normalised(np.stack([fitted(image, exported.preprocess) for image in found]), exported.preprocess)
    rows = [row.tobytes() for row in pixels]
    return {
        "embed_image": Question(
            "embed_image", "image", "image_embeds", "BYTES", (1, 1), lambda number: files[number % len(files)]
        ),
        "image_encoder": Question(
            "image_encoder",
            "pixel_values",
            "image_embeds",
            "FP32",
            (1, 3, side, side),
            lambda number: rows[number % len(rows)],
        ),
        "embed_text": Question(
            "embed_text",
            "text",
            "text_embeds",
            "BYTES",
            (1, 1),
            lambda number: _bytes_tensor(b"a photo of number %d" % number),
        ),
    }


def _pictures(source: EvalSet) -> Iterator[np.ndarray]:
    for index in range(min(PICTURES, len(source.source))):
        yield np.asarray(source.source.image(index))


def _jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def _bytes_tensor(content: bytes) -> bytes:
    return struct.pack("<I", len(content)) + content


def bench_server(
    server: tuple[str, str, bool],
    asked: Sequence[Question],
    loads: Sequence[Load],
    windows: Windows,
    about: dict[str, Any],
) -> dict[str, Any]:
    """Put every load on every model, one after the other. Returns load.json's content.

    `server` is protocol, `host:port` and whether it speaks TLS. Raises ServerError where a model does not answer.
    """
    return run(_measured(server, asked, loads, windows, about), any(load.request_rate for load in loads))


async def _measured(
    server: tuple[str, str, bool],
    asked: Sequence[Question],
    loads: Sequence[Load],
    windows: Windows,
    about: dict[str, Any],
) -> dict[str, Any]:
    wire, numbers, rows = open_wire(*server), numbered(), []
    try:
        asks = {one.model: await checked_ask(wire, one, f"{server[0]}://{server[1]}") for one in asked}
        cases = [(model, load) for model in asks for load in loads]
        for model, load in track(cases, len(cases), "load", "case"):
            found = await measure(asks[model], load, windows, wire.statistics, numbers)
            told = sorted({one.error for one in found.requests if one.error})
            rows.append({"model": model, **found.figures(), "error_messages": told[:5], **found.times()})
    finally:
        await wire.close()
    return {"schema_version": SCHEMA_VERSION, "conditions": about | _conditions(server[0], windows), "rows": rows}


def _conditions(protocol: str, windows: Windows) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "clipress": __version__,
        "tritonclient": version("tritonclient"),
        **processor().record(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "protocol": protocol,
        "window_ms": windows.window,
        "warm_up_ms": windows.warm_up,
        "stability_percent": windows.stability,
        "latency": "from when a request was due to its whole answer, at the client; server's times are means per request",
        "arrivals": "open loop: Poisson process; latency counts from when a request was due",
        "reported": "the last three windows; a request belongs to the window of its answer",
        "batch": "one item per request",
    }


def write_load(results: dict[str, Any], folder: Path) -> Path:
    """Write load.json; latencies are null where nothing was answered."""
    path = folder / "load.json"
    rows = [{key: None if value != value else value for key, value in row.items()} for row in results["rows"]]
    write_text_whole(path, json.dumps({**results, "rows": rows}, separators=(",", ":"), allow_nan=False) + "\n")
    return path


def load_table(results: dict[str, Any]) -> str:
    """Return figures as text: what a client sees, and below it what Triton says of each model that took part."""
    head = f"{'model':<18}{'load':>16}{'infer/s':>10}" + "".join(f"{f'p{part} ms':>9}" for part in (50, 90, 95, 99))
    lines = [f"{head}{'errors':>8}  client"]
    for row in results["rows"]:
        load = Load(row["concurrency"], row["request_rate"])
        times = "".join(f"{row[f'p{part}_ms']:>9.2f}" for part in (50, 90, 95, 99))
        lines.append(
            f"{row['model']:<18}{load!s:>16}{row['infer_per_s']:>10.1f}{times}{row['errors']:>8}  "
            f"{row['client_us']:.0f} us/request, {row['client_cores']:.2f} cores"
            + ("" if row["stable"] else ", not stable")
        )
        for model, told in row["triton"].items():
            batch = "" if told["mean_batch"] is None else f", mean batch {told['mean_batch']:.1f}"
            hits = f", {told['cache_hits']} from its cache" if told["cache_hits"] else ""
            lines.append(
                f"  {model:<16} queue {told['queue_ms']:.2f} ms, compute input {told['compute_input_ms']:.2f}, "
                f"infer {told['compute_infer_ms']:.2f}, output {told['compute_output_ms']:.2f}{batch}{hits}"
            )
    return "\n".join(lines)


def places_of(models: Sequence[str], loads: Sequence[Load]) -> list[dict[str, Any]]:
    """Return rows without figures, for gates to be checked by before anything is measured."""
    empty = dict.fromkeys(FIGURES, float("nan"))
    return [{"model": model, **asdict(load), **empty} for model in models for load in loads]


def broken_by_load(gates: Sequence[Gate], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a message for each load under which a gate's condition is true. Raises RecipeError for one that holds nowhere."""
    told = []
    for gate in gates:
        found = [row for row in rows if all(_is_at(row.get(key), value) for key, value in gate.where)]
        if gate.metric not in FIGURES or not found:
            raise RecipeError(nowhere(gate) if gate.metric in FIGURES else unknown_metric(gate, FIGURES))
        for row in found:
            if OPERATORS[gate.sign](row[gate.metric], gate.bound):
                where = f"{row['model']}, {Load(row['concurrency'], row['request_rate'])}"
                told.append(
                    f"{gate.metric} is {row[gate.metric]:g} ({where}), and must not be {gate.sign} {gate.bound:g}"
                )
    return told


def _is_at(found: Any, asked: str) -> bool:
    try:
        return found is not None and type(found)(asked) == found
    except ValueError:
        return False
