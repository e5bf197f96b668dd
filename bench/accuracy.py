"""Accuracy through a runner: the same metrics training uses, on what will really be shipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from clipress.bench.runners import Runner
from clipress.data.eval_sets import EvalSet
from clipress.data.tokens import tokenizer_from_spec
from clipress.metrics.evaluate import evaluate_items
from clipress.metrics.outcomes import Outcomes, write_outcomes
from clipress.storage import write_whole


def accuracy(runner: Runner, sets: Sequence[EvalSet]) -> dict[str, Outcomes]:
    """Return `{"<set>/<metric>": outcomes}` with the preprocessing and tokenizer the export names."""
    tokenize = tokenizer_from_spec(runner.exported.tokenizer.model_dump())
    return evaluate_items(runner.encode("image"), runner.encode("text"), sets, runner.exported.preprocess, tokenize)


def write_items(stages: Mapping[str, Mapping[str, Outcomes]], folder: Path) -> None:
    """Write the outcomes of every stage, item by item, as `<folder>/<stage>.npz`; what the folder held is replaced."""

    def fill(aside: Path) -> None:
        for stage, items in stages.items():
            write_outcomes(items, aside / f"{stage}.npz")

    write_whole(folder, fill)
