"""Accuracy through a runner: the metrics that training uses, measured on what is shipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from clipress.bench.runners import Runner
from clipress.data.eval_sets import EvalSet
from clipress.metrics.outcomes import Outcomes, write_outcomes
from clipress.storage import write_whole
from clipress.tasks import evaluated


def accuracy(runner: Runner, sets: Sequence[EvalSet]) -> dict[str, Outcomes]:
    """Return `{"<set>/<metric>": outcomes}`, with the model's own preprocessing and tokenizer."""
    model = runner.model
    runs = {graph: runner.run(graph) for graph in model.graphs}
    return evaluated(model.task, runs, sets, model.preprocess, model.tokenize())


def write_items(stages: Mapping[str, Mapping[str, Outcomes]], folder: Path) -> None:
    """Write each row's outcomes, item by item, as `<folder>/<name>.npz`; older contents of the folder are replaced."""

    def fill(aside: Path) -> None:
        for stage, items in stages.items():
            write_outcomes(items, aside / f"{stage}.npz")

    write_whole(folder, fill)
