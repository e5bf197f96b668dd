"""`clipress auto`: the smallest model that holds a line, found without training, or with recovery where that is allowed.

The budget is bisected. Heads are rotated once; every try scores, cuts and refits a copy (`prune: {steps: 0}`), calibrates its
INT8 form, exports both and measures both on the validation data, in turns with the uncut model: a machine's own speed drifts
by more than two budgets differ, so latencies are compared at the uncut model's usual pace, its median over all tries. What was
found becomes an ordinary recipe, which is then run as any other, and measured beside the uncut model on the test data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from clipress.artifact import HEADER, save_artifact
from clipress.bench.results import Row
from clipress.bench.run import Subject, bench
from clipress.compress import distill, quantize
from clipress.compress.context import Context
from clipress.compress.fabric import start_fabric
from clipress.compress.pipeline import load_teacher
from clipress.compress.prune import search
from clipress.data.eval_sets import EvalSet, evalsets
from clipress.errors import ArtifactError, RecipeError
from clipress.export.to_onnx import onnx_from_artifact
from clipress.metrics.outcomes import Outcomes, paired_error, percent, read_outcomes
from clipress.models.load import Model, artifact_from_model
from clipress.progress import Say
from clipress.recipe import RECIPE, Recipe, checked, mapping_from
from clipress.tasks import task_named
from clipress.workflow.outcome import Run
from clipress.workflow.plan import Plan, plan_from
from clipress.workflow.recipes import find_recipe
from clipress.workflow.run import run_recipe
from clipress.workflow.serve import ServeRequest, serve_run
from clipress.workflow.targets import Pace, Target, at_pace, pace_of, worst

CLOSE = 0.97  # A model that uses this much of what its target allows is close enough.
SECTIONS = ("task", "data", "runtime", "export", "bench", "serve")
PRECISION = 0.03  # Budgets that are as near as this count as equal.
UNCUT = "uncut"  # its name in tables and folders
RECOVERY = ("contrastive", "affinity", "feature", "interactive")


@dataclass(frozen=True)
class AutoRequest:
    """What `clipress auto` looks for, and what it may spend."""

    teacher: Mapping[str, Any]
    """The `teacher` section."""
    sections: Mapping[str, Any]
    """A recipe's other sections: `data`, and those of `task`, `runtime`, `export`, `bench` and `serve` that are not the default."""
    out: Path
    targets: tuple[Target, ...] = ()
    max_accuracy_drop: float | None = None
    """Points of the mean over the task's figures, such as R@1 and top-1."""
    steps: int = 0
    """Steps of recovery, with the uncut model as the teacher."""
    lr: float | None = None
    """Of recovery."""
    batch_size: int = 64
    bench: Mapping[str, Any] = field(default_factory=lambda: {"batch": [1], "ids": []})
    """Settings that replace those of `bench`."""
    tries: int = 8
    smallest: float = 0.0625
    """Fraction of the blocks below which nothing is tried."""
    int8: bool = True
    vocabulary: bool = False
    """Keep only the tokens of the training texts."""

    @property
    def task(self) -> str:
        return self.sections.get("task", "clip")


@dataclass(frozen=True)
class Candidate:
    """A measured model."""

    kept: float
    """Fraction of the blocks; 1: uncut."""
    steps: int
    """Steps of recovery."""
    row: Row
    pace: Pace
    """Of the uncut model, in the same turns."""
    drop: float
    """Points lost against the uncut model, on the validation data."""
    error: float
    """Standard error of that, on the same items."""

    @property
    def int8(self) -> bool:
        return self.row.precision == "int8"


def auto(request: AutoRequest, say: Say) -> Run:
    """Find the model, and run its recipe in `request.out`.

    Raises ArtifactError, with the nearest model, if none holds the line.
    """
    if not request.targets and request.max_accuracy_drop is None:
        raise RecipeError("auto: expected a line to hold. Set --target, --max-accuracy-drop or both.")
    if (request.out / RECIPE).exists():
        raise RecipeError(f"auto: {request.out} holds a run already. Remove it, or choose another folder with --out.")
    with TemporaryDirectory() as folder:
        tries = _Search(request, Path(folder), say)
        found, usual = tries.find(), tries.usual_pace()
    say(f"Found: {_described(found, request)}. Its recipe runs in {request.out}.")
    done = run_recipe(_recipe(request, found), request.out, resume=True, say=say)
    wanted = done.artifacts[-1]
    if done.served != wanted:  # `bench` judges by speed alone, and the line may be about something else.
        serve_run(request.out, ServeRequest(wanted), say)
    row, pace = next(row for row in done.results.rows if row.artifact == wanted), pace_of(done.results.rows[0])
    for target in request.targets:
        say(
            f"{target.text}: {target.shown(row)}, measured again beside the uncut model.{_drift(target, row, pace, usual)}"
        )
    return replace(done, served=wanted)


