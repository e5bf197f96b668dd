"""Is INT8 correct, and is it fast, on every CPU? `python studies/every_cpu.py RUN [WORK]`: RUN is a finished demo.

Measures the demo's files, and files of the shapes of ViT-B/32 and ResNet-18 with random weights, in float32 and INT8: weights
in 8 bits, the same in ONNX Runtime's exact mode, weights in 7 bits. Each runs on every CPU that `cpus.py` offers here, in a
program of plain ONNX Runtime. *Integers*: the least cosine of a row with the same file in exact mode on the same CPU, which
shows overflow alone; ARM has no such mode, and does not need one. *Float*: the least cosine with the file's own result when
Q/DQ is computed in float32, where sums in another order round some activations differently. Speed: times as fast as float32
on that CPU, one thread, forms in turns, the median over rounds. An emulated CPU is not timed, and its large shapes get one row.
Writes every_cpu.{json,md} beside this file, after each CPU.
"""

from __future__ import annotations

import json
import sys
import tempfile
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import open_clip
import torch

from clipress.artifact import save_artifact
from clipress.data.eval_sets import evalsets
from clipress.data.spec import SourceSpec
from clipress.export import parity
from clipress.export.settings import OnnxSettings
from clipress.export.to_onnx import onnx_from_artifact
from clipress.models.load import Model, artifact_from_model, new_model
from clipress.progress import track
from clipress.runtime.cpu import processor
from clipress.runtime.onnx_session import reference_session
from clipress.studies import cpus
from clipress.studies.speed import IMAGE, TEXT, TOWERS, in_int8, settle_norms
from clipress.tasks import model_from_artifact, task_named
from clipress.tasks.clip import INPUTS, SIDES

HERE = Path(__file__).parent
FORMS = ("fp32", "8 bits", "8 bits, exact mode", "7 bits")
ROUNDS, TURN = 12, 0.15  # turns of a form, and how many seconds one lasts at least
CHILD = """
import json, sys, time
import numpy as np, onnxruntime
def session(path, exact):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
job = json.load(open(sys.argv[1]))
opened = {form: session(path, "exact" in form) for form, path in job["files"].items()}
data = np.load(job["inputs"])
rows, found = data["rows"][: job["rows"]], {"cosine": {}, "times": {}}
takes = next(iter(opened.values())).get_inputs()[0].name
def least(a, b):
    a, b = a.astype("d"), b.astype("d")
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())
found["integers"] = {}
for form, one in opened.items():
    answer = one.run(None, {takes: rows})[0]
    found["cosine"][form] = least(answer, data[form][: len(rows)])
    if form != "fp32":
        found["integers"][form] = least(answer, session(job["files"][form], True).run(None, {takes: rows})[0])
for batch in job["batches"]:
    fed = {takes: np.resize(rows, (batch, *rows.shape[1:]))}
    times = {form: [] for form in opened}
    for number in range(job["rounds"]):
        for form in list(opened)[:: 1 if number % 2 else -1]:
            taken, until = [], time.perf_counter() + job["turn"]
            while not taken or time.perf_counter() < until:
                start = time.perf_counter()
                opened[form].run(None, fed)
                taken.append(time.perf_counter() - start)
            times[form].append(sorted(taken)[len(taken) // 2] * 1000)
    found["times"][batch] = times
json.dump(found, open(sys.argv[2], "w"))
"""


def dense(model: str, run: Path) -> Model:
    """Return the model to quantize: the demo's last stage in float32, or a shape with random weights."""
    if model == "demo":
        return model_from_artifact(run / "sparse")
    text = TEXT if model == "ResNet-18" else open_clip.get_model_config("ViT-B-32")["text_cfg"]
    return new_model({**TOWERS[model], "text_cfg": text}, 0)


def exported(module: str, run: Path, home: Path) -> dict[str, dict[str, Any]]:
    """Export a model's forms. Returns, per tower, the files by form, and the inputs with the results of exact arithmetic."""
    folder = home / module.replace("/", "")
    sets = evalsets([SourceSpec(format="scenes", split="test", limit=32)])
    model = dense(module, run)
    inputs = task_named(model.task).samples(sets, model.preprocess, model.tokenize())
    inputs = {graph: {name: rows[:32] for name, rows in one.items()} for graph, one in inputs.items()}
    samples = {graph: {name: torch.from_numpy(rows) for name, rows in one.items()} for graph, one in inputs.items()}
    if module == "ResNet-18":
        settle_norms(model, samples[IMAGE][INPUTS[IMAGE]])
    clips = {"fp32": model, "8 bits": in_int8(model, samples, False), "7 bits": in_int8(model, samples, True)}
    for form, one in clips.items():
        artifact = save_artifact(
            artifact_from_model(one, ({"stage": form, "hash": form},), {}), folder / "artifacts" / form
        )
        static = "static" if module == "ResNet-18" and one.quantization else "auto"
        settings = OnnxSettings(exporter="torchscript", int8=static)
        onnx_from_artifact(artifact, folder / form, settings, sets)
    towers = SIDES[:1] if module == "ResNet-18" else SIDES
    return {tower: _files(folder, tower, inputs[tower][INPUTS[tower]]) for tower in towers}


def _files(folder: Path, tower: str, rows: np.ndarray) -> dict[str, Any]:
    files = {form: str(folder / form.partition(",")[0] / f"{tower}.onnx") for form in FORMS}
    expected = {form: reference_session(Path(path)).run(None, {INPUTS[tower]: rows})[0] for form, path in files.items()}
    np.savez(folder / f"{tower}.npz", rows=rows, **expected)
    return {"files": files, "inputs": str(folder / f"{tower}.npz")}


