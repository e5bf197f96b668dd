"""A study: methods (× ratios) × seeds from one recipe, each run in its own process, summarised in one table.

The study file names a base recipe and the stages of each method; for pruning also the ratios, which become the budget of the
first stage. See configs/studies/. Every run is an ordinary run folder; a stopped study resumes where it left off.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from clipress.artifact import read_header
from clipress.bench.results import Results, Row, read_results, write_results
from clipress.bench.run import Subject, bench
from clipress.bench.settings import BenchSettings
from clipress.errors import ArtifactError, ClipressError, RecipeError
from clipress.progress import track
from clipress.recipe import Recipe, checked, mapping_from, read_recipe
from clipress.storage import write_text_whole
from clipress.studies.chart import draw_chart
from clipress.studies.study import SCHEMA_VERSION, Case, Sized, Study, StudyRow, TimedSteps
from clipress.studies.table import markdown

RESULTS, ALONE = "results.json", "alone"
LONG = 100
"""Milliseconds of each model, graph and batch when latencies are measured again."""


def read_study(path: Path) -> tuple[Study, list[Case]]:
    """Read a study file and list its runs, with every recipe checked."""
    study = checked(Study, mapping_from(path, "Study"), "study")
    base = read_recipe(path.parent / study.recipe).model_dump(exclude_none=True)
    cases = []
    for ratio, kept in (study.ratios or {None: None}).items():
        for seed in study.seeds:  # Methods alternate, so that a slow hour affects all of them.
            for method, how in study.methods.items():
                sized = isinstance(how, Sized)
                if sized and ratio not in how.students:
                    continue
                stages = how.stages if sized else how
                recipe = copy.deepcopy(base) | {"name": f"{study.name}-{method}", "seed": seed, "bench": study.bench}
                recipe = merge_sections(recipe, study.sections) | {"stages": copy.deepcopy(stages)}
                if sized:
                    recipe["student"] = copy.deepcopy(how.students[ratio])
                elif ratio is not None:
                    if not (stages and isinstance(stages[0].get("prune"), dict)):
                        raise RecipeError(
                            f"Study {path}: with ratios, method '{method}' must begin with a prune stage, or have students."
                        )
                    prune = recipe["stages"][0]["prune"]
                    prune["budget"] = {**prune.get("budget", {}), study.unit: kept}
                cases.append(
                    Case(method=method, ratio=ratio, seed=seed, recipe=checked(Recipe, recipe, method).model_dump())
                )
    return study, cases


def merge_sections(recipe: Mapping[str, Any], sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe with some of its keys changed; mappings inside mappings are merged."""
    result = dict(recipe)
    for key, value in sections.items():
        inner = result.get(key)
        result[key] = (
            merge_sections(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
        )
    return result


def run_study(file: Path, runs: Path | None, out: Path, jobs: int = 1) -> str:
    """Run the missing cases of a study, write <out>/<name>.{json,md,svg} after each run, and return the table.

    Raises ArtifactError for a finished run that was made with other settings than the file has now.
    """
    study, cases = read_study(file)
    home = runs or Path("runs/studies") / study.name
    run_case(cases[0], home, 1)  # Run alone, because it makes the teacher that all runs share.
    rows: list[StudyRow] = []
    conditions: dict[str, Any] = {}
    with ThreadPoolExecutor(jobs) as pool:
        finished = [(case, pool.submit(run_case, case, home, jobs)) for case in cases]
        for case, run in track(finished, len(finished), study.name, "run"):
            try:
                rows.append(row_of(case, run.result()))
            except ClipressError:
                pool.shutdown(cancel_futures=True)
                raise
            conditions = _conditions(file, home / case.name)
            _write(study, rows, conditions, [], out)
    if jobs > 1:  # Jobs disturb each other, so latencies are measured again, one run at a time.
        for case in track(cases, len(cases), "latency", "run"):
            time_alone(home / case.name)
        rows = [row_of(case, home / case.name) for case in cases]
    cost = [] if study.step_cost is None else step_costs(study, file, home)
    return _write(study, rows, conditions, cost, out)


def _write(study: Study, rows: list[StudyRow], conditions: dict[str, Any], cost: list[TimedSteps], out: Path) -> str:
    content = {
        "schema_version": SCHEMA_VERSION,
        "study": study.name,
        "conditions": conditions,
        "rows": [row.model_dump(mode="json", exclude_unset=True) for row in rows],
        "step_cost": [row.model_dump(mode="json") for row in cost],
    }
    text = markdown(study, rows, conditions, cost)
    write_text_whole(out / f"{study.name}.json", json.dumps(content, indent=1) + "\n")
    write_text_whole(out / f"{study.name}.md", text)
    if study.ratios:
        write_text_whole(out / f"{study.name}.svg", draw_chart(study, rows))
    return text


def run_case(case: Case, home: Path, jobs: int) -> Path:
    """Run a case unless it is finished; return its folder."""
    folder = home / case.name
    recipe = folder / "recipe.yaml"
    if recipe.is_file() and read_recipe(recipe) != checked(Recipe, case.recipe, case.name):
        raise ArtifactError(
            f"{folder} was made with other settings than the study has now. Remove it, or choose another folder with --runs."
        )
    if not (folder / "bench" / RESULTS).is_file():
        _clipress("run", case.recipe, folder, jobs)
    return folder


def time_alone(folder: Path) -> None:
    """Measure the latencies of a run again while nothing else runs, unless that is done, into <run>/bench/alone."""
    target = folder / "bench" / ALONE
    if not (target / RESULTS).is_file():
        with _results_of(folder) as results:
            stages = list(dict.fromkeys(row.artifact for row in results.rows))
            largest = max(timing.batch for timing in results.rows[0].latency)
        subjects = [Subject(stage, folder / stage, folder / "export" / stage) for stage in stages]
        settings = BenchSettings(batch=(largest,), threads=results.conditions.threads, duration=LONG, warm_up=LONG // 2)
        write_results(bench(subjects, [], settings, target, about={}), target)


def _clipress(verb: str, recipe: Mapping[str, Any], folder: Path, jobs: int = 1) -> None:
    """Run a command on a recipe in its own process, with its share of the cores."""
    path = folder.with_suffix(".yaml")
    write_text_whole(path, yaml.safe_dump(dict(recipe), sort_keys=False))
    command = [sys.executable, "-m", "clipress", verb, str(path), "--out", str(folder)]
    threads = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // jobs, 1))} if jobs > 1 else {}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
    if done.returncode:
        raise ClipressError(f"{folder.name} failed; the end of its output: {done.stderr.strip()[-600:]}")


@contextmanager
def _results_of(run: Path) -> Iterator[Results]:
    """Read a finished run's results. Raises ArtifactError if figures are missing."""
    try:
        yield read_results(run / "bench" / RESULTS)
    except (ArtifactError, LookupError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
        raise ArtifactError(
            f"{run} holds no readable results ({type(error).__name__}: {error}). Remove its bench/results.json and run "
            "the study again."
        ) from None


def _conditions(file: Path, run: Path) -> dict[str, Any]:
    with _results_of(run) as results:
        known = results.conditions
        return {
            "command": f"clipress study {file}",
            "date": known.date,
            "processor": known.processor,
            "isa": " ".join(known.isa),
            "cores": known.cores,
            "threads": known.threads,
            "clipress": known.clipress,
            "torch": known.torch,
            "onnxruntime": known.onnxruntime,
        }


def step_costs(study: Study, file: Path, home: Path) -> list[TimedSteps]:
    """Time the steps of short trainings, round by round, so that a slow minute affects every case."""
    spec = study.step_cost
    base = read_recipe(file.parent / study.recipe).model_dump(exclude_none=True)
    base["data"] = base["data"] | {"val": [], "test": []}
    seconds: dict[str, list[float]] = {name: [] for name in spec.cases}
    memory: dict[str, int] = {}
    turns = list(product(range(spec.rounds), spec.cases.items()))
    for turn, (name, sections) in track(turns, len(turns), "step cost", "run"):
        recipe = checked(Recipe, merge_sections(base | {"name": "cost"}, sections), name).model_dump()
        median_seconds, peak = _timed_steps(recipe, home / f"cost-{name.replace(' ', '-')}-{turn}")
        seconds[name].append(median_seconds)
        memory[name] = max(memory.get(name, 0), peak)
    return [
        TimedSteps(
            case=name,
            seconds=[round(value, 4) for value in values],
            ratios=[round(a / b, 4) for a, b in zip(values, seconds[spec.reference], strict=True)],
            peak_memory_mb=memory[name],
        )
        for name, values in seconds.items()
    ]


def _timed_steps(recipe: Mapping[str, Any], folder: Path) -> tuple[float, int]:
    """Train unless finished. Returns the median seconds of a step, and the peak memory in MB."""
    if not (folder / "done").is_file():
        _clipress("compress", recipe, folder)
        write_text_whole(folder / "done", "")
    log = next((folder / "logs").glob("*.jsonl"))
    times = [json.loads(line)["seconds"] for line in log.read_text(encoding="utf-8").splitlines()]
    steps = [after - before for before, after in pairwise(times)]
    warm = steps[len(steps) // 5 :]  # The first steps warm up.
    return median(warm), read_header(folder / log.stem)["lineage"][-1]["peak_memory_mb"]


def row_of(case: Case, run: Path) -> StudyRow:
    """Read what a finished run measured: accuracy, cost, latency against the dense teacher, and the effect of pruning.

    Only the rows of the first backend count.
    """
    with _results_of(run) as results:
        own = [row for row in results.rows if row.backend == results.rows[0].backend]
        alone = run / "bench" / ALONE / RESULTS
        if alone.is_file():
            timed = {row.artifact: row.latency for row in read_results(alone).rows}
            own = [row.model_copy(update={"latency": timed[row.artifact]}) for row in own]
        teacher, first, last = own[0], own[1], own[-1]
        record = {record.stage: record for record in last.lineage}[first.artifact]
        made = record.model_extra
        more = _pruned(first, made["details"]) if record.kind == "prune" else {}
        if last.precision == "int8":
            more |= {"int8": last.accuracy, "int8_latency_of_dense": _of_dense(last, teacher)}
            last = own[-2]
        return StudyRow(
            method=case.method,
            ratio=case.ratio,
            seed=case.seed,
            dense=teacher.accuracy,
            final=last.accuracy,
            macs=last.macs,
            dense_macs=teacher.macs,
            latency_ms=round(_milliseconds(last), 4),
            latency_of_dense=_of_dense(last, teacher),
            date=results.conditions.date,
            peak_memory_mb=made["peak_memory_mb"],
            **more,
        )


def _pruned(row: Row, details: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "slimmed": row.accuracy,
        "block_params_kept": row.block_params_kept,
        "search_seconds_per_step": round(details["seconds"] / details["steps"], 4) if details["steps"] else None,
        "shapes": details["shapes"],
    }


def _of_dense(row: Row, dense: Row) -> float:
    return round(_milliseconds(row) / _milliseconds(dense), 4)


def _milliseconds(row: Row) -> float:
    """Return the medians of all graphs at the largest batch, added."""
    largest = max(timing.batch for timing in row.latency)
    return sum(timing.median_ms for timing in row.latency if timing.batch == largest)
