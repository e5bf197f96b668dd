"""What do large models cost? `python studies/sizes.py [--work FOLDER] [MODEL ...]`: time and memory of every command.

Models of open_clip's architectures with random weights, in the layout of its hub folders, go through `clipress` as a user would take
them: import, export, a cut and INT8 without training, export of those, bench, serve. Each command is a process of its own; its memory
is the peak that the system counted. Files of up to 60 GB lie in the work folder, and a model's are removed once it is done. Rows that
are there are not measured again. Writes sizes.json and sizes.md beside this file.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import yaml

from clipress.storage import write_text_whole

HERE = Path(__file__).parent
MODELS = {"ViT-L-14-336": 2, "ViT-H-14": 2, "ViT-g-14": 2, "ViT-bigG-14": 0}
"""Models, and the batch with which they are cut; 0: what does not fit 24 GiB is imported and exported only."""
STEPS = ("import", "compress", "export", "classifier", "bench", "serve")
RECIPE: dict[str, Any] = {
    "name": "sizes",
    "data": {
        "train": [{"format": "scenes", "limit": 64}],
        "val": [{"format": "scenes", "split": "val", "limit": 8}],
    },
    "stages": [
        {
            "prune": {
                "budget": {"params": 0.5},
                "criterion": "gauss-newton",
                "steps": 0,
                "calibrate": 8,
                "refit": {"samples": 8},
            }
        },
        {"quantize": {"steps": 0, "calibrate": 8}},
    ],
    "bench": {"batch": [1], "duration": 1000},
}
CHECKPOINT = """
import json, sys
from pathlib import Path
import open_clip
from safetensors.torch import save_file
from clipress.models import surgery
from clipress.models.load import build
name, folder = sys.argv[1], Path(sys.argv[2])
config = open_clip.get_model_config(name)
weights = {key: value.contiguous() for key, value in surgery.stock_weights(build(config, 0)).items()}
folder.mkdir(parents=True)
save_file(weights, folder / "open_clip_model.safetensors")
(folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
"""


def commands(home: Path) -> dict[str, list[str]]:
    """Return the arguments of `clipress` by step."""
    run = str(home / "run")
    return {
        "import": ["import", str(home / "checkpoint"), str(home / "imported")],
        "compress": ["compress", str(home / "recipe.yaml"), "--out", run],
        "export": ["export", run],
        "classifier": ["export", run, "--stage", "teacher", "--labels", "cat,dog"],
        "bench": ["bench", run],
        "serve": ["serve", run],
    }


def measure(arguments: list[str]) -> dict[str, Any]:
    """Run `clipress` in a process of its own. Returns seconds and the peak of its memory in GiB; raises RuntimeError."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "clipress", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    said = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    sys.stderr.write(said[-3000:])
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {' '.join(said.split())[-400:]}")
    return {"seconds": round(time.perf_counter() - began, 1), "peak_gib": round(used.ru_maxrss / 2**20, 2)}


def row_of(name: str, step: str, home: Path) -> dict[str, Any]:
    """Measure one step of one model, with what it reads made."""
    checkpoint = home / "checkpoint"
    if not checkpoint.is_dir():
        subprocess.run([sys.executable, "-c", CHECKPOINT, name, str(checkpoint)], check=True)
        recipe = {**RECIPE, "teacher": {"artifact": str(home / "imported")}}
        recipe["stages"] = [
            {kind: {**settings, "batch_size": MODELS[name]} for kind, settings in stage.items()}
            for stage in RECIPE["stages"]
            if MODELS[name]
        ]
        write_text_whole(home / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    return {"checkpoint_gib": round(size / 2**30, 2), **measure(commands(home)[step])}


def markdown(found: dict[str, Any]) -> str:
    """Return the table of all rows as Markdown."""
    about = found["conditions"]
    lines = [
        "# Large models",
        "",
        f"`{about['command']}`, {about['date']}, {about['processor']}, {about['cores']} cores, torch {about['torch']}, random weights. Seconds, and the peak of "
        f"each command's memory in GiB; half a GiB of it is what the libraries take.{about.get('note', '')}",
        "",
        "| model | checkpoint, GiB | " + " | ".join(STEPS) + " |",
        "|---|---|" + "---|" * len(STEPS),
    ]
    for name in MODELS:
        rows = {key.split(" | ")[1]: row for key, row in found["rows"].items() if key.split(" | ")[0] == name}
        sizes = [row["checkpoint_gib"] for row in rows.values() if "checkpoint_gib" in row]
        if rows:
            lines.append(
                f"| {name} | {sizes[0] if sizes else ''} | " + " | ".join(_cell(rows.get(s)) for s in STEPS) + " |"
            )
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return row["failed"][:160] if "failed" in row else f"{row['seconds']:.0f} s, {row['peak_gib']:.1f}"


def main(arguments: list[str] | None = None) -> None:
    """Measure the given models."""
    from clipress.studies.gpu import Rows
    from clipress.studies.speed import conditions_of

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], help="default: all")
    parser.add_argument("--work", type=Path, help="default: a temporary folder")
    parser.add_argument("--steps", default=",".join(STEPS))
    options = parser.parse_args(arguments)
    work = options.work or Path(mkdtemp(prefix="clipress-sizes-"))
    about = {key: value for key, value in conditions_of("python studies/sizes.py").items() if key != "load"}
    rows = Rows(HERE / "sizes.json", about, markdown)
    for name in options.models or MODELS:
        home = work / name
        home.mkdir(parents=True, exist_ok=True)
        for step in options.steps.split(","):
            rows.add(f"{name} | {step}", partial(row_of, name, step, home))
        shutil.rmtree(home)


if __name__ == "__main__":
    main()
