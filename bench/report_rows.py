"""Rows of a report: accuracies with their means, metrics in order and by name, cases."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean

from clipress.bench.results import UNREAD, Case, Latency, Results, Row
from clipress.data.bad_records import RECORDED
from clipress.tasks import task_named

Rows = Sequence[Row]

DIRECTIONS, MEAN_R1 = ("/text_r1", "/image_r1"), "/mean_r1"
NAMES = {"miou": "mIoU", "cider": "CIDEr", "bleu4": "BLEU-4", "meteor": "METEOR", "spice": "SPICE"}
"""Metrics whose names in tables are not those of their keys."""
MEAN = "mean"  # Of every set's head figure.


def heads_of(rows: Rows) -> tuple[str, ...]:
    """Return the endings of the metrics of which every set has one: those that decide for a task, R@1 as the mean of both directions."""
    every = dict.fromkeys(figure for row in rows for figure in task_named(row.task).figures)
    return *(figure for figure in every if figure not in DIRECTIONS), MEAN_R1


def with_means(rows: Rows) -> list[Row]:
    """Add the mean R@1 of each retrieval set, and the mean over all sets, to each row's accuracy.

    A row that lacks a set has no mean, since means over different sets cannot be compared.
    """
    scored = [row.model_copy(update={"accuracy": _with_mean_r1(row.accuracy)}) for row in rows]
    heads = [key for key in metric_keys(scored) if key.endswith(heads_of(scored))]
    for row in scored:
        found = [row.accuracy.get(key) for key in heads]
        if len(heads) > 1 and None not in found:
            row.accuracy[MEAN] = fmean(found)
    return scored


def _with_mean_r1(accuracy: dict[str, float]) -> dict[str, float]:
    sets = dict.fromkeys(key.rpartition("/")[0] for key in accuracy)
    pairs = {name: [accuracy.get(name + direction) for direction in DIRECTIONS] for name in sets}
    return accuracy | {name + MEAN_R1: fmean(pair) for name, pair in pairs.items() if None not in pair}


def metric_keys(rows: Rows) -> list[str]:
    """Return every metric's key: sets in the order of the results, the mean over sets last."""
    keys = dict.fromkeys(key for row in rows for key in row.accuracy)
    sets = list(dict.fromkeys(key.rpartition("/")[0] for key in keys))
    return sorted(keys, key=lambda key: (key == MEAN, sets.index(key.rpartition("/")[0]), *_rank(key)))


def _rank(key: str) -> tuple[int, str]:
    """R@1 before R@5 before R@10; image→text, text→image, mean."""
    metric = key.rpartition("/")[2]
    digits = re.search(r"\d+$", metric)
    direction = {"text_r": "0", "image_r": "1", "mean_r": "2"}.get(metric.rstrip("0123456789"), metric)
    return int(digits[0]) if digits else 0, direction


def metric_name(key: str) -> tuple[str, str]:
    """Return a metric's group and head in a table. text_r1 is a text found for an image: image→text."""
    group, _, metric = key.rpartition("/")
    if key == MEAN:
        return "overall", "mean"
    for start, name in (("text_r", "image→text"), ("image_r", "text→image"), ("mean_r", "mean")):
        if metric.startswith(start):
            return f"{group} R@{metric.removeprefix(start)}", name
    return group, NAMES.get(metric, metric.replace("top", "top-").replace("_", " "))


def overall_key(rows: Rows) -> str | None:
    """Return the key of the one figure that a row is judged by: the mean over sets, or the only set's own."""
    keys = metric_keys(rows)
    return MEAN if MEAN in keys else next((key for key in keys if key.endswith(heads_of(rows))), None)


def unread_line(results: Results) -> str | None:
    """Return how many records of evaluation sets and of stages could not be read, in a line; None if all could."""
    records = {
        (one.stage, one.hash): one.model_dump().get("details") or {} for row in results.rows for one in row.lineage
    }
    sets = {f"{name} (left out)": about.get(UNREAD) for name, about in results.conditions.data.items()}
    stages = {f"{stage} (replaced)": details.get(RECORDED) for (stage, _), details in records.items()}
    found = [f"{count} in {where}" for where, count in (sets | stages).items() if count]
    return f"Records that could not be read: {', '.join(found)}." if found else None


def cases_of(rows: Rows) -> list[Case]:
    """Return everything that was timed, the main graph of the first row's task first."""
    main = task_named(rows[0].task).main_graph
    return sorted({one.case for row in rows for one in row.latency}, key=lambda case: (case.graph != main, case))


def main_case(cases: Sequence[Case]) -> Case | None:
    """Return the main graph at its largest batch."""
    return max((case for case in cases if case.graph == cases[0].graph), default=None)


def timings(rows: Rows) -> list[Latency]:
    """Return the measurements of all rows."""
    return [timing for row in rows for timing in row.latency]


def timed(row: Row, case: Case | None, name: str) -> float | None:
    """Return one latency figure, None if it was not measured."""
    timing = row.timing(case)
    return None if timing is None else getattr(timing, name)


def throughput(row: Row, case: Case | None) -> float | None:
    """Return items per second."""
    queries = timed(row, case, "throughput_qps")
    return case.batch * queries if case and queries is not None else None
