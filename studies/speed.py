"""How much faster do INT8 and pruning make image towers in ONNX Runtime? `python studies/speed.py [WORK] [MS]`.

Shapes are those of ViT-B/32 and ResNet-18 at 224 pixels; weights are random, since only time is measured. Towers are pruned
by random scores to 50 % and 25 % of the blocks' multiply-accumulates, with clipress's alignment and without, cut, quantized
and exported by clipress. One thread; all files of a batch size take turns; a ratio is the median over rounds with
its 95 % interval. Writes speed.json (raw rows and conditions) and speed.md beside this file.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import open_clip
import torch

from clipress.artifact import save_artifact
from clipress.bench.compare import speed_up
from clipress.bench.cost import cost
from clipress.bench.latency import Timings, measure_in_turns, summary
from clipress.bench.runners.onnxruntime import OnnxRuntimeRunner
from clipress.compress.calibration import Samples, outputs_of
from clipress.compress.prune.budget import Align, Budget
from clipress.compress.prune.criterion import CRITERIA
from clipress.compress.prune.gates import Gates
from clipress.compress.prune.search import Prune, Search
from clipress.data.eval_sets import EvalSet, evalsets
from clipress.data.spec import SourceSpec
from clipress.data.transforms import Preprocess
from clipress.export import parity
from clipress.export.settings import OnnxSettings
from clipress.export.to_onnx import onnx_from_artifact
from clipress.models import anatomy, quantizers, surgery
from clipress.models.load import Model, artifact_from_model, new_model
from clipress.runtime.cpu import processor
from clipress.tasks import task_named
from clipress.tasks.clip import INPUTS, SIDES, Clip

HERE = Path(__file__).parent
IMAGE = Clip.main_graph
BATCHES = (1, 8)
TEXT = {"context_length": 8, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}  # not measured
TOWERS: dict[str, dict[str, Any]] = {
    "ViT-B/32": {"embed_dim": 512, "vision_cfg": open_clip.get_model_config("ViT-B-32")["vision_cfg"]},
    "ResNet-18": {
        "embed_dim": 512,
        "vision_cfg": {"timm_model_name": "resnet18", "timm_pool": "avg", "timm_proj": "linear", "image_size": 224},
    },
}
UNALIGNED = Align(head_dim=1, ffn=1, heads=1, channels=1)


def pruned(model: Model, macs: float, align: Align) -> Model:
    """Return a copy cut to a fraction of the blocks' MACs by random scores."""
    cut = model.copy()
    settings = Prune(budget=Budget(image={"macs": macs}), criterion="random", align=align, steps=1)
    gates = Gates(cut.module, CRITERIA["random"].space, {side: () for side in SIDES if side != IMAGE})
    search = Search(cut, gates, settings, 1, 0, lambda total: total)
    search.update(1.0)
    for part, mask in gates.part_masks():
        surgery.cut(part, mask)
    gates.remove()
    return cut


def in_int8(model: Model, samples: Samples, portable: bool = True) -> Model:
    """Return a copy in which the towers that have samples are INT8, calibrated on them."""
    copy, task = model.copy(), task_named(model.task)
    names = [name for name in quantizers.quantizable(copy.module) if anatomy.tower_of(copy.module, name) in samples]
    with torch.no_grad():
        quantizers.attach(copy.module, names, lambda module: outputs_of(task, module, samples), portable=portable)
    side = next(iter(samples))
    count = len(samples[side][INPUTS[side]])
    about = {"dtype": "int8", "modules": names, "calibrated_on": count, "portable": portable}
    return replace(copy, quantization=about)


def settle_norms(model: Model, pixels: torch.Tensor) -> None:
    """Let batch norms collect statistics, which random weights lack."""
    model.module.train()
    with torch.no_grad():
        for _ in range(10):
            model.module.encode_image(pixels)
    model.module.eval()


def variants(tower: str, pixels: torch.Tensor) -> dict[str, Model]:
    """Return every model of a tower by its name, the float32 dense one first."""
    samples = {IMAGE: {INPUTS[IMAGE]: pixels}}
    model = new_model({**TOWERS[tower], "text_cfg": TEXT}, 0)
    if tower == "ResNet-18":
        settle_norms(model, pixels)
        return {"dense": model, "dense int8": in_int8(model, samples)}
    made = {"dense": model}
    for macs in (0.5, 0.25):
        made[f"{macs:.0%} aligned"] = pruned(model, macs, Align())
        made[f"{macs:.0%} not aligned"] = pruned(model, macs, UNALIGNED)
    made |= {f"{name} int8": in_int8(one, samples) for name, one in made.items()}
    return made


def exported(name: str, model: Model, home: Path, sets: list[EvalSet]) -> dict[str, dict[str, Any]]:
    """Export a model. Returns folder, MACs and bytes of its image tower by variant; INT8 of a ResNet in both forms."""
    artifact = save_artifact(
        artifact_from_model(model, ({"stage": name, "hash": name},), {}), home / "artifacts" / name
    )
    found = {}
    forms = ("qdq", "static") if model.quantization and hasattr(model.module.visual, "trunk") else ("auto",)
    for form in forms:
        label = name if form == "auto" else f"{name} {form}"
        folder = home / "export" / label
        made = onnx_from_artifact(artifact, folder, OnnxSettings(int8=form, exporter="torchscript"), sets)
        figures = {"macs": cost(artifact).macs_per_tower[IMAGE], "bytes": made.files[IMAGE].bytes}
        found[label] = {"folder": str(folder), **figures, "parity": made.least_cosines[IMAGE]}
    return found


