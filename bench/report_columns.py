"""The columns of a report: figures are chosen, named and rounded here, for the terminal and the page alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from clipress.bench.report_rows import (
    DIRECTIONS,
    MEAN,
    Rows,
    cases_of,
    heads_of,
    metric_keys,
    metric_name,
    throughput,
    timed,
    timings,
)
from clipress.bench.results import Case, Row
from clipress.runtime.served import TEXT

ABSENT = "–"


@dataclass(frozen=True)
class Column:
    """One column of a table. `values` are for sorting, `cells` for reading; a value of None was not measured."""

    group: str
    head: str
    values: Sequence[Any]
    cells: Sequence[str]
    key: str = ""
    """The metric of an accuracy column."""
    parts: Sequence[float | None] = ()
    """Shares of a whole, 0 to 1, drawn as bars behind the cells."""
    titles: Sequence[str] = ()
    """Tooltips of the cells."""

    @property
    def name(self) -> str:
        return f"{self.group} {self.head}".strip()

    @property
    def is_words(self) -> bool:
        return any(isinstance(value, str) for value in self.values)


def word_column(head: str, values: Iterable[Any]) -> Column:
    """Return a column of text."""
    values = [None if value is None else str(value) for value in values]
    return Column("", head, values, [ABSENT if value is None else value for value in values])


def number_column(
    group: str, head: str, values: Sequence[float | None], decimals: int | None = None, key: str = ""
) -> Column:
    """Return a column of numbers, by default with as many decimals as give the smallest one three digits."""
    decimals = decimals_for(values) if decimals is None else decimals
    return Column(group, head, values, [ABSENT if value is None else f"{value:.{decimals}f}" for value in values], key)


def decimals_for(values: Sequence[float | None]) -> int:
    """Return how many decimals give the smallest number three digits."""
    least = min((abs(value) for value in values if value), default=1)
    return max(0, 2 - math.floor(math.log10(least)))


def grouped(columns: Sequence[Column]) -> list[tuple[str, list[Column]]]:
    """Return neighbouring columns of one group together."""
    return [(group, list(members)) for group, members in groupby(columns, key=lambda column: column.group)]


def model_columns(rows: Rows) -> list[Column]:
    """Return what does not depend on a graph or batch: what each row is, what it costs, how good it is."""

    def scaled(name: str, by: float) -> list[float | None]:
        values = [getattr(row, name) for row in rows]
        return [None if value is None else value * by for value in values]

    columns = [word_column("stage", [row.stage for row in rows])]
    if len({row.backend for row in rows}) > 1:
        columns.append(word_column("backend", [row.backend for row in rows]))
    columns += [
        word_column("precision", [row.precision for row in rows]),
        number_column("params (M)", "all", scaled("params", 1e-6)),
        number_column("params (M)", "no emb.", scaled("params_without_embeddings", 1e-6)),
        number_column("blocks", "kept %", scaled("block_params_kept", 100), 1),
        number_column("MACs", "(M)", scaled("macs", 1e-6)),
        number_column("size", "(MB)", scaled("bytes", 1e-6)),
    ]
    for key in metric_keys(rows):
        if key == MEAN or key.endswith((*DIRECTIONS, *heads_of(rows))):
            columns.append(number_column(*metric_name(key), [row.accuracy.get(key) for row in rows], 1, key))
    return columns


def speed_up_column(rows: Rows, case: Case, group: str = "") -> Column:
    """Return the ratios paired by rounds, or those of the medians if the results have no others."""
    medians = [timed(row, case, "median_ms") for row in rows]
    paired = [timed(row, case, "speed_up") for row in rows]
    plain = [medians[0] / own if medians[0] and own else None for own in medians]
    values = [p if q is None else q for p, q in zip(plain, paired, strict=True)]
    return number_column(group, "speed-up", values, 2)


def interval_columns(rows: Rows, case: Case, group: str = "") -> list[Column]:
    """Return the 95 % intervals of the speed-ups; no column if there are none."""
    lows, highs = ([timed(row, case, f"speed_up_{end}") for row in rows] for end in ("low", "high"))
    if not any(lows):
        return []
    cells = [ABSENT if low is None else f"{low:.2f}–{high:.2f}" for low, high in zip(lows, highs, strict=True)]
    return [Column(group, "95 %", lows, cells)]


def timing_columns(rows: Rows, case: Case | None) -> list[Column]:
    """Return the latency of one case, and its throughput in items."""
    if case is None:
        return []
    group = f"{case} (ms)"
    times = {name: [timed(row, case, f"{name}_ms") for row in rows] for name in ("median", "p90", "p95", "p99")}
    columns = [number_column(group, name, values, decimals_for(times["median"])) for name, values in times.items()]
    columns[1:1] = [speed_up_column(rows, case, group), *interval_columns(rows, case, group)]
    return [*columns, number_column(group, "items/s", [throughput(row, case) for row in rows], 0)]


def compared_columns(rows: Rows) -> list[Column]:
    """Return every case of every row against the first row."""
    every = _measurements(rows)

    def values(name: str) -> list[float | None]:
        return [timed(*where, name) for where in every]

    ends = zip(values("speed_up_low"), values("speed_up_high"), strict=True)
    return [
        word_column("tower", [case.graph for _, case in every]),
        number_column("", "batch", [case.batch for _, case in every], 0),
        *ids_column(every),
        word_column("stage", [row.stage for row, _ in every]),
        number_column("latency (ms)", "median", values("median_ms")),
        number_column("latency (ms)", "p99", values("p99_ms"), decimals_for(values("median_ms"))),
        number_column("latency (ms)", "cv %", values("cv_percent"), 1),
        number_column("", "speed-up", values("speed_up"), 3),
        word_column("95 %", [None if low is None else f"{low:.3f}-{high:.3f}" for low, high in ends]),
    ]


def latency_columns(rows: Rows) -> list[Column]:
    """Return every measurement of every row, in trtexec's terms; what no runner measured is left out."""
    every = _measurements(rows)

    def numbers(group: str, head: str, name: str, decimals: int) -> Column:
        return number_column(group, head, [timed(*where, name) for where in every], decimals)

    def is_measured(name: str) -> bool:
        return any(getattr(timing, name) is not None for timing in timings(rows))

    columns = [
        word_column("stage", [row.stage for row, _ in every]),
        word_column("tower", [case.graph for _, case in every]),
        number_column("", "batch", [case.batch for _, case in every], 0),
        *ids_column(every),
    ]
    for name in ("min", "max", "mean", "median", "p90", "p95", "p99"):
        columns.append(numbers("latency (ms)", name, f"{name}_ms", 3))
    if is_measured("cv_percent"):
        columns.append(numbers("latency (ms)", "cv %", "cv_percent", 1))
    if is_measured("enqueue_median_ms"):
        columns += [numbers("enqueue (ms)", name, f"enqueue_{name}_ms", 3) for name in ("mean", "median", "p99")]
    return [
        *columns,
        numbers("throughput", "queries/s", "throughput_qps", 0),
        number_column("throughput", "items/s", [throughput(*where) for where in every], 0),
        numbers("", "queries", "iterations", 0),
    ]


def ids_column(every: Sequence[tuple[Row, Case]]) -> list[Column]:
    """Return how long the texts of each measurement are; nothing for models without texts."""
    ids = [case.ids or (row.text_ids if case.graph == TEXT else None) for row, case in every]
    return [number_column("", "ids", ids, 0)] if any(ids) else []


def _measurements(rows: Rows) -> list[tuple[Row, Case]]:
    return [(row, case) for case in cases_of(rows) for row in rows if row.timing(case) is not None]


def accuracy_columns(rows: Rows) -> list[Column]:
    """Return every metric, with its standard error if there is one."""
    columns = [word_column("stage", [row.stage for row in rows])]
    for key in metric_keys(rows):
        column = number_column(*metric_name(key), [row.accuracy.get(key) for row in rows], 1, key)
        errors = standard_errors(rows, key)
        cells = [f"{cell} ± {e:.1f}" if e is not None else cell for cell, e in zip(column.cells, errors, strict=True)]
        columns.append(replace(column, cells=cells))
    return columns


def standard_errors(rows: Rows, key: str) -> list[float | None]:
    """Return each row's standard error of a metric."""
    return [row.accuracy_se.get(key) for row in rows]
