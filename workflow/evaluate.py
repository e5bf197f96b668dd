"""Evaluate artifacts in torch, without exporting them, and compare two of them item by item."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from clipress.data.eval_sets import EvalSet, evalsets, on_readable, probe_sets
from clipress.data.sources import fingerprint
from clipress.errors import RecipeError
from clipress.metrics.evaluate import encode_all
from clipress.metrics.outcomes import Outcomes, paired_difference, percent, standard_error
from clipress.metrics.probe import linear_probe
from clipress.progress import Say
from clipress.storage import write_text_whole
from clipress.tasks import evaluate_model, model_from_artifact
from clipress.tasks.clip import encoders
from clipress.version import __version__
from clipress.workflow.kept import choose_artifact
from clipress.workflow.plan import read_plan

Split = Literal["val", "test"]


@dataclass(frozen=True)
class Metric:
    """One metric of an artifact."""

    percent: float
    standard_error: float
    items: int
    tied: int
    difference: float | None = None
    """Percentage points above the other artifact, if two are compared."""
    interval: tuple[float, float] | None = None
    """95 % interval of the difference, from a paired bootstrap."""

    def record(self) -> dict[str, Any]:
        """Return the metric as it is written to the file."""
        found = {"percent": self.percent, "se": self.standard_error, "items": self.items, "tied": self.tied}
        if self.interval is not None:
            found |= {"difference": self.difference, "interval": list(self.interval)}
        return found


@dataclass(frozen=True)
class Evaluation:
    """An artifact's metrics, compared with another artifact's if one was named."""

    stage: str
    compare: str | None
    split: Split
    data: str
    """Fingerprint of the evaluation data."""
    metrics: dict[str, Metric]
    unread: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By set, why records could not be read; they are left out of the metrics."""


def evaluate_run(
    run: Path,
    stage: str | None = None,
    compare: str | None = None,
    split: Split = "test",
    linear_probe: bool = False,
    say: Say = lambda line: None,
) -> Evaluation:
    """Evaluate an artifact of a run, by default the one that bench kept, and its difference to the artifact `compare`."""
    plan = read_plan(run)
    specs = getattr(plan.data, split)
    if not specs:
        raise RecipeError(f"The recipe of {run} has no '{split}' data to evaluate on.")
    name = choose_artifact(run, plan, stage, say, "Evaluating").stage
    other = plan.artifact(compare, "--compare") if compare else None
    sets, probes = evalsets(specs), probe_sets(specs, plan.data.train) if linear_probe else []
    found = evaluate_artifact(run / name, sets, probes)
    others = evaluate_artifact(run / other, sets, probes) if other else {}
    metrics = {key: _metric(outcomes, others.get(key)) for key, outcomes in found.items()}
    unread = {one.name: one.unread for one in sets if one.unread}
    return Evaluation(name, other, split, fingerprint(specs), metrics, unread)


def evaluate_artifact(
    artifact: Path, sets: list[EvalSet], probes: list[tuple[EvalSet, EvalSet]]
) -> dict[str, Outcomes]:
    """Evaluate an artifact in torch; `probes` are training and test sets for a linear probe."""
    model = model_from_artifact(artifact)
    encode_image = encoders(model, f"Linear probe of {artifact}")[0] if probes else None
    items = evaluate_model(model, sets)
    for train, test in probes:
        features = on_readable(
            lambda parts: [encode_all(encode_image, part.pixel_batches(model.preprocess)) for part in parts],
            (train, test),
        )
        found = linear_probe(features[0], train.labels(), features[1], test.labels())
        items |= {f"{test.name}/{metric}": outcomes for metric, outcomes in found.items()}
    return items


def _metric(outcomes: Outcomes, others: Outcomes | None) -> Metric:
    own = Metric(percent(outcomes), standard_error(outcomes), len(outcomes.values), outcomes.tied)
    if others is None:
        return own
    found = paired_difference(outcomes, others)
    return Metric(own.percent, own.standard_error, own.items, own.tied, found.value, (found.low, found.high))


def write_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Write an evaluation as JSON."""
    conditions = {"clipress": __version__, "backend": "torch", "split": evaluation.split, "data": evaluation.data}
    content = {
        "schema_version": 1,
        "stage": evaluation.stage,
        "compare": evaluation.compare,
        "conditions": conditions,
        "unread": {name: len(records) for name, records in evaluation.unread.items()},
        "metrics": {key: metric.record() for key, metric in evaluation.metrics.items()},
    }
    write_text_whole(path, json.dumps(content, indent=1) + "\n")
