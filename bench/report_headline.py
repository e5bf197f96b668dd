"""The headline of a report: what was gained, by the smallest model that keeps its accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from clipress.bench.compare import includes_no_difference
from clipress.bench.report_columns import number_column, speed_up_column
from clipress.bench.report_rows import Rows, metric_name, overall_key, timed
from clipress.bench.results import Case, Row
from clipress.tasks import task_named

KEPT = 0.97  # Fraction of the first row's accuracy that a model in the headline must keep.


def headline(rows: Rows, main: Case | None) -> str:
    """Return the headline as HTML: the smallest row that keeps its accuracy, against the first."""
    first, key = rows[0], overall_key(rows)
    name = f"<b>{escape(first.stage)}</b>"
    before = first.accuracy.get(key)
    if len(rows) > 1 and main and key is None:
        return _fastest(rows, main)
    if len(rows) == 1 or not before:
        return f"<p>{name}: there is nothing yet to compare it with.</p>"
    measured = [row for row in rows[1:] if row.accuracy.get(key) is not None]
    kept = [row for row in measured if row.accuracy[key] >= KEPT * before]
    if not kept:
        measure = escape(" ".join(metric_name(key)))
        return f"<p>No other model keeps {KEPT:.0%} of the accuracy of {name} ({measure}).</p>"
    best = min(kept, key=lambda row: (row.bytes, timed(row, main, "median_ms") or math.inf))
    return _gains(rows, best, main, key)


def _gains(rows: Rows, best: Row, main: Case | None, key: str) -> str:
    """Return how much smaller and faster a row is than the first, and what it costs in accuracy."""
    first = rows[0]
    before, after = first.accuracy[key], best.accuracy[key]
    gains = [_times(first.bytes, best.bytes, "smaller", "larger")]
    tiles = [
        ("size of the files", _pair(first.bytes / 1e6, best.bytes / 1e6), "MB"),
        (f"accuracy ({' '.join(metric_name(key))})", _pair(before, after, 1), task_named(first.task).figures_unit),
    ]
    slow, fast = (timed(row, main, "median_ms") for row in (first, best))
    if main and slow and fast:
        # the table's ratio: medians of different rounds say less
        ratio = speed_up_column(rows, main).values[list(rows).index(best)]
        same = includes_no_difference(*_interval(best, main))
        gains.insert(0, "<strong>no faster or slower</strong>" if same else _times(ratio, 1.0, "faster", "slower"))
        tiles.insert(0, (f"median latency, {main}", _pair(slow, fast), "ms"))
    points = round(after - before, 1)
    change = f"{'loses' if points < 0 else 'gains'} <strong>{abs(points)} points</strong> of accuracy"
    change = change if points else "is <strong>as accurate</strong>"
    shown = "".join(
        f"<div><dt>{escape(what)}</dt><dd>{old} <i>→</i> <strong>{new}</strong> {unit}</dd></div>"
        for what, (old, new), unit in tiles
    )
    return (
        f"<p><b>{escape(best.stage)}</b> is {' and '.join(gains)} than <b>{escape(first.stage)}</b>, and {change}.</p>"
        f"<dl>{shown}</dl>"
        f"<p>It is the smallest model that keeps at least {KEPT:.0%} of the first one's accuracy.</p>"
    )


def _fastest(rows: Rows, main: Case) -> str:
    """Return which row is the fastest, for results without accuracy."""
    ratios = speed_up_column(rows, main).values
    best = max(range(len(rows)), key=lambda i: ratios[i] or 0)
    name, first = (f"<b>{escape(rows[i].stage)}</b>" for i in (best, 0))
    if best == 0:
        return f"<p>No other model is faster than {first} ({main}).</p>"
    low, high = _interval(rows[best], main)
    if includes_no_difference(low, high):
        return (
            f"<p>No difference seen between {name} and {first} ({ratios[best]:.2f} times as fast, 95 %: {low:.2f} to "
            f"{high:.2f}), {main}.</p><p>Accuracy was not measured.</p>"
        )
    sure = f" (95 %: {low:.2f} to {high:.2f})" if low and high else ""
    return (
        f"<p>{name} is <strong>{ratios[best]:.2f} times as fast</strong> as {first}{sure}, {main}.</p>"
        "<p>Accuracy was not measured.</p>"
    )


def _interval(row: Row, case: Case) -> tuple[float | None, float | None]:
    return timed(row, case, "speed_up_low"), timed(row, case, "speed_up_high")


def _times(before: float, after: float, less: str, more: str) -> str:
    ratio, word = (before / after, less) if before >= after else (after / before, more)
    return f"<strong>{ratio:.1f} times {word}</strong>"


def _pair(before: float, after: float, decimals: int | None = None) -> Sequence[str]:
    return number_column("", "", [before, after], decimals).cells
