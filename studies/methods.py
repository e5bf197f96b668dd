"""A study: methods (× ratios) × seeds from one recipe, each run in a process of its own, gathered into one table.

The file names a base recipe and the methods' stages; of pruning also the ratios, which go into the first stage's budget.
See configs/studies/. Every run is an ordinary run folder; a study that was stopped goes on where it was.
"""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import yaml
from pydantic import Field

from clipress.artifact import read_header
from clipress.errors import ArtifactError, ClipressError, RecipeError
from clipress.progress import track
from clipress.recipe import FolderName, Recipe, Section, checked, mapping_from, read_recipe
from clipress.storage import read_json, write_text_whole

SCHEMA_VERSION = 1


class StepCost(Section):
    """What one training step costs: short trainings in turns, each in a process of its own."""

    reference: str
    """The case the others are divided by."""
    cases: dict[FolderName, dict[str, Any]]
    """What each changes in the base recipe; it has one stage."""
    rounds: int = Field(3, ge=1)


class Study(Section):
    """A study file."""

    name: FolderName
    recipe: str
    """The base, relative to the study file; its stages are replaced."""
    sections: dict[str, Any] = Field(default_factory=dict)
    """What all change in the base recipe: `student`, for one."""
    methods: dict[FolderName, list[dict[str, Any]]]
    """Stages of each method; with ratios the first one is a prune."""
    reference: str
    """The method the others are compared with."""
    ratios: dict[FolderName, float] = Field(default_factory=dict)
    """Name and what is kept, put into the first stage's budget."""
    seeds: tuple[int, ...] = Field(min_length=1)
    bench: dict[str, Any] = Field(default_factory=dict)
    step_cost: StepCost | None = None


class Case(Section):
    """One run of a study."""

    method: str
    ratio: str | None
    seed: int
    recipe: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return "-".join(part for part in (self.method, self.ratio, f"s{self.seed}") if part)


def read_study(path: Path) -> tuple[Study, list[Case]]:
    """Read a study and spell out its runs; every recipe is checked."""
    study = checked(Study, mapping_from(path, "Study"), "study")
    base = read_recipe(path.parent / study.recipe).model_dump(exclude_none=True)
    cases = []
    for ratio, kept in (study.ratios or {None: None}).items():
        for seed in study.seeds:  # methods side by side, so that a slow hour hits all of them
            for method, stages in study.methods.items():
                recipe = copy.deepcopy(base) | {"name": f"{study.name}-{method}", "seed": seed, "bench": study.bench}
                recipe = _changed(recipe, study.sections) | {"stages": copy.deepcopy(stages)}
                if ratio is not None:
                    if not (stages and isinstance(stages[0].get("prune"), dict)):
                        raise RecipeError(f"Study {path}: with ratios, method '{method}' begins with a prune.")
                    recipe["stages"][0]["prune"]["budget"] = {"params": kept}
                cases.append(
                    Case(method=method, ratio=ratio, seed=seed, recipe=checked(Recipe, recipe, method).model_dump())
                )
    return study, cases