class _Search:
    """The tries, and what they share."""

    def __init__(self, request: AutoRequest, folder: Path, say: Say) -> None:
        self.request, self.folder, self.say = request, folder, say
        self.plan: Plan = plan_from(_recipe(request, None))
        if not (self.plan.data.val or self.plan.data.test):
            raise RecipeError("auto: expected data.val, on which models are compared, found none. Add it to the data.")
        self.sets: list[EvalSet] = evalsets(self.plan.data.val or self.plan.data.test)
        self.context = Context(start_fabric(self.plan.runtime), self.plan.data, 0)
        self.dense = load_teacher(self.plan.teachers[0], request.task, say).model
        self.start, self.rotated = self._shared()
        self.uncut = self._exported(UNCUT, self.dense)
        self.reference: dict[str, Outcomes] = {}
        self._tried: list[Candidate] = []

    def _shared(self) -> tuple[Model, Model]:
        """Return the uncut model with the tokens that it keeps, and the same with its heads turned, for all tries."""
        context = replace(self.context, title="auto")
        start = self.dense
        if self.request.vocabulary:
            start, _ = search.run(checked(search.Prune, {"vocabulary": {}}, "prune"), self.dense.copy(), context)
        rotated, settings = start.copy(), checked(search.Prune, _prune_settings(self.request, 0.5), "prune")
        rotated.module.to(self.context.fabric.device)
        search.rotate_heads(settings, rotated, context)
        return start, rotated

    @property
    def candidates(self) -> list[Candidate]:
        """All that was tried, with latencies at the uncut model's usual pace."""
        usual = self.usual_pace()
        return [replace(one, row=at_pace(one.row, one.pace, usual)) for one in self._tried]

    def usual_pace(self) -> Pace:
        """Return the median over all tries of the uncut model's latency."""
        return {case: float(np.median([one.pace[case] for one in self._tried])) for case in self._tried[0].pace}

    def find(self) -> Candidate:
        """Return the best candidate. Raises ArtifactError if none holds the line."""
        request = self.request
        settings = checked(search.Prune, _prune_settings(request, 0.5), "prune")
        smallest = max(request.smallest, 1.001 * search.smallest_budget(settings, self.start))
        uncut = self.try_budget(1.0)
        if request.targets:
            if not any(map(self._meets, uncut)) and any(map(self._meets, self.try_budget(smallest))):
                self._bisect(self._meets, smallest, 1.0)
            cut = [one.kept for one in self.candidates if one.kept < 1 and self._meets(one)]
            if request.steps and cut:
                self.try_budget(max(cut), request.steps)
            return self._choose()
        if not any(map(self._holds, uncut)):  # Texts of the validation data may need tokens that were removed.
            return self._choose()
        for steps in dict.fromkeys((0, request.steps)):
            if not any(map(self._holds, self.try_budget(smallest, steps))):
                self._bisect(self._holds, min(one.kept for one in self.candidates if self._holds(one)), smallest, steps)
        return self._choose()

    def _bisect(self, good: Callable[[Candidate], bool], best: float, other: float, steps: int = 0) -> None:
        """Move the best budget known to be good towards another one that is not."""
        for _ in range(self.request.tries):
            if abs(other - best) < PRECISION * max(other, best) or self._is_close(best):
                return
            middle = math.sqrt(best * other)
            if any(map(good, self.try_budget(middle, steps))):
                best = middle
            else:
                other = middle

    def _is_close(self, kept: float) -> bool:
        own = [one for one in self.candidates if one.kept == kept and self._meets(one)]
        return bool(self.request.targets) and any(worst(self.request.targets, one.row) >= CLOSE for one in own)

    def try_budget(self, kept: float, steps: int = 0) -> list[Candidate]:
        """Cut, export and measure at one budget. Returns its candidates: fp32, and INT8 if that is allowed."""
        number = len({(one.kept, one.steps) for one in self._tried}) + 1
        title = f"try {number}"
        made = {"fp32": self._cut(kept, steps, title)}
        if self.request.int8:
            settings = checked(quantize.Quantize, _int8(self.request), "quantize")
            context = replace(self.context, seed=(kept < 1) + bool(steps), title=title)
            made["int8"] = quantize.run(settings, made["fp32"].copy(), context)[0]
        pace, rows, outcomes = self._measure(made)
        self._tried += [Candidate(kept, steps, rows[form], pace, *self._drop(outcomes[form])) for form in made]
        new = self.candidates[-len(made) :]
        for one in new:
            self.say(f"{title}: {_described(one, self.request)}: {self._verdict(one)}")
        return new

    def _cut(self, kept: float, steps: int, title: str) -> Model:
        if kept == 1.0:
            return self.start
        settings = checked(search.Prune, {**_prune_settings(self.request, kept), "rotate": False}, "prune")
        context = replace(self.context, title=title)
        model, _ = search.run(settings, self.rotated.copy(), context)
        if steps:
            context = replace(context, seed=1, teachers=(self.dense,))
            model, _ = distill.run(checked(distill.Distill, _recovery(self.request), "distill"), model, context)
        return model

    def _measure(self, models: Mapping[str, Model]) -> tuple[Pace, dict[str, Row], dict[str, dict[str, Outcomes]]]:
        """Export models and measure them in turns with the uncut one, which is exported once.

        Returns the uncut model's pace, and a row and the outcome of every item per model.
        """
        names = {form: UNCUT if model is self.dense else form for form, model in models.items()}
        own = [self._exported(form, models[form]) for form in names if names[form] != UNCUT]
        subjects = [replace(self.uncut, has_accuracy=not self.reference), *own]
        results = bench(subjects, self.sets, self.plan.bench, self.folder / "bench", about={})
        rows, items = {row.stage: row for row in results.rows}, self.folder / "bench" / "items"
        found = {one.name: read_outcomes(items / f"{one.name}.npz") for one in subjects if one.has_accuracy}
        self.reference = self.reference or found[UNCUT]
        found[UNCUT] = self.reference
        return pace_of(rows[UNCUT]), *({form: of[name] for form, name in names.items()} for of in (rows, found))

    def _exported(self, form: str, model: Model) -> Subject:
        record = {"stage": form, "kind": "quantize" if form == "int8" else "prune", "hash": form}
        artifact, export = self.folder / form, self.folder / "export" / form
        save_artifact(artifact_from_model(model, (record,), {}), artifact)
        training = partial(evalsets, self.plan.data.train)
        onnx_from_artifact(artifact, export, self.plan.export.onnx, self.sets, training)
        return Subject(form, artifact, export)

    def _drop(self, outcomes: Mapping[str, Outcomes]) -> tuple[float, float]:
        """Return the points lost against the uncut model, averaged over the task's figures, and their standard error."""
        figures = [key for key in outcomes if key.endswith(task_named(self.request.task).figures)]
        pairs = [(self.reference[key], outcomes[key]) for key in figures]
        errors = [paired_error(before, after) for before, after in pairs]
        return float(np.mean([percent(before) - percent(after) for before, after in pairs])), float(np.mean(errors))

    def _meets(self, one: Candidate) -> bool:
        return worst(self.request.targets, one.row) <= 1.0

    def _holds(self, one: Candidate) -> bool:
        allowed = self.request.max_accuracy_drop
        return allowed is None or one.drop + one.error <= allowed

    def _verdict(self, one: Candidate) -> str:
        failed = [] if self._meets(one) else ["over the target"]
        failed += [] if self._holds(one) else ["may lose too much"]
        return " and ".join(failed) or "holds"

    def _choose(self) -> Candidate:
        """Return the most accurate candidate for a target, or the smallest file for an accuracy."""
        meeting = [one for one in self.candidates if self._meets(one)]
        holding = [one for one in meeting if self._holds(one)]
        if holding:
            accurate = bool(self.request.targets)
            return min(holding, key=lambda one: (one.drop if accurate else one.row.bytes, one.drop, one.row.bytes))
        if meeting:
            nearest, advice = min(meeting, key=lambda one: one.drop), "Allow a larger drop, or recovery with --steps."
        else:
            nearest = min(self.candidates, key=lambda one: worst(self.request.targets, one.row))
            advice = "Relax the target, or start from a smaller model."
        found = _described(nearest, self.request)
        raise ArtifactError(f"auto: no model holds the line. The nearest one: {found}. {advice}")