def measured(cpu: str, model: str, tower: dict[str, Any]) -> dict[str, Any]:
    """Run a tower's forms on a CPU; on an emulated one nothing is timed, and large shapes get one row and no float32."""
    emulated = cpu in cpus.MODELS
    forms, rows = (("8 bits", "7 bits"), 1) if emulated and model != "demo" else (FORMS, 32)
    files = {form: tower["files"][form] for form in forms}
    batches = [] if emulated else [1, 32 if model == "demo" else 8]
    job = {"files": files, "inputs": tower["inputs"], "batches": batches, "rows": rows, "rounds": ROUNDS, "turn": TURN}
    with tempfile.TemporaryDirectory() as folder:
        child, given, out = (Path(folder) / name for name in ("child.py", "job.json", "out.json"))
        child.write_text(CHILD, encoding="utf-8")
        given.write_text(json.dumps(job), encoding="utf-8")
        done = cpus.python(cpu, child, given, out)
        if done.returncode:
            raise RuntimeError(f"{cpu}: {done.stderr.strip()[-400:]}")
        return json.loads(out.read_text(encoding="utf-8"))


def rows_of(cpu: str, model: str, tower: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row per form: its cosine and, per batch, its median time and how many times as fast as float32 it is."""
    rows = []
    for form in found["cosine"]:
        integers = None if cpu in (cpus.ARM, cpus.OLD_ARM) else found["integers"].get(form)
        cosines = {"float": found["cosine"][form], "integers": integers}
        row = {"cpu": cpu, "model": model, "tower": tower, "form": form, **cosines}
        for batch, times in found["times"].items():
            ratios = sorted(dense / own for dense, own in zip(times["fp32"], times[form], strict=True))
            to_8_bits = [wide / own for wide, own in zip(times["8 bits"], times[form], strict=True)]
            row[f"batch {batch}"] = {
                "median_ms": round(median(times[form]), 4),
                "speed_up": round(median(ratios), 4),
                "quartiles": [round(ratios[len(ratios) // 4], 4), round(ratios[-1 - len(ratios) // 4], 4)],
                "of_8_bits": round(median(to_8_bits), 4),
            }
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]], conditions: dict[str, Any]) -> str:
    """Return the table as Markdown: a line per CPU, model and tower, the forms side by side."""
    lines = [
        "# INT8 on every CPU",
        "",
        f"`{conditions['command']}`, {conditions['date']}, {conditions['processor']} ({' '.join(conditions['isa'])}), one "
        f"thread, onnxruntime {conditions['onnxruntime']}; instruction sets hidden from the process, or the CPU emulated, by "
        "studies/cpus.py. *Integers*: least cosine of a row with exact integer arithmetic, all else equal. *Float*: "
        "with Q/DQ computed in float32, where sums in another order round some activations differently. Speed: times as fast "
        "as float32 on that CPU at the larger batch (32 for the demo, else 8), and in brackets 7 bits against 8; an "
        "emulated CPU is not timed.",
        "",
        "| CPU | model | tower | integers: 8 bits | 7 bits | float: 8 bits | 8 bits, exact mode | 7 bits | speed: 8 bits | "
        "8 bits, exact mode | 7 bits |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups = dict.fromkeys((row["cpu"], row["model"], row["tower"]) for row in rows)
    for group in groups:
        mine = {row["form"]: row for row in rows if (row["cpu"], row["model"], row["tower"]) == group}
        columns = [(form, "integers") for form in ("8 bits", "7 bits")] + [(form, "float") for form in FORMS[1:]]
        found = [mine.get(form, {}).get(kind) for form, kind in columns]
        cells = [*group, *("–" if one is None else f"{one:.6f}" for one in found)]
        for form in FORMS[1:]:
            timed = [value for key, value in mine.get(form, {}).items() if key.startswith("batch")]
            of_8_bits = f" ({timed[-1]['of_8_bits']:.3f})" if timed and form == "7 bits" else ""
            cells.append(f"{timed[-1]['speed_up']:.2f}{of_8_bits}" if timed else "–")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(run: str, work: str | None = None) -> None:
    """Build, export, run on every CPU, write."""
    import onnxruntime

    torch.set_num_threads(1)
    home = Path(work or tempfile.mkdtemp(prefix="clipress-every-cpu-"))
    for precision in ("int8", "static int8"):  # most weights are random, so rankings mean nothing
        parity.LIMITS[precision] = (0.9, 0.0, 1.0)
    models = {model: exported(model, Path(run), home) for model in ("demo", "ViT-B/32", "ResNet-18")}
    every = (cpus.NATIVE, *cpus.HIDDEN, *cpus.MODELS)
    rows: list[dict[str, Any]] = []
    conditions = {
        "command": "python studies/every_cpu.py RUN",
        "date": date.today().isoformat(),
        **processor().record(),
        "onnxruntime": onnxruntime.__version__,
    }
    for cpu in track(every, len(every), "every CPU", "CPU"):
        if reason := cpus.missing(cpu):
            sys.stderr.write(f"{cpu} skipped: {reason}\n")
            continue
        for model, towers in models.items():
            for tower, files in towers.items():
                rows += rows_of(cpu, model, tower, measured(cpu, model, files))
        content = json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n"
        (HERE / "every_cpu.json").write_text(content, encoding="utf-8")
        (HERE / "every_cpu.md").write_text(markdown(rows, conditions), encoding="utf-8")
    sys.stdout.write(markdown(rows, conditions))


if __name__ == "__main__":
    main(*sys.argv[1:])