def _changed(recipe: Mapping[str, Any], sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe with some of its keys set to other values; mappings inside mappings are changed likewise."""
    result = dict(recipe)
    for key, value in sections.items():
        inner = result.get(key)
        result[key] = _changed(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return result


def run_study(file: Path, runs: Path | None, out: Path, jobs: int = 1) -> str:
    """Do what is missing of a study, gather it into <out>/<name>.{json,md,svg}, and return the table.

    Raises ArtifactError where a finished run was made with other settings than the file asks for now.
    """
    study, cases = read_study(file)
    home = runs or Path("runs/studies") / study.name
    done: dict[str, dict[str, Any]] = {}
    conditions: dict[str, Any] = {}
    cost: list[dict[str, Any]] = []

    def gather() -> str:
        rows = [done[case.name] for case in cases if case.name in done]
        content = {"schema_version": SCHEMA_VERSION, "study": study.name, "conditions": conditions, "rows": rows}
        text = markdown(study, rows, conditions, cost)
        write_text_whole(out / f"{study.name}.json", json.dumps(content | {"step_cost": cost}, indent=1) + "\n")
        write_text_whole(out / f"{study.name}.md", text)
        if study.ratios:
            write_text_whole(out / f"{study.name}.svg", picture(study, rows))
        return text

    _run(cases[0], home, 1)  # alone: it makes the teacher that all share
    with ThreadPoolExecutor(jobs) as pool:
        finished = [(case, pool.submit(_run, case, home, jobs)) for case in cases]
        for case, run in track(finished, len(finished), study.name, "run"):
            try:
                done[case.name] = row_of(case, run.result())
            except ClipressError:
                pool.shutdown(cancel_futures=True)
                raise
            conditions = _conditions(file, home / case.name)
            gather()
    if study.step_cost is not None:
        cost += step_costs(study, file, home)
    return gather()


def _run(case: Case, home: Path, jobs: int) -> Path:
    """Run a case unless it is there; return its folder."""
    folder = home / case.name
    kept = folder / "recipe.yaml"
    if kept.is_file() and read_recipe(kept) != checked(Recipe, case.recipe, case.name):
        raise ArtifactError(
            f"{folder} was made with other settings than the study asks for now. Remove it, or choose another place "
            "with --runs."
        )
    if not (folder / "bench" / "results.json").is_file():
        _clipress("run", case.recipe, folder, jobs)
    return folder


def _clipress(verb: str, recipe: Mapping[str, Any], folder: Path, jobs: int = 1) -> None:
    """Run a command on a recipe in a process of its own, with its part of the cores."""
    path = folder.with_suffix(".yaml")
    write_text_whole(path, yaml.safe_dump(dict(recipe), sort_keys=False))
    command = [sys.executable, "-m", "clipress", verb, str(path), "--out", str(folder)]
    threads = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // jobs, 1))} if jobs > 1 else {}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
    if done.returncode:
        raise ClipressError(f"{folder.name} failed; what it said last: {done.stderr.strip()[-600:]}")


def _from_results(run: Path, take: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Take what is needed of a finished run's figures. Raises ArtifactError where that is not in them."""
    try:
        return take(read_json(run / "bench" / "results.json"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ArtifactError(
            f"{run} holds no readable results ({type(error).__name__}: {error}); remove its bench/results.json and run "
            "the study again."
        ) from None


def _conditions(file: Path, run: Path) -> dict[str, Any]:
    shown = ("date", "processor", "isa", "cores", "threads", "clipress", "torch", "onnxruntime")
    known = _from_results(run, lambda results: {key: results["conditions"][key] for key in shown})
    known["isa"] = " ".join(known["isa"])
    return {"command": f"clipress study {file}"} | known


def step_costs(study: Study, file: Path, home: Path) -> list[dict[str, Any]]:
    """Time the steps of short trainings, round by round, so that a slow minute hits every case.

    Returns a row per case: seconds of a step (median per round), the ratio to the reference's of the same round, peak MB.
    """
    asked = study.step_cost
    base = read_recipe(file.parent / study.recipe).model_dump(exclude_none=True)
    base["data"] = base["data"] | {"val": [], "test": []}
    seconds: dict[str, list[float]] = {name: [] for name in asked.cases}
    memory: dict[str, int] = {}
    for turn in range(asked.rounds):
        for name, sections in track(asked.cases.items(), len(asked.cases), f"step cost, round {turn + 1}", "run"):
            folder = home / f"cost-{name.replace(' ', '-')}-{turn}"
            recipe = checked(Recipe, _changed(base | {"name": "cost"}, sections), name).model_dump()
            if not (folder / "done").is_file():
                _clipress("compress", recipe, folder)
                write_text_whole(folder / "done", "")
            log = next((folder / "logs").glob("*.jsonl"))
            times = [json.loads(line)["seconds"] for line in log.read_text(encoding="utf-8").splitlines()]
            steps = [after - before for before, after in pairwise(times)]
            seconds[name].append(median(steps[len(steps) // 5 :]))  # the first ones warm up
            peak = read_header(folder / log.stem)["lineage"][-1]["peak_memory_mb"]
            memory[name] = max(memory.get(name, 0), peak)
    return [
        {
            "case": name,
            "seconds": [round(value, 4) for value in values],
            "ratios": [round(a / b, 4) for a, b in zip(values, seconds[asked.reference], strict=True)],
            "peak_memory_mb": memory[name],
        }
        for name, values in seconds.items()
    ]


def row_of(case: Case, run: Path) -> dict[str, Any]:
    """Read what a finished run measured: accuracy, cost, latency against the dense teacher, and what pruning did."""
    return _from_results(run, partial(_row, case))


def _row(case: Case, results: Any) -> dict[str, Any]:
    teacher, first, last = results["rows"][0], results["rows"][1], results["rows"][-1]
    row = {
        "method": case.method,
        "ratio": case.ratio,
        "seed": case.seed,
        "dense": teacher["accuracy"],
        "final": last["accuracy"],
        "macs": last["macs"],
        "dense_macs": teacher["macs"],
        "latency_ms": round(_milliseconds(last), 4),
        "latency_of_dense": round(_milliseconds(last) / _milliseconds(teacher), 4),
        "date": results["conditions"]["date"],
    }
    made = {record["stage"]: record for record in last["lineage"]}
    row["peak_memory_mb"] = made[first["stage"]]["peak_memory_mb"]
    if case.ratio is not None:
        details = made[first["stage"]]["details"]
        row |= {
            "slimmed": first["accuracy"],
            "block_params_kept": first["block_params_kept"],
            "search_seconds_per_step": round(details["seconds"] / details["steps"], 4),
            "shapes": details["shapes"],
        }
    return row


def _milliseconds(row: dict[str, Any]) -> float:
    """Median of both towers at the largest batch, added."""
    largest = max(timing["batch"] for timing in row["latency"])
    return sum(timing["median_ms"] for timing in row["latency"] if timing["batch"] == largest)


def recall(accuracy: dict[str, float]) -> float:
    """Mean R@1 of both ways over all retrieval sets."""
    return mean(value for key, value in accuracy.items() if key.endswith(("/text_r1", "/image_r1")))


def _top1(accuracy: dict[str, float]) -> float:
    return mean(value for key, value in accuracy.items() if key.endswith("/top1"))


def lost(row: dict[str, Any], when: str) -> float:
    """Points of mean R@1 lost against the dense teacher, `slimmed` or `final`."""
    return recall(row["dense"]) - recall(row[when])


def summary(study: Study, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Gather seeds: mean and standard deviation of what people compare, per ratio and method."""
    gathered = []
    for ratio in study.ratios or [None]:
        for method in study.methods:
            mine = [row for row in rows if (row["ratio"], row["method"]) == (ratio, method)]
            if not mine:
                continue
            columns = {
                "macs_m": [row["macs"] / 1e6 for row in mine],
                "latency_of_dense": [row["latency_of_dense"] for row in mine],
                "peak_memory_mb": [row["peak_memory_mb"] for row in mine],
            }
            for when in ("slimmed", "final") if ratio else ("final",):
                columns |= {
                    f"r1_{when}": [recall(row[when]) for row in mine],
                    f"lost_{when}": [lost(row, when) for row in mine],
                    f"top1_{when}": [_top1(row[when]) for row in mine],
                }
            spread = {
                key: (mean(values), stdev(values) if len(values) > 1 else None) for key, values in columns.items()
            }
            gathered.append({"ratio": ratio, "method": method, "seeds": len(mine), **spread})
    return gathered


def markdown(
    study: Study,
    rows: Sequence[dict[str, Any]],
    conditions: Mapping[str, Any],
    cost: Sequence[dict[str, Any]] = (),
) -> str:
    """Write the table for people: mean ± standard deviation over seeds; below it, what a step costs."""
    dense = rows[0]["dense"]
    lines = [
        f"# Study: {study.name}",
        "",
        f"Dense teacher: mean R@1 {recall(dense):.1f} %, zero-shot top-1 {_top1(dense):.1f} %. "
        "R@1 is the mean of both ways on the test split, over the seeds ± standard deviation.",
        "",
        *(_pruning_table if study.ratios else _training_table)(study, summary(study, rows)),
    ]
    if cost:
        lines += ["", f"What a step costs: median of a round, {study.step_cost.rounds} rounds in turns.", ""]
        lines += [
            f"| training | s/step | of {study.step_cost.reference}'s: median (range) | peak MB |",
            "|---|---|---|---|",
        ]
        for row in cost:
            ratios = row["ratios"]
            spread = f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
            lines.append(f"| {row['case']} | {median(row['seconds']):.3f} | {spread} | {row['peak_memory_mb']} |")
    lines += ["", "Conditions: " + ", ".join(f"{key} {value}" for key, value in conditions.items()) + "."]
    return "\n".join(lines) + "\n"


def _pruning_table(study: Study, table: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "*Lost* is in points of R@1 against the dense teacher. Latency: ONNX Runtime, median of both towers at the largest "
        "batch, against the dense teacher measured in turns with it.",
        "",
        "| ratio | method | seeds | R@1 slimmed | R@1 recovered | lost slimmed | lost recovered | of "
        f"{study.reference}'s loss | top-1 slimmed | top-1 recovered | MACs (M) | latency | peak MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    reference = {row["ratio"]: row for row in table if row["method"] == study.reference}
    for row in table:
        base, share = reference.get(row["ratio"]), "–"
        if base:
            parts = [row[key][0] / base[key][0] for key in ("lost_slimmed", "lost_final") if base[key][0]]
            share = " / ".join(f"{part:.0%}" for part in parts)
        told = [_told(row[key], 1) for key in ("r1_slimmed", "r1_final", "lost_slimmed", "lost_final")]
        rest = [_told(row[key], 1) for key in ("top1_slimmed", "top1_final", "macs_m")]
        rest += [_told(row["latency_of_dense"], 3), _told(row["peak_memory_mb"], 0)]
        lines.append("| " + " | ".join([row["ratio"], row["method"], str(row["seeds"]), *told, share, *rest]) + " |")
    return lines


def _training_table(study: Study, table: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        f"*Better by*: points against {study.reference}, and in standard deviations (of both methods, pooled).",
        "",
        "| method | seeds | R@1 | better by | top-1 | better by | peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    base = next((row for row in table if row["method"] == study.reference), None)
    for row in table:
        cells = [row["method"], str(row["seeds"])]
        for key in ("r1_final", "top1_final"):
            cells += [_told(row[key], 1), _against(row[key], base[key]) if base and row is not base else "–"]
        lines.append("| " + " | ".join([*cells, _told(row["peak_memory_mb"], 0)]) + " |")
    return lines


def _against(own: tuple[float, float | None], base: tuple[float, float | None]) -> str:
    gain = own[0] - base[0]
    pooled = math.sqrt(((own[1] or 0.0) ** 2 + (base[1] or 0.0) ** 2) / 2)
    return f"{gain:+.1f}" + (f" ({gain / pooled:+.1f} sd)" if pooled else "")


def _told(value: tuple[float, float | None], decimals: int) -> str:
    average, spread = value
    return f"{average:.{decimals}f}" + ("" if spread is None else f" ± {spread:.{decimals}f}")


COLOURS = ("#0b62c4", "#c4510b", "#6b6b6b", "#2a8a4a", "#8a2a7a", "#a08a10")


def picture(study: Study, rows: Sequence[dict[str, Any]]) -> str:
    """Draw R@1 after recovery against latency, one line per method, as SVG."""
    table = summary(study, rows)
    points = {
        method: sorted(
            (row["latency_of_dense"][0], row["r1_final"][0], row["ratio"]) for row in table if row["method"] == method
        )
        for method in study.methods
    }
    everything = [point for line in points.values() for point in line]
    dense = recall(rows[0]["dense"])
    low = min([point[1] for point in everything] + [dense]) - 2
    right = max([point[0] for point in everything] + [1.0]) * 1.02

    def at(x: float, y: float) -> tuple[float, float]:
        return 70 + 600 * x / right, 30 + 340 * (dense + 2 - y) / (dense + 2 - low)

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 440" font-family="sans-serif" font-size="13">',
        '<rect width="720" height="440" fill="white"/>',
    ]
    for tick in range(int(low // 5 + 1) * 5, int(dense + 2) + 1, 5):
        _, y = at(0, tick)
        parts.append(
            f'<line x1="70" x2="670" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/><text x="62" y="{y + 4:.1f}" text-anchor="end">{tick}</text>'
        )
    for tick in (0.25, 0.5, 0.75, 1.0):
        x, _ = at(tick, 0)
        parts.append(f'<text x="{x:.1f}" y="390" text-anchor="middle">{tick}</text>')
    x, y = at(1.0, dense)
    parts.append(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"/><text x="{x - 8:.1f}" y="{y - 8:.1f}" text-anchor="end">dense teacher</text>'
    )
    for line, colour in zip(points.values(), COLOURS * 3, strict=False):
        placed = [(*at(x, y), ratio) for x, y, ratio in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in placed)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y, ratio in placed:
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/><text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle" fill="{colour}">{ratio}</text>'
            )
    for place, (method, colour) in enumerate(zip(study.methods, COLOURS * 3, strict=False)):
        parts.append(f'<text x="{90 + 150 * place}" y="425" fill="{colour}" font-weight="bold">{method}</text>')
    parts.append('<text x="370" y="408" text-anchor="middle">latency, of the dense teacher</text>')
    parts.append(
        '<text x="20" y="200" transform="rotate(-90 20 200)" text-anchor="middle">mean R@1 after recovery (%)</text></svg>'
    )
    return "\n".join(parts) + "\n"