def _drift(target: Target, row: Row, pace: Pace, usual: Pace) -> str:
    """Say what a latency is worth where the uncut model is slower or faster than it was during the search."""
    if target.figure != "latency":
        return ""
    times = [sum(ms for (tower, _), ms in one.items() if target.tower in (None, tower)) for one in (usual, pace)]
    steady = target.shown(at_pace(row, pace, usual))
    return f" The uncut model took {times[0]:.4g} ms during the search and {times[1]:.4g} ms now; at its earlier pace: {steady}."


def _described(one: Candidate, request: AutoRequest) -> str:
    targets = request.targets or (Target("", "size", 1.0), Target("", "latency", 1.0))
    kept = "uncut" if one.kept == 1.0 else f"{one.kept:.1%} of the blocks' {_unit(request)}"
    figures = ", ".join(target.shown(one.row) for target in targets)
    steps = f", {one.steps} steps of recovery" if one.steps else ""
    return f"{kept}{steps}, {one.row.precision}: {figures}, {one.drop:+.2f} ± {one.error:.2f} points lost"


def _unit(request: AutoRequest) -> str:
    return "params" if any(target.figure in ("size", "params") for target in request.targets) else "macs"


def _prune_settings(request: AutoRequest, kept: float) -> dict[str, Any]:
    return {
        "budget": {_unit(request): round(min(kept, 0.9999), 4)},
        "steps": 0,
        "batch_size": request.batch_size,
        "align": {"head_dim": 2, "ffn": 8},
        "min_keep": {"head_dim": 0.05, "ffn": 0.02},
    }


