"""What does serving gain? `python studies/serving.py RUN [ROUNDS] [SOAK_SECONDS]`: RUN is a finished run (demo).

Three repositories of one export run on three Triton servers: generated, as `clipress serve` writes it; naive, as one would
write it without bench figures, with ensembles, one instance of every model and no dynamic batching; unbatched, which is the
generated one with one instance and no dynamic batching, all else equal. They are measured in turns, in a new random order
each time, by a client that sends one item per request over HTTP and shares the machine's cores. Bare ONNX Runtime is
measured in the same rounds. Then the first server gets 80 % of the load it handled at most, in an open loop, while every
answer is compared with local inference and the memory of all its processes is recorded. Writes serving.json (raw rows and
conditions) and serving.md beside this file.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import statistics
import sys
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from itertools import pairwise, product
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.request import urlopen

import numpy as np

from clipress.bench.server.load import Measured, Windows, latency_figures, measure, numbered, run
from clipress.bench.server.protocols import RequestTemplate, checked_sender, open_wire
from clipress.bench.server.requests import RECORDS, request_templates
from clipress.bench.server.results import Load
from clipress.data.eval_sets import evalsets
from clipress.data.spec import SourceSpec
from clipress.data.transforms import fitted, normalised, open_image
from clipress.runtime.cpu import processor
from clipress.runtime.export_folder import Exported, read_export
from clipress.runtime.onnx_session import open_session
from clipress.serve.settings import ServeSettings
from clipress.serve.triton_config import config_from, config_text
from clipress.serve.triton_repo import triton_repo_from_export
from clipress.serve.triton_server import TritonServer
from clipress.tasks.clip import INPUTS, Clip

HERE = Path(__file__).parent
IMAGE = Clip.main_graph
TURN = Windows(window=1000, warm_up=500, stability=0, trials=3)
CONCURRENCY = (1, 32)
SERVERS = ("generated", "naive", "unbatched")
STAGE = "int8"
MODELS = ("embed_image", "image_encoder", "embed_text")
SOAKED = "embed_image"
ENCODERS = {"embed_image": "image_encoder", "image_encoder": "image_encoder", "embed_text": "text_encoder"}
SHARE = 0.8  # Fraction of the maximum load, in the soak.
WARM = 0.2  # Fraction of the soak before memory is measured.


def repositories(export: Path, bench: Path, folder: Path) -> dict[str, Path]:
    """Write the repository of each server."""
    settings, found = ServeSettings(backend="python", max_batch=32), {}
    for name in SERVERS:
        (found[name],) = triton_repo_from_export(export, folder / name, settings, None if name == "naive" else bench)
        if name != "generated":
            one_by_one(found[name])
    return found


def one_by_one(repository: Path) -> None:
    """Turn a repository into one with one instance of every model and no dynamic batching."""
    for path in repository.glob("*/config.pbtxt"):
        config = config_from(path.read_text(encoding="utf-8"))
        config.ClearField("dynamic_batching")
        del config.instance_group[1:]
        for group in config.instance_group:
            group.count = 1
            group.ClearField("rate_limiter")
        path.write_text(config_text(config), encoding="utf-8")


def processes(ancestor: int) -> list[int]:
    """Return all descendants of a process."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found, new = set[int](), {ancestor}
    while new := {one for one, parent in parents.items() if parent in new} - found:
        found |= new
    return sorted(found)


@contextmanager
def serving(repository: Path) -> Iterator[tuple[TritonServer, list[int]]]:
    """Serve a repository with this process's priority: a server has its own session, and so its own priority."""
    before = set(processes(os.getpid()))
    with TritonServer(repository, ready_within=300) as server:
        own = [one for one in processes(os.getpid()) if one not in before]
        with suppress(OSError, TypeError):
            nice = re.search(r"nice (-?\d+)", Path("/proc/self/autogroup").read_text())[1]
            for one in own:
                Path(f"/proc/{one}/autogroup").write_text(nice)
        yield server, own