def measured(models: dict[str, dict[str, Any]], batch: int, duration: float) -> dict[str, Timings]:
    """Time all models of a tower in turns."""
    queries = {name: OnnxRuntimeRunner(Path(one["folder"]), 1).query(IMAGE, batch) for name, one in models.items()}
    return measure_in_turns(queries, warm_up_ms=300, duration_ms=duration, iterations=20)


def rows_of(tower: str, models: dict[str, dict[str, Any]], batch: int, duration: float) -> list[dict[str, Any]]:
    """Return a row per model: its times, and its ratios to the dense float32 one."""
    timings = measured(models, batch, duration)
    first = next(iter(models))
    rows = []
    for name, one in models.items():
        ratio = speed_up(timings[first], timings[name])
        ideal = models[first]["macs"] / one["macs"]
        quickest = float(timings[first].latency.min() / timings[name].latency.min())
        rows.append(
            {
                "tower": tower,
                "model": name,
                "batch": batch,
                "macs": one["macs"],
                "bytes": one["bytes"],
                "size_ratio": round(one["bytes"] / models[first]["bytes"], 4),
                "speed_up": round(ratio.value, 4),
                "low": ratio.low and round(ratio.low, 4),
                "high": ratio.high and round(ratio.high, 4),
                "of_minima": round(quickest, 4),
                "ideal": round(ideal, 4),
                "of_ideal": round(ratio.value / ideal, 4),
                "parity_cosine": one["parity"],
                **summary(timings[name], batch),
                "times_ms": [round(float(t), 4) for t in timings[name].latency],
            }
        )
    return rows


def conditions_of(command: str) -> dict[str, Any]:
    """Return what the figures of a command depend on."""
    import onnxruntime

    return {
        "command": command,
        "date": date.today().isoformat(),
        "processor": str(processor()),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def in_words(conditions: dict[str, Any]) -> str:
    """Return conditions as the first words below a table's heading."""
    return (
        f"`{conditions['command']}`, {conditions['date']}, {conditions['processor']}, one thread, "
        f"load {conditions['load']} on {conditions['cores']} cores, torch {conditions['torch']}, onnxruntime "
        f"{conditions['onnxruntime']}."
    )


def times_as_fast(row: dict[str, Any]) -> str:
    """Return a row's ratio with its interval, if it has one."""
    return f"{row['speed_up']:.2f}" + ("" if row["low"] is None else f" [{row['low']:.2f}, {row['high']:.2f}]")


def write_tables(name: str, rows: list[dict[str, Any]], conditions: dict[str, Any], table: str) -> None:
    """Write `<name>.json` and `<name>.md` beside this file, and print the table."""
    content = json.dumps({"conditions": conditions, "rows": rows}) + "\n"
    (HERE / f"{name}.json").write_text(content, encoding="utf-8")
    (HERE / f"{name}.md").write_text(table, encoding="utf-8")
    sys.stdout.write(table)


def markdown(rows: list[dict[str, Any]], conditions: dict[str, Any]) -> str:
    """Return the table as Markdown."""
    lines = [
        "# Speed of INT8 and of pruning in ONNX Runtime",
        "",
        f"{in_words(conditions)} Random weights. The ratio is to the dense float32 file in the same rounds: median over "
        "rounds [95 % interval]; of minima: the quickest query of each. Ideal: the ratio of the tower's multiply-accumulates.",
        "",
        "| tower | model | batch | MACs (G) | file | ms | times as fast | of minima | of ideal |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        of_ideal = "" if "int8" in row["model"] else f"{row['of_ideal']:.0%}"
        lines.append(
            f"| {row['tower']} | {row['model']} | {row['batch']} | {row['macs'] / 1e9:.2f} | {row['size_ratio']:.3f} | "
            f"{row['median_ms']:.1f} | {times_as_fast(row)} | {row['of_minima']:.2f} | {of_ideal} |"
        )
    return "\n".join(lines) + "\n"


def models_of(tower: str, home: Path) -> dict[str, dict[str, Any]]:
    """Build and export all models of a tower, unless `home` has them already."""
    index = home / "models.json"
    if not index.is_file():
        sets = evalsets([SourceSpec(format="scenes", split="test", limit=16)])
        found: dict[str, dict[str, Any]] = {}
        pixels = torch.from_numpy(np.concatenate(list(sets[0].pixel_batches(Preprocess(size=224)))))
        for name, model in variants(tower, pixels).items():
            sys.stderr.write(f"{tower} {name}\n")
            found |= exported(name, model, home, sets)
        index.write_text(json.dumps(found), encoding="utf-8")
    return json.loads(index.read_text(encoding="utf-8"))


def main(work: str | None = None, duration: str = "4000") -> None:
    """Build, export and measure all models, and write the tables."""
    torch.set_num_threads(1)
    home = Path(work or mkdtemp(prefix="clipress-speed-"))
    for precision in ("int8", "static int8"):  # Weights are random, so rankings mean nothing.
        parity.LIMITS[precision] = (0.98, 0.0, 1.0)
    models = {tower: models_of(tower, home / tower.replace("/", "")) for tower in TOWERS}
    cases = [(tower, batch) for tower in TOWERS for batch in BATCHES]
    rows = [row for tower, batch in cases for row in rows_of(tower, models[tower], batch, float(duration))]
    conditions = conditions_of("python studies/speed.py")
    write_tables("speed", rows, conditions, markdown(rows, conditions))


if __name__ == "__main__":
    main(*sys.argv[1:])