def _int8(request: AutoRequest) -> dict[str, Any]:
    return {"steps": 0, "calibrate": 512, "batch_size": request.batch_size}


def _recovery(request: AutoRequest) -> dict[str, Any]:
    rate = {} if request.lr is None else {"lr": request.lr}
    return {"losses": list(RECOVERY), "steps": request.steps, "batch_size": request.batch_size, **rate}


def _recipe(request: AutoRequest, found: Candidate | None) -> Recipe:
    """Return the recipe that makes a candidate from the teacher; None: nothing yet."""
    stages: list[dict[str, Any]] = []
    if found is not None:
        prune = _prune_settings(request, found.kept) if found.kept < 1 else {}
        prune |= {"vocabulary": {}} if request.vocabulary else {}
        stages += [{"prune": prune}] if prune else []
        stages += [{"distill": _recovery(request)}] if found.steps else []
        stages += [{"quantize": _int8(request)}] if found.int8 else []
    raw = {
        **request.sections,
        "name": request.out.name,
        "teacher": dict(request.teacher),
        "stages": stages,
        "bench": {**request.sections.get("bench", {}), **request.bench},
    }
    return checked(Recipe, raw, "")


def teacher_of(model: str) -> dict[str, Any]:
    """Return the `teacher` section of a model as typed: an artifact's folder, NAME:TAG or NAME:FILE.

    Raises RecipeError for anything else.
    """
    folder = Path(model)
    if (folder / HEADER).is_file():
        return {"artifact": str(folder)}
    if folder.is_dir():
        raise RecipeError(
            f"auto: {folder} is not an artifact, it has no {HEADER}. Name one, such as {folder}/teacher, or make one with: "
            "clipress import"
        )
    name, colon, checkpoint = model.partition(":")
    if not colon:
        raise RecipeError(
            f"auto: expected an artifact's folder, or an open_clip model as NAME:TAG or NAME:WEIGHTS-FILE; found '{model}'."
        )
    return {"model": name, "checkpoint": checkpoint}


def sections_of(name: str | Path) -> dict[str, Any]:
    """Return the sections of a recipe that do not say how a model is made, or the `data` section that a file holds alone."""
    raw = mapping_from(find_recipe(name), "Data")
    return {key: raw[key] for key in SECTIONS if key in raw} if "data" in raw else {"data": raw}