async def loaded(address: str, template: RequestTemplate, load: Load, windows: Windows) -> Measured:
    """Measure one model under one load."""
    wire = open_wire("http", address, False)
    try:
        send = await checked_sender(wire, template, address)
        return await measure(send, load, windows, wire.statistics, numbered())
    finally:
        await wire.close()


def bare(export: Path, template: RequestTemplate) -> float:
    """Return the median in ms of bare ONNX Runtime on the same rows."""
    session = open_session(read_export(export).onnx(IMAGE), 1)
    pixels = template.inputs[INPUTS[IMAGE]]
    rows = [np.frombuffer(pixels.content(n), np.float32).reshape(pixels.shape) for n in range(8)]
    times = []
    for number in range(2000):
        start = time.perf_counter()
        session.run(None, {INPUTS[IMAGE]: rows[number % 8]})
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


async def soaked(
    address: str, template: RequestTemplate, rate: float, seconds: float, expected: np.ndarray, pids: list[int]
) -> tuple[Measured, float, list[tuple[float, list[int]]]]:
    """Send requests at a constant rate for a while. Returns figures, the largest difference from local inference, and memory in KB."""
    clock, memory, furthest = asyncio.get_running_loop().time, list[tuple[float, list[int]]](), 0.0
    exact, size = [row.tobytes() for row in expected], expected[0].nbytes
    wire = open_wire("http", address, False)
    send = await checked_sender(wire, template, address)

    async def compared(number: int) -> None:
        nonlocal furthest
        found = (await send(number))[-size:]
        if found != exact[number % len(exact)]:
            distance = float(np.abs(np.frombuffer(found, np.float32) - expected[number % len(exact)]).max())
            furthest = furthest if distance <= furthest else distance  # NaN counts as a difference

    async def watch() -> None:
        while True:
            memory.append((clock(), [resident(one) for one in pids]))
            await asyncio.sleep(1)

    watcher = asyncio.create_task(watch())
    try:
        windows = Windows(1000 * seconds / 3, 0, 0, 3)
        found = await measure(compared, Load(request_rate=rate), windows, wire.statistics, numbered())
    finally:
        watcher.cancel()
        await wire.close()
    return found, furthest, memory


def answers(exported: Exported, files: list[bytes]) -> np.ndarray:
    """Return the results of local inference on image files, one by one."""
    preprocess, session = exported.preprocess, open_session(exported.onnx(IMAGE), 1)
    pixels = [normalised(fitted(open_image(file), preprocess)[None], preprocess) for file in files]
    return np.concatenate([session.run(None, {INPUTS[IMAGE]: one})[0] for one in pixels])


def resident(pid: int) -> int:
    """Return a process's resident memory in KB."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1])


def by_second(found: Measured, memory: list[tuple[float, list[int]]]) -> list[dict[str, Any]]:
    """Return the soak second by second: answers, errors, latency in ms, memory of all processes in MB."""
    rows, ordered = [], sorted(found.requests, key=attrgetter("done"))
    for (start, sizes), (end, _) in pairwise(memory):
        first, last = (bisect_left(ordered, moment, key=attrgetter("done")) for moment in (start, end))
        here = ordered[first:last]
        rows.append(
            {
                "second": round(start - found.marks[0].time),
                "answers": sum(one.error is None for one in here),
                "errors": sum(one.error is not None for one in here),
                **{
                    key: value
                    for key, value in latency_figures(here).items()
                    if key in ("p50_ms", "p99_ms", "lag_p99_ms")
                },
                "rss_mb": round(sum(sizes) / 1024, 2),
            }
        )
    return rows


def soak(address: str, template: RequestTemplate, rate: float, seconds: float, expected: np.ndarray, pids: list[int]):
    """Return the soak's figures, and its rows."""
    found, furthest, memory = run(soaked(address, template, rate, seconds, expected, pids), True)
    rows = by_second(found, memory)
    settled = [row["rss_mb"] for row in rows[int(WARM * len(rows)) :]]
    middle = statistics.median(settled)
    figures = {
        "model": template.model,
        "seconds": seconds,
        **found.figures().model_dump(),
        "error_messages": found.errors()[:5],
        "furthest_from_local": furthest,
        "rss_mb": [rows[0]["rss_mb"], min(settled), middle, max(settled)],
        "rss_percent": [round(100 * (value / middle - 1), 2) for value in (min(settled), max(settled))],
    }
    return figures, rows


