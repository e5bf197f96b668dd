"""What is each part of pruning without training worth? `python studies/no_training.py TEACHER RECIPE [OUT]`.

TEACHER is an artifact, RECIPE one whose data are used. Every row is one `prune: {steps: 0}` on a copy of the teacher with one part
changed, measured on the test sets. Writes <recipe's name>-no-training.{json,md} into OUT, by default beside this file.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from clipress.bench.conditions import time_and_machine
from clipress.compress.context import Context
from clipress.compress.fabric import start_fabric
from clipress.compress.plan import compress_plan_from
from clipress.compress.prune import search
from clipress.compress.prune.search import Prune
from clipress.compress.settings import Runtime
from clipress.data.eval_sets import evalsets
from clipress.metrics.outcomes import percents
from clipress.progress import track
from clipress.recipe import read_recipe
from clipress.storage import write_text_whole
from clipress.studies.table import recall
from clipress.tasks import evaluate_model, model_from_artifact

RATIOS = {"2x": 0.5, "4x": 0.25, "8x": 0.125, "16x": 0.0625}
SHAPE: dict[str, Any] = {
    "steps": 0,
    "calibrate": 1920,
    "batch_size": 64,
    "update_every": 3,
    "min_keep": {"head_dim": 0.05, "ffn": 0.02},
}
WITHOUT_PROJECTION = {"samples": 1024, "projection": False}
PARTS: dict[str, dict[str, Any]] = {
    "cut": {"rotate": False, "refit": False},
    "cut, refit": {"rotate": False, "refit": {"samples": 1024}},
    "rotated, cut": {"refit": False},
    "rotated, cut, refit": {"refit": {"samples": 1024}},
    "the same, to the branch's own output": {"refit": {**WITHOUT_PROJECTION, "target": "own"}},
    "the same, without the final projection": {"refit": WITHOUT_PROJECTION},
    "the same, tokens weighted, without the final projection": {"refit": {**WITHOUT_PROJECTION, "probes": 2}},
    "the same, tokens weighted": {"refit": {"samples": 1024, "probes": 2}},
    "the same, 4096 samples": {"refit": {"samples": 4096}},
    "the same, label-free scores": {"criterion": "gauss-newton", "refit": {"samples": 1024}},
}


def align(kept: float) -> dict[str, int]:
    """Return widths that reach a ratio: the default alignment of head dims cannot go below a quarter of a head of 32."""
    return {"head_dim": 4, "ffn": 16} if kept > 0.1 else {"head_dim": 2, "ffn": 8}


def main(teacher: Path, recipe: Path, out: Path) -> None:
    """Measure every part at every ratio."""
    plan = compress_plan_from(read_recipe(recipe))
    context = Context(start_fabric(Runtime(accelerator="cpu")), plan.data, 0, title="pruned")
    model, sets = model_from_artifact(teacher), evalsets(plan.data.test)
    dense = percents(evaluate_model(model, sets))
    rows = []
    cases = [(ratio, kept, part) for ratio, kept in RATIOS.items() for part in PARTS]
    for ratio, kept, part in track(cases, len(cases), plan.recipe.name, "case"):
        settings = Prune(**{**SHAPE, "budget": {"params": kept}, "align": align(kept), **PARTS[part]})
        began = time.perf_counter()
        made, _ = search.run(settings, model.copy(), context)
        seconds = round(time.perf_counter() - began, 1)
        rows.append(
            {"ratio": ratio, "part": part, "seconds": seconds, "accuracy": percents(evaluate_model(made, sets))}
        )
    found = {
        "dense": dense,
        "rows": rows,
        "conditions": {**time_and_machine(), "command": f"python studies/no_training.py TEACHER {recipe}"},
    }
    name = f"{plan.recipe.name}-no-training"
    write_text_whole(out / f"{name}.json", json.dumps(found, indent=1, default=str) + "\n")
    write_text_whole(out / f"{name}.md", markdown(name, found))


def markdown(name: str, found: dict[str, Any]) -> str:
    """Return one table: a row per part, a column per ratio."""
    lines = [
        f"# Study: {name}",
        "",
        f"Mean R@1 of both directions over all test sets, in percent; no weight was trained. Dense: {recall(found['dense']):.1f}.",
        "",
        "| part | " + " | ".join(RATIOS) + " | seconds at 4x |",
        "|---|" + "---|" * (len(RATIOS) + 1),
    ]
    for part in PARTS:
        mine = {row["ratio"]: row for row in found["rows"] if row["part"] == part}
        cells = [f"{recall(mine[ratio]['accuracy']):.1f}" for ratio in RATIOS]
        lines.append("| " + " | ".join([part, *cells, f"{mine['4x']['seconds']:.0f}"]) + " |")
    lines += ["", "Conditions: " + ", ".join(f"{key} {value}" for key, value in found["conditions"].items()) + "."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else Path(__file__).parent)
