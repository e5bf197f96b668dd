"""What does a GPU make of clipress? `python studies/gpu.py [--tiny] [PIECE ...]`: tests, speed, training; about nine minutes.

`tests` runs `pytest -m gpu`. `speed` times image towers of ViT-B/16 and ViT-L/14@336 in bf16 (dense, cut to half and a quarter of their
blocks' multiply-accumulates, 2:4), eager and compiled, beside what the chip needs for the arithmetic alone. `training` times
search steps and distillation steps of ViT-B/16 (gpu_training.py), and counts how often the host waits for the device. Weights are
random, since only time is measured. Every row is written into gpu.json and gpu.md as soon as it is there, and a row that is there
is not measured again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import open_clip
import torch

from clipress.artifact import save_artifact
from clipress.bench.cost import cost
from clipress.bench.latency import measure_in_turns, summary
from clipress.bench.runners.torch import TorchRunner
from clipress.bench.runners.torch_compiled import TorchCompiledRunner
from clipress.compress.prune.budget import Align
from clipress.compress.sparsify import zero_two_of_four
from clipress.errors import RecipeError
from clipress.models.load import Model, artifact_from_model, new_model
from clipress.models.tiny import tiny_architecture
from clipress.storage import write_text_whole
from clipress.studies.gpu_training import training_row, wait
from clipress.studies.speed import IMAGE, TEXT, pruned

HERE = Path(__file__).parent
PIECES = ("tests", "speed", "training")
STEPS = ("contrastive alone", "teacher online", "teacher cached", "search, teacher online")


def sizes(tiny: bool) -> dict[str, Any]:
    """Return what is measured: for a rehearsal, the same on tiny shapes."""
    if tiny:
        return {
            "towers": {"tiny": tiny_architecture()},
            "widths": {"dense": None, "50 %": 0.5},
            "eager": (1, 2),
            "compiled": {"tiny": ((), ())},  # a CPU may have no compiler
            "student": tiny_architecture(),
            "batch": 4,
            "steps": 2,
            "duration": 2.0,
            "matrix": 64,
            "training": [*((kind, 12, "eager") for kind in STEPS), ("teacher online", 8, "eager")],
        }
    towers = {}
    for label, name in (("ViT-B/16", "ViT-B-16"), ("ViT-L/14@336", "ViT-L-14-336")):
        config = open_clip.get_model_config(name)
        towers[label] = {"embed_dim": config["embed_dim"], "vision_cfg": config["vision_cfg"], "text_cfg": TEXT}
    return {
        "towers": towers,
        "widths": {"dense": None, "50 %": 0.5, "25 %": 0.25},
        "eager": (1, 8, 64, 256),
        # Compiling takes up to a minute, so that not everything is: (batches, widths) by tower.
        "compiled": {
            "ViT-B/16": ((1, 8, 64, 256), ("dense", "dense, 2:4", "50 %", "25 %")),
            "ViT-L/14@336": ((1, 64), ("dense", "25 %")),
        },
        "student": open_clip.get_model_config("ViT-B-16"),
        "batch": 256,
        "steps": 20,
        "duration": 300.0,
        "matrix": 8192,
        # Captions have 16 ids, or fewer, far more often than 77.
        "training": [
            *((kind, ids, "eager") for kind in STEPS for ids in (77, 16)),
            *((kind, 16, "compiled") for kind in STEPS if kind != "teacher cached"),
        ],
    }


class Rows:
    """The rows of a study's JSON, by the key that names each, and its table in Markdown beside them."""

    def __init__(self, path: Path, about: dict[str, Any], table: Callable[[dict[str, Any]], str] | None = None) -> None:
        """Read the rows that are there. Raises RecipeError if they were measured on another device or with other versions."""
        self.path, self.found, self.table = path, {"conditions": about, "rows": {}}, table or markdown
        if path.is_file():
            self.found = json.loads(path.read_text(encoding="utf-8"))
            before = self.found["conditions"]
            if other := sorted(name for name in about if name != "date" and before.get(name) != about[name]):
                name = other[0]
                raise RecipeError(
                    f"{path}: expected rows measured with {name} {about[name]}, found {before.get(name)}. A table has one "
                    "machine: choose another --out, or move the file away."
                )

    def add(self, key: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure a row unless it is there. One that fails holds the reason: the others are worth having."""
        if key in self.found["rows"]:
            return
        began = time.perf_counter()
        try:
            row = measure()
        except Exception as error:
            row = {"failed": f"{type(error).__name__}: {error}"[:500]}
        row["date"] = date.today().isoformat()
        sys.stderr.write(f"{key} ({time.perf_counter() - began:.0f} s): {row}\n")
        self.found["rows"][key] = row
        self.write()

    def write(self) -> None:
        """Write the rows and the table."""
        write_text_whole(self.path, json.dumps(self.found, indent=1) + "\n")
        write_text_whole(self.path.with_suffix(".md"), self.table(self.found))


def conditions() -> dict[str, Any]:
    """Return where and with what this was measured."""
    from importlib.metadata import version

    return {
        "command": "python studies/gpu.py",
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        **{name: version(name) for name in ("open_clip_torch", "nvidia-modelopt", "lightning-fabric")},
    }


def markdown(found: dict[str, Any]) -> str:
    """Return the table of all rows as Markdown."""
    about, rows = found["conditions"], found["rows"]
    dates = " and ".join(sorted({row.get("date", about["date"]) for row in rows.values()}))
    versions = ", ".join(
        f"{name} {about[name]}" for name in ("torch", "open_clip_torch", "nvidia-modelopt") if name in about
    )
    lines = [
        "# On a GPU",
        "",
        f"`{about['command']}`, {dates}, {about['device']}, CUDA {about['cuda']}, {versions}.",
    ]
    lines += ["Random weights, since only time is measured.", ""]
    if "tests" in rows:
        lines += [f"`pytest -m gpu`: {rows['tests'].get('result', rows['tests'].get('failed'))}", ""]
    chip = rows.get("chip", {})
    if "tflops" in chip:
        lines += [
            f"The chip: {chip['tflops']:.0f} TFLOP/s in a large bf16 product, {chip['gb_per_s']:.0f} GB/s in a copy. *Floor* is "
            "the time of a tower's arithmetic at that rate.",
            "",
        ]
    speeds = {tuple(key.split(" | ")[1:]): row for key, row in rows.items() if key.startswith("speed")}
    if speeds:
        lines += ["| image tower | model | batch | run | ms | images/s | floor, ms |", "|---|---|---|---|---|---|---|"]
        for (tower, width, batch, how), row in speeds.items():
            lines.append(f"| {tower} | {width} | {batch} | {how} | {_speed_cells(row, int(batch), chip)} |")
        lines.append("")
    steps = {tuple(key.split(" | ")[1:]): row for key, row in rows.items() if key.startswith("training")}
    if steps:
        lines += [
            "Training steps of ViT-B/16 in bf16 with 256 pairs and a teacher of the same size; the batch is on the GPU already. *ids* is "
            "the length of the texts; *start* the first steps, compiling included.",
            "",
            "| step | ids | run | ms | pairs/s | peak GiB | times the host waits | start, s |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for (kind, ids, how), row in steps.items():
            lines.append(f"| {kind} | {ids} | {how} | {_step_cells(row)} |")
    return "\n".join(lines).rstrip() + "\n"


def _step_cells(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{row['failed']} | | | | "
    waits, peak = ("–" if row[name] is None else row[name] for name in ("host_waits_per_step", "peak_gib"))
    cells = f"{row['ms_per_step']:.0f} | {row['images_per_s']:.0f} | {peak} | {waits}"
    return f"{cells} | {row['warm_up_s']:.0f}"


def _speed_cells(row: dict[str, Any], batch: int, chip: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{row['failed']} | | "
    floor = f"{2 * row['macs'] * batch / chip['tflops'] / 1e9:.2f}" if chip.get("tflops") else ""
    return f"{row['median_ms']:.2f} | {row['items_per_s']:.0f} | {floor}"


def run_tests() -> dict[str, Any]:
    """Run the tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
    sys.stderr.write(done.stdout[-6000:])
    return {"result": done.stdout.strip().splitlines()[-1], "code": done.returncode}


def median_ms(call: Callable[[], Any], times: int = 10) -> float:
    """Return the median of some calls, on a quiet device, in ms."""
    took = []
    for _ in range(times + 2):
        wait()
        began = time.perf_counter()
        call()
        wait()
        took.append(1000 * (time.perf_counter() - began))
    return sorted(took[2:])[times // 2]


def chip(side: int) -> dict[str, Any]:
    """Measure what the chip itself does: a large bf16 product and a copy, which floors are computed from."""
    a, b = (torch.randn(side, side, device=device(), dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(side * side * 8, device=device(), dtype=torch.bfloat16)
    product, copy = median_ms(lambda: a @ b), median_ms(source.clone)
    return {
        "tflops": round(2 * side**3 / product / 1e9, 3),
        "gb_per_s": round(2 * source.numel() * 2 / copy / 1e6, 1),
    }


def artifacts(architecture: dict[str, Any], widths: dict[str, float | None], home: Path) -> Iterator[tuple[str, Path]]:
    """Build each width of a tower, and the same with 2:4 weights. Yields names and artifact folders."""
    for width, macs in widths.items():
        model = new_model(architecture, 0)
        model = model if macs is None else pruned(model, macs, Align())
        yield width, save(model, home / width.replace(" %", ""))
        if macs is not None:
            continue  # what 2:4 does is the same for narrower layers
        names = zero_two_of_four(model.module).weights
        sparse = replace(model, sparsity={"pattern": "2:4", "weights": names})
        yield f"{width}, 2:4", save(sparse, home / f"{width.replace(' %', '')}-sparse")


def save(model: Model, folder: Path) -> Path:
    """Save a model with random weights."""
    return save_artifact(artifact_from_model(model, ({"stage": folder.name, "hash": folder.name},), {}), folder)


def measure_speed(rows: Rows, wanted: dict[str, Any], home: Path) -> None:
    """Time every tower, width, batch and way of running it."""
    rows.add("chip", lambda: chip(wanted["matrix"]))
    for label, architecture in wanted["towers"].items():
        batches, widths = wanted["compiled"][label]
        for width, folder in artifacts(architecture, wanted["widths"], home / label.replace("/", "")):
            macs = cost(folder).macs_per_tower[IMAGE]
            for batch in wanted["eager"]:
                key = f"speed | {label} | {width} | {batch}"
                rows.add(f"{key} | eager", partial(speed_row, TorchRunner, folder, macs, batch, wanted["duration"]))
                if width in widths and batch in batches:
                    run = partial(speed_row, TorchCompiledRunner, folder, macs, batch, wanted["duration"])
                    rows.add(f"{key} | compiled", run)


def speed_row(kind: type[TorchRunner], folder: Path, macs: int, batch: int, duration: float) -> dict[str, Any]:
    """Time one model at one batch."""
    on_gpu = torch.cuda.is_available()
    runner = kind(folder, 1, "bf16" if on_gpu else "fp32", on_gpu and "sparse" in folder.name)
    times = measure_in_turns({0: runner.query(IMAGE, batch)}, warm_up_ms=50, duration_ms=duration, iterations=10)[0]
    found = {name: summary(times, batch)[name] for name in ("median_ms", "p99_ms", "items_per_s", "iterations")}
    torch.compiler.reset()
    return {"precision": runner.model.precision, "macs": macs, **found}


def device() -> torch.device:
    """Return the device that everything runs on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def measure_training(rows: Rows, wanted: dict[str, Any]) -> None:
    """Time training steps of every kind."""
    for kind, ids, how in wanted["training"]:
        rows.add(f"training | {kind} | {ids} | {how}", partial(training_row, kind, ids, how == "compiled", wanted))


def main(arguments: list[str] | None = None) -> None:
    """Measure the given pieces, and write the rows and the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pieces", nargs="*", choices=[*PIECES, []], help="default: all")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on tiny shapes, also without a GPU")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        parser.exit(2, "expected a CUDA device, torch found none. Rehearse with --tiny.\n")
    pieces, wanted = options.pieces or PIECES, sizes(options.tiny)
    try:
        rows = Rows(options.out / "gpu.json", conditions())
    except RecipeError as error:
        parser.exit(2, f"{error}\n")
    if "tests" in pieces and not options.tiny:
        rows.add("tests", run_tests)
    if "training" in pieces:
        measure_training(rows, wanted)
    if "speed" in pieces:
        measure_speed(rows, wanted, Path(mkdtemp(prefix="clipress-gpu-")))
    rows.write()


if __name__ == "__main__":
    main()