def turns(served: dict[str, str], made: dict[str, RequestTemplate], export: Path, rounds: int) -> list[dict[str, Any]]:
    """Measure the servers in turns, in a new random order each time: a row per round, model, load and server."""
    rows, chance = [], random.Random(0)
    for number in range(rounds):
        rows.append(
            {"round": number, "server": "bare", "model": "image_encoder", "p50_ms": bare(export, made["image_encoder"])}
        )
        for model, clients in product(MODELS, CONCURRENCY):
            for server in chance.sample(list(served), len(served)):
                found = run(loaded(served[server], made[model], Load(clients), TURN), False).figures().model_dump()
                rows.append(
                    {"round": number, "server": server, "model": model, "host_load": os.getloadavg()[0], **found}
                )
                rate, middle = found["infer_per_s"], found["p50_ms"]
                say(f"{number} {server:<9} {model:<14} {clients:>2}: {rate:.0f}/s p50 {middle:.2f} ms")
    return rows


def ratios(rows: list[dict[str, Any]], model: str, clients: int, base: str) -> list[float]:
    """Return generated throughput over that of `base`, round by round."""
    found = {
        (row["round"], row["server"]): row["infer_per_s"]
        for row in rows
        if row["model"] == model and row.get("concurrency") == clients
    }
    return [rate / found[number, base] for (number, server), rate in found.items() if server == "generated"]


def overheads(rows: list[dict[str, Any]]) -> list[float]:
    """Return Triton's median at concurrency 1 less that of bare ONNX Runtime, in ms, round by round."""
    ours = {
        row["round"]: row["p50_ms"]
        for row in rows
        if (row["server"], row["model"], row.get("concurrency")) == ("generated", "image_encoder", 1)
    }
    return [ours[row["round"]] - row["p50_ms"] for row in rows if row["server"] == "bare"]


def middle_of(rows: list[dict[str, Any]], server: str, model: str, clients: int, key: str) -> float:
    """Return the median over rounds of one figure."""
    wanted = (server, model, clients)
    return statistics.median(
        row[key] for row in rows if (row["server"], row["model"], row.get("concurrency")) == wanted
    )


def spread(values: list[float], form: str = ".2f") -> str:
    """Return median and range as text."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def markdown(results: dict[str, Any]) -> str:
    """Return the tables as Markdown."""
    about, rows, soaked = results["conditions"], results["rows"], results["soak"]
    slow = soaked["infer_per_s"] < 0.97 * soaked["request_rate"]
    behind = " (at times the machine could not keep up with the rate, and requests waited)" if slow else ""
    lines = [
        "# What serving gains",
        "",
        f"`{about['command']}`, {about['date']}, {about['processor']}, {about['cores']} cores that client and server share, "
        f"load average {about['load'][0]} before, {about['load'][1]} after, Triton {about['triton']} (python backend), "
        f"onnxruntime {about['onnxruntime']}. One item per request over HTTP, {len(CONCURRENCY)} loads, {about['rounds']} "
        "rounds of all servers in turns, in random order. generated: as `clipress serve` writes it. naive: without bench figures, with "
        "ensembles, one instance of every model, no dynamic batching. unbatched: generated, but one instance and no "
        "dynamic batching. Figures are medians over rounds; ratios are of the same round: median (least to greatest).",
        "",
        "| model | concurrency | naive infer/s | generated infer/s | generated / naive | generated / unbatched "
        "| naive p50, p99 ms | generated p50, p99 ms | mean batch | queue, infer ms | client us/request |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model, clients in product(MODELS, CONCURRENCY):
        was, now = (
            {
                key: middle_of(rows, server, model, clients, key)
                for key in ("infer_per_s", "p50_ms", "p99_ms", "client_us")
            }
            for server in ("naive", "generated")
        )
        inner = [
            row["triton"].get(ENCODERS[model]) or row["triton"][model]
            for row in rows
            if (row["server"], row["model"], row.get("concurrency")) == ("generated", model, clients)
        ]
        batch, queue, infer = (
            statistics.median(one[key] for one in inner) for key in ("mean_batch", "queue_ms", "compute_infer_ms")
        )
        lines.append(
            f"| {model} | {clients} | {was['infer_per_s']:.0f} | {now['infer_per_s']:.0f} "
            f"| {spread(ratios(rows, model, clients, 'naive'))} | {spread(ratios(rows, model, clients, 'unbatched'))} "
            f"| {was['p50_ms']:.2f}, {was['p99_ms']:.2f} | {now['p50_ms']:.2f}, {now['p99_ms']:.2f} "
            f"| {batch:.1f} | {queue:.2f}, {infer:.2f} | {now['client_us']:.0f} |"
        )
    lines += [
        "",
        "Mean batch, queue and infer are those of the model that runs the encoder, from Triton's statistics. Overhead of the "
        f"server at concurrency 1, image_encoder, its median less that of bare ONNX Runtime: {spread(overheads(rows))} ms.",
        "",
        f"Soak: {soaked['model']}, {soaked['seconds']:.0f} s at {soaked['request_rate']:.0f} requests/s, "
        f"{SHARE:.0%} of the greatest load above (Poisson arrivals, latency from when a request was due): "
        f"{soaked['requests']:,} requests, {soaked['errors']} errors, {soaked['infer_per_s']:.0f} answers/s, "
        f"p50 {soaked['p50_ms']:.2f} ms, p99 {soaked['p99_ms']:.2f} ms{behind}. Largest difference from local inference: "
        f"{soaked['furthest_from_local']:.1e}. Memory of server and models after the first fifth: "
        f"{soaked['rss_mb'][2]:.0f} MB, {soaked['rss_percent'][0]:+.2f} % to {soaked['rss_percent'][1]:+.2f} %.",
    ]
    return "\n".join(lines) + "\n"


def say(text: str) -> None:
    """Report progress."""
    sys.stderr.write(f"{text}\n")


def main(folder: str, rounds: str = "7", seconds: str = "300") -> None:
    """Write and serve the repositories, measure them, and write the tables."""
    import onnxruntime

    export = Path(folder) / "export" / STAGE
    exported, load = read_export(export), os.getloadavg()[0]
    sets = evalsets([SourceSpec(format="scenes", split="test"), SourceSpec(format="digits", split="test")])
    made = request_templates(exported, sets)
    with TemporaryDirectory() as work, ExitStack() as stack:
        found = repositories(export, Path(folder) / "bench" / "results.json", Path(work))
        servers = {name: stack.enter_context(serving(repository)) for name, repository in found.items()}
        served = {name: server.http for name, (server, _) in servers.items()}
        with urlopen(f"http://{served['generated']}/v2") as metadata:
            triton = json.load(metadata)["version"]
        rows = turns(served, made, export, int(rounds))
        most = middle_of(rows, "generated", SOAKED, max(CONCURRENCY), "infer_per_s")
        files = made[SOAKED].inputs[IMAGE]
        expected = answers(exported, [files.content(number)[4:] for number in range(RECORDS)])
        figures, seconds_rows = soak(
            served["generated"], made[SOAKED], SHARE * most, float(seconds), expected, servers["generated"][1]
        )
    results = {
        "conditions": {
            "command": "python studies/serving.py RUN",
            "date": date.today().isoformat(),
            **processor().record(),
            "load": [round(load, 1), round(os.getloadavg()[0], 1)],
            "rounds": int(rounds),
            "triton": triton,
            "onnxruntime": onnxruntime.__version__,
            "tritonclient": version("tritonclient"),
            "turn": asdict(TURN),
        },
        "rows": rows,
        "soak": figures,
        "soak_by_second": seconds_rows,
    }
    (HERE / "serving.json").write_text(json.dumps(results) + "\n", encoding="utf-8")
    table = markdown(results)
    (HERE / "serving.md").write_text(table, encoding="utf-8")
    sys.stdout.write(table)


if __name__ == "__main__":
    main(*sys.argv[1:])
