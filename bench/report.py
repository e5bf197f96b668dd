"""results.json -> one table for the terminal, one page for the browser.

Figures are chosen, named and rounded here and nowhere else; the page's script only draws and sorts what it is given.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

from clipress.storage import write_text_whole

Rows: TypeAlias = list[dict[str, Any]]
Case: TypeAlias = tuple[str, int]  # a tower and a batch

TEMPLATE = Path(__file__).with_name("report.html")
WIDTH = 118  # columns of a terminal
KEPT = 0.97  # of the first row's accuracy: what a smaller model must keep to be named in the headline
ABSENT = "–"
HEADS = ("/top1", "/mean_r1")  # the one figure of a zero-shot set, and of a retrieval set
DIRECTIONS = ("/text_r1", "/image_r1")
UNSTABLE = 2.5  # per cent of variation above which trtexec warns
BOUND = 0.8  # of the latency: enqueueing that takes longer is what limits it, says trtexec
MEAN = "mean"  # of them, over all sets


@dataclass(frozen=True)
class Column:
    """One column of a table. `values` sort it, `cells` are read; a value of None was not measured."""

    group: str
    head: str
    values: Sequence[Any]
    cells: Sequence[str]
    key: str = ""
    """Of an accuracy column: the metric it shows."""
    parts: Sequence[float | None] = ()
    """Shares of a whole, 0 to 1, drawn as bars behind the cells."""
    titles: Sequence[str] = ()
    """What each cell says under the pointer."""

    @property
    def name(self) -> str:
        return f"{self.group} {self.head}".strip()

    @property
    def is_words(self) -> bool:
        return any(isinstance(value, str) for value in self.values)


def pareto(points: Sequence[tuple[float, float] | None]) -> list[int]:
    """Return which `(cost, gain)` points no other point beats: none is as cheap and as good, and better in one of both.

    Equal points stay together; None is no point.
    """

    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a != b and a[0] <= b[0] and a[1] >= b[1]

    there = [(i, point) for i, point in enumerate(points) if point is not None]
    return [i for i, point in there if not any(beats(other, point) for _, other in there)]


def table(results: dict[str, Any]) -> str:
    """Return the rows as plain text of at most 118 columns, with what was measured on, and how, beneath."""
    rows = _scored(results["rows"])
    cases = _cases(rows)
    main = _main_case(cases)
    columns = [column for column in _columns(rows) if column.key != MEAN]
    notes = [_conditions_line(results), "R@1 (%): i->t a text found for an image, t->i an image found for a text."]
    if main:
        for case in dict.fromkeys([cases[0], main]):
            medians = [_timing(row, case, "median_ms") for row in rows]
            columns.append(_numbers(f"{case[0]} (ms)", f"batch {case[1]}", medians))
        columns.append(_speed_up(rows, main))
        notes.append(f"Latency: median; speed-up: against {rows[0]['stage']} at batch {main[1]}{_trust(rows, main)}.")
        notes += _warnings(rows)
    columns, left_out = _fitted([_for_terminal(column) for column in columns])
    if left_out:
        notes.append(f"Left out for width: {', '.join(left_out)}.")
    if not any(column.head == "i->t" for column in columns):
        del notes[1]
    notes += [one["text"] for kind in ("verdicts", "kept") for one in results.get(kind, ())]
    return "\n".join([*_lines(columns), "", *(line for note in notes for line in textwrap.wrap(note, WIDTH))])


def comparison(results: dict[str, Any]) -> str:
    """Return every tower and batch of every row against the first row, as plain text."""
    rows = results["rows"]
    columns = [_for_terminal(column) for column in _compared_columns(rows)]
    fewest = min(timing["rounds"] for row in rows for timing in row["latency"])
    note = f"speed-up: against {rows[0]['stage']}, {fewest} rounds or more; above 1 is faster."
    return "\n".join(["", *_lines(columns), "", note])


def report_page(results: dict[str, Any]) -> str:
    """Return one HTML page that needs no other file. Without JavaScript it is the tables, with it also the picture."""
    rows = _scored(results["rows"])
    main = _main_case(_cases(rows))
    view = _view(rows)
    front = view["metrics"][0]["fronts"][view["main"]] if view["metrics"] and main else []
    parts = {
        "title": escape(str(results["conditions"].get("recipe") or "results")),
        "subtitle": escape(_conditions_line(results)),
        "headline": _headline(rows, main),
        "verdicts": _verdicts(results.get("verdicts", ())),
        "data": _script_json(view),
        "table": _html_table([*_columns(rows), *_timing_columns(rows, main)], "main", front),
        "latency": _html_table(_latency_columns(rows), "latency"),
        "accuracy": _html_table(_accuracy_columns(rows), "accuracy"),
        "layers": _layers(rows),
        "profiles": _profiles(rows),
        "lineage": _lineage(rows),
        "conditions": _definitions(results["conditions"]),
    }
    # in one pass, so that nothing inserted is ever taken for a place to insert
    return re.sub("@@([a-z]+)@@", lambda place: parts[place[1]], TEMPLATE.read_text(encoding="utf-8"))


def write_report(results: dict[str, Any], folder: Path) -> Path:
    """Write report.html into a folder."""
    path = folder / "report.html"
    write_text_whole(path, report_page(results))
    return path


# What is in the results: metrics, towers, batches.


def _scored(rows: Rows) -> Rows:
    """Add to each row's accuracy the mean R@1 of each retrieval set, and the mean over all sets.

    A row that lacks a set has no mean: means over different sets do not compare.
    """
    scored = [row | {"accuracy": _with_mean_r1(row.get("accuracy", {}))} for row in rows]
    heads = [key for key in _keys(scored) if key.endswith(HEADS)]
    for row in scored:
        found = [row["accuracy"].get(key) for key in heads]
        if len(heads) > 1 and None not in found:
            row["accuracy"][MEAN] = fmean(found)
    return scored


def _with_mean_r1(accuracy: dict[str, float]) -> dict[str, float]:
    sets = dict.fromkeys(key.rpartition("/")[0] for key in accuracy)
    pairs = {name: [accuracy.get(name + direction) for direction in DIRECTIONS] for name in sets}
    return accuracy | {f"{name}/mean_r1": fmean(pair) for name, pair in pairs.items() if None not in pair}


def _keys(rows: Rows) -> list[str]:
    """Return every metric's key, the sets' in the order they are met, the mean over sets last."""
    keys = dict.fromkeys(key for row in rows for key in row["accuracy"])
    sets = list(dict.fromkeys(key.rpartition("/")[0] for key in keys))
    return sorted(keys, key=lambda key: (key == MEAN, sets.index(key.rpartition("/")[0]), *_rank(key)))


def _rank(key: str) -> tuple[int, str]:
    """R@1 before R@5 before R@10; image→text, text→image, mean."""
    metric = key.rpartition("/")[2]
    digits = re.search(r"\d+$", metric)
    direction = {"text_r": "0", "image_r": "1", "mean_r": "2"}.get(metric.rstrip("0123456789"), metric)
    return int(digits[0]) if digits else 0, direction


def _named(key: str) -> tuple[str, str]:
    """Return a metric's set and what people call it. text_r1 is a text found for an image: image→text."""
    group, _, metric = key.rpartition("/")
    if key == MEAN:
        return "overall", "mean"
    for start, name in (("text_r", "image→text"), ("image_r", "text→image"), ("mean_r", "mean")):
        if metric.startswith(start):
            return f"{group} R@{metric.removeprefix(start)}", name
    return group, metric.replace("top", "top-")


def _overall(rows: Rows) -> str | None:
    """Return the key of the one figure a row is judged by: the mean over sets, or the only set's own."""
    keys = _keys(rows)
    return MEAN if MEAN in keys else next((key for key in keys if key.endswith(HEADS)), None)


def _cases(rows: Rows) -> list[Case]:
    found = {(timing["tower"], timing["batch"]) for row in rows for timing in row.get("latency", ())}
    return sorted(found, key=lambda case: (case[0] != "image", case))


def _main_case(cases: Sequence[Case]) -> Case | None:
    """Return the image tower at its largest batch."""
    return max((case for case in cases if case[0] == cases[0][0]), default=None)


def _title(case: Case) -> str:
    return f"{case[0]} tower, batch {case[1]}"


def _timing(row: dict[str, Any], case: Case | None, name: str) -> float | None:
    found = (timing for timing in row.get("latency", ()) if (timing["tower"], timing["batch"]) == case)
    return next(found, {}).get(name)


def _has(rows: Rows, name: str) -> list[str]:
    """Return `[name]` if any measurement has it, else nothing: a column that would be empty is left out."""
    return [name] if any(timing.get(name) is not None for row in rows for timing in row.get("latency", ())) else []


def _throughput(row: dict[str, Any], case: Case | None) -> float | None:
    queries = _timing(row, case, "throughput_qps")
    return case[1] * queries if case and queries is not None else None


# Columns.


def _words(head: str, values: Iterable[Any]) -> Column:
    values = [None if value is None else str(value) for value in values]
    return Column("", head, values, [ABSENT if value is None else value for value in values])


def _numbers(
    group: str, head: str, values: Sequence[float | None], decimals: int | None = None, key: str = ""
) -> Column:
    decimals = _decimals(values) if decimals is None else decimals
    return Column(group, head, values, [ABSENT if value is None else f"{value:.{decimals}f}" for value in values], key)


def _decimals(values: Sequence[float | None]) -> int:
    """Return how many decimals give the smallest number three digits."""
    least = min((abs(value) for value in values if value), default=1)
    return max(0, 2 - math.floor(math.log10(least)))


def _columns(rows: Rows) -> list[Column]:
    """Return what does not depend on a tower or batch: what each row is, what it weighs, how good it is."""

    def scaled(key: str, by: float) -> list[float | None]:
        return [None if row.get(key) is None else row[key] * by for row in rows]

    columns = [_words("stage", [row["stage"] for row in rows])]
    for name in ("backend", "precision"):
        values = [row.get(name) for row in rows]
        if name == "precision" or len(set(values)) > 1:
            columns.append(_words(name, values))
    columns += [
        _numbers("params (M)", "all", scaled("params", 1e-6)),
        _numbers("params (M)", "no emb.", scaled("params_without_embeddings", 1e-6)),
        _numbers("blocks", "kept %", scaled("block_params_kept", 100), 1),
        _numbers("MACs", "(M)", scaled("macs", 1e-6)),
        _numbers("size", "(MB)", scaled("bytes", 1e-6)),
    ]
    for key in _keys(rows):
        if key == MEAN or key.endswith((*DIRECTIONS, *HEADS)):
            columns.append(_numbers(*_named(key), [row["accuracy"].get(key) for row in rows], 1, key))
    return columns


def _speed_up(rows: Rows, case: Case, group: str = "") -> Column:
    """Return the ratios paired by rounds, or of the medians where the results have no others."""
    medians = [_timing(row, case, "median_ms") for row in rows]
    paired = [_timing(row, case, "speed_up") for row in rows]
    plain = [medians[0] / own if medians[0] and own else None for own in medians]
    return _numbers(group, "speed-up", [p if q is None else q for p, q in zip(plain, paired, strict=True)], 2)


def _interval(rows: Rows, case: Case, group: str = "") -> list[Column]:
    """Return the 95 % intervals of the speed-ups, as a column where there are any."""
    lows, highs = ([_timing(row, case, f"speed_up_{end}") for row in rows] for end in ("low", "high"))
    if not any(lows):
        return []
    cells = [ABSENT if low is None else f"{low:.2f}–{high:.2f}" for low, high in zip(lows, highs, strict=True)]
    return [Column(group, "95 %", lows, cells)]


def _trust(rows: Rows, case: Case) -> str:
    """Return how far off the speed-ups of a case may be, in words."""
    ends = [[_timing(row, case, f"speed_up_{end}") for end in ("low", "high")] for row in rows[1:]]
    widths = [(high - low) / (high + low) for low, high in ends if low and high]
    return f", paired by rounds, 95 % intervals of ± {max(widths):.1%} or less" if widths else ""


def _warnings(rows: Rows) -> list[str]:
    """Return trtexec's warnings, where its limits are passed."""
    timings = [timing for row in rows for timing in row.get("latency", ())]
    unstable = [timing["cv_percent"] for timing in timings if timing.get("cv_percent", 0) > UNSTABLE]
    told = []
    if unstable:
        told.append(
            f"Unstable: the coefficient of variation is above {UNSTABLE} % in {len(unstable)} of {len(timings)} "
            f"measurements, up to {max(unstable):.0f} %: trust the ratios, which are paired, before single times."
        )
    if exact := [row["stage"] for row in rows if row.get("exact_mode")]:
        told.append(f"In ONNX Runtime's exact mode, since 8-bit weights overflow on this CPU: {', '.join(exact)}.")
    bound = [t for t in timings if t.get("enqueue_median_ms", 0) > BOUND * t["median_ms"]]
    if bound:
        told.append(f"Bound by enqueue time in {len(bound)} of {len(timings)} measurements: the host is what is slow.")
    return told


def _compared_columns(rows: Rows) -> list[Column]:
    every = [(row, case) for case in _cases(rows) for row in rows if _timing(row, case, "median_ms") is not None]

    def values(name: str) -> list[float | None]:
        return [_timing(*where, name) for where in every]

    ends = zip(values("speed_up_low"), values("speed_up_high"), strict=True)
    return [
        _words("tower", [case[0] for _, case in every]),
        _numbers("", "batch", [case[1] for _, case in every], 0),
        _words("stage", [row["stage"] for row, _ in every]),
        _numbers("latency (ms)", "median", values("median_ms")),
        _numbers("latency (ms)", "p99", values("p99_ms"), _decimals(values("median_ms"))),
        _numbers("latency (ms)", "cv %", values("cv_percent"), 1),
        _numbers("", "speed-up", values("speed_up"), 3),
        _words("95 %", [None if low is None else f"{low:.3f}-{high:.3f}" for low, high in ends]),
    ]


def _timing_columns(rows: Rows, case: Case | None) -> list[Column]:
    """Return what a tower and batch takes, and how many items it answers in a second."""
    if case is None:
        return []
    group = f"{_title(case)} (ms)"
    times = {name: [_timing(row, case, f"{name}_ms") for row in rows] for name in ("median", "p90", "p95", "p99")}
    columns = [_numbers(group, name, values, _decimals(times["median"])) for name, values in times.items()]
    columns[1:1] = [_speed_up(rows, case, group), *_interval(rows, case, group)]
    return [*columns, _numbers(group, "items/s", [_throughput(row, case) for row in rows], 0)]


def _latency_columns(rows: Rows) -> list[Column]:
    """Return every measurement of every row, in trtexec's terms."""
    every = [(row, case) for case in _cases(rows) for row in rows if _timing(row, case, "median_ms") is not None]
    stages, cases = [row["stage"] for row, _ in every], [case for _, case in every]
    names = ("min", "max", "mean", "median", "p90", "p95", "p99")
    return [
        _words("stage", stages),
        _words("tower", [tower for tower, _ in cases]),
        _numbers("", "batch", [batch for _, batch in cases], 0),
        *(_numbers("latency (ms)", name, [_timing(*where, f"{name}_ms") for where in every], 3) for name in names),
        *(
            _numbers("latency (ms)", "cv %", [_timing(*where, "cv_percent") for where in every], 1)
            for _ in _has(rows, "cv_percent")
        ),
        *(
            _numbers("enqueue (ms)", name, [_timing(*where, f"enqueue_{name}_ms") for where in every], 3)
            for _ in _has(rows, "enqueue_median_ms")
            for name in ("mean", "median", "p99")
        ),
        _numbers("throughput", "queries/s", [_timing(*where, "throughput_qps") for where in every], 0),
        _numbers("throughput", "items/s", [_throughput(*where) for where in every], 0),
        _numbers("", "queries", [_timing(*where, "iterations") for where in every], 0),
    ]


def _accuracy_columns(rows: Rows) -> list[Column]:
    """Return every metric, with its standard error where there is one."""
    columns = [_words("stage", [row["stage"] for row in rows])]
    for key in _keys(rows):
        column = _numbers(*_named(key), [row["accuracy"].get(key) for row in rows], 1, key)
        errors = _errors(rows, key)
        cells = [f"{cell} ± {e:.1f}" if e is not None else cell for cell, e in zip(column.cells, errors, strict=True)]
        columns.append(replace(column, cells=cells))
    return columns


def _errors(rows: Rows, key: str) -> list[float | None]:
    return [row.get("accuracy_se", {}).get(key) for row in rows]


# Terminal.


def _lines(columns: Sequence[Column]) -> list[str]:
    """Return two lines of heads and one per row; words stand left, numbers right."""
    blocks = []
    for group, members in _grouped(columns):
        texts = [[column.head, *column.cells] for column in members]
        widths = [max(map(len, text)) for text in texts]
        framed = f" {group} " if group and len(members) > 1 else group
        widths[-1] += max(0, len(framed) - sum(widths) - 2 * (len(widths) - 1))
        shown = [
            [cell.ljust(width) if column.is_words else cell.rjust(width) for cell in text]
            for column, text, width in zip(members, texts, widths, strict=True)
        ]
        lines = ["  ".join(cells) for cells in zip(*shown, strict=True)]
        width = len(lines[0])
        blocks.append([framed.center(width, "-") if len(members) > 1 and group else group.rjust(width), *lines])
    return ["  ".join(parts).rstrip() for parts in zip(*blocks, strict=True)]


def _for_terminal(column: Column) -> Column:
    """Shorten what is long, and keep to ASCII: not every terminal or file it is redirected to knows an arrow."""
    head = {"image→text": "i->t", "text→image": "t->i"}.get(column.head, column.head)
    return replace(column, head=head, cells=["-" if cell == ABSENT else _short(cell) for cell in column.cells])


def _grouped(columns: Sequence[Column]) -> list[tuple[str, list[Column]]]:
    return [(group, list(members)) for group, members in groupby(columns, key=lambda column: column.group)]


def _short(text: str, width: int = 24) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _fitted(columns: list[Column]) -> tuple[list[Column], list[str]]:
    """Leave accuracies out, last sets first, and first the two directions of a retrieval set. Returns both."""
    by_worth = sorted(
        (column for column in reversed(columns) if column.key),
        key=lambda column: not column.key.endswith(DIRECTIONS),
    )
    left_out = []
    while by_worth and max(map(len, _lines(columns))) > WIDTH:
        dropped = by_worth.pop(0)
        columns = [column for column in columns if column is not dropped]
        left_out.append(dropped.name)
    return columns, left_out


def _conditions_line(results: dict[str, Any]) -> str:
    """Return what the figures hold for, in a line: machine, threads, versions, date; what is not known is not told."""
    known = results["conditions"]
    backends = dict.fromkeys(row["backend"] for row in results["rows"] if row.get("backend"))
    told = [
        known.get("processor"),
        known.get("cores") and f"{known['cores']} cores",
        known.get("isa") and " ".join(known["isa"]),
        known.get("threads") and f"{known['threads']} thread{'s' * (known['threads'] != 1)}",
        *(f"{backend} {known.get(backend, '')}".strip() for backend in backends),
        known.get("clipress") and f"clipress {known['clipress']}",
        known.get("date") and str(known["date"]).replace("T", " ").replace("+00:00", " UTC"),
    ]
    return ", ".join(str(part) for part in told if part) + "."


# Page.


def _view(rows: Rows) -> dict[str, Any]:
    """Return what the page's script draws: the metrics, the cases, and which rows are on which front."""
    cases, overall = _cases(rows), _overall(rows)
    medians = [[_timing(row, case, "median_ms") for row in rows] for case in cases]
    metrics = []
    for column in sorted(_accuracy_columns(rows)[1:], key=lambda column: column.key != overall):
        points = [zip(median, column.values, strict=True) for median in medians]
        fronts = [pareto([None if None in point else point for point in case]) for case in points]
        metrics.append(_column_view(column) | {"errors": _errors(rows, column.key), "fronts": fronts})
    return {
        "rows": [{"name": row["stage"], "bytes": row["bytes"]} for row in rows],
        "columns": [_column_view(column) for column in _columns(rows)],
        "metrics": metrics,
        "cases": [
            {
                "tower": case[0],
                "batch": case[1],
                "title": _title(case),
                "medians": median,
                "columns": [_column_view(column) for column in _timing_columns(rows, case)],
            }
            for case, median in zip(cases, medians, strict=True)
        ],
        "main": cases.index(_main_case(cases)) if cases else None,
    }


def _column_view(column: Column) -> dict[str, Any]:
    return {"name": column.name, "head": column.head, "values": column.values, "cells": column.cells}


def _script_json(value: Any) -> str:
    """Return JSON that cannot end the script element it stands in, nor open a comment."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _html_table(columns: Sequence[Column], name: str, front: Sequence[int] | None = None) -> str:
    """Return a table with two rows of heads. `front` says which rows are on the Pareto front; None: there is none."""
    groups, kinds = [], []
    for group, members in _grouped(columns):
        groups.append(_cell("th" if group else "td", group, colspan=len(members), scope="colgroup" if group else None))
        kinds += ["word" if c.is_words else "first" if c is members[0] else None for c in members]
    heads = [_cell("th", c.head, kind, scope="col") for c, kind in zip(columns, kinds, strict=True)]
    body = []
    for i in range(len(columns[0].cells)):
        cells = [
            _cell(
                "td" if k else "th",
                c.cells[i],
                kind,
                c.values[i],
                scope=None if k else "row",
                style=f"--part: {c.parts[i]:.4f}" if c.parts and c.parts[i] is not None else None,
                title=c.titles[i] if c.titles else None,
            )
            for k, (c, kind) in enumerate(zip(columns, kinds, strict=True))
        ]
        kind = "" if front is None else ' class="front"' if i in front else ' class="behind"'
        body.append(f'<tr{kind} data-row="{i}">{"".join(cells)}</tr>')
    top, rows = f"<tr>{''.join(groups)}</tr><tr>{''.join(heads)}</tr>", "\n".join(body)
    return f'<table id="{escape(name)}"><thead>{top}</thead>\n<tbody>\n{rows}\n</tbody></table>'


def _cell(tag: str, text: str, kind: str | None = None, value: Any = None, **attributes: Any) -> str:
    known = {"class": kind, "data-value": value, **attributes}
    told = "".join(f' {key}="{escape(str(value))}"' for key, value in known.items() if value is not None)
    return f"<{tag}{told}>{escape(text).replace('→', '→<wbr>')}</{tag}>"


def _headline(rows: Rows, main: Case | None) -> str:
    """Return what was gained: the smallest row that keeps its accuracy, against the first."""
    first, key = rows[0], _overall(rows)
    name = f"<b>{escape(first['stage'])}</b>"
    before = first["accuracy"].get(key)
    if len(rows) > 1 and main and key is None:
        return _fastest(rows, main)
    if len(rows) == 1 or not before:
        return f"<p>{name}: there is nothing yet to compare it with.</p>"
    others = [row for row in rows[1:] if row["accuracy"].get(key) is not None]
    kept = [row for row in others if row["accuracy"][key] >= KEPT * before]
    measure = " ".join(_named(key))
    if not kept:
        return f"<p>No other model keeps {KEPT:.0%} of the accuracy of {name} ({escape(measure)}).</p>"
    best = min(kept, key=lambda row: (row["bytes"], _timing(row, main, "median_ms") or math.inf))
    after, big, small = best["accuracy"][key], first["bytes"], best["bytes"]
    slow, fast = (_timing(row, main, "median_ms") for row in (first, best))
    gains = [_times(big, small, "smaller", "larger")]
    tiles = [
        ("size of the files", _pair(big / 1e6, small / 1e6), "MB"),
        (f"accuracy ({measure})", _pair(before, after, 1), "%"),
    ]
    if main and slow and fast:
        ratio = _speed_up(rows, main).values[rows.index(best)]  # the table's: times of different rounds say less
        gains.insert(0, _times(ratio, 1.0, "faster", "slower"))
        tiles.insert(0, (f"median latency, {_title(main)}", _pair(slow, fast), "ms"))
    points = round(after - before, 1)
    change = f"{'loses' if points < 0 else 'gains'} <strong>{abs(points)} points</strong> of accuracy"
    change = change if points else "is <strong>as accurate</strong>"
    shown = "".join(
        f"<div><dt>{escape(what)}</dt><dd>{old} <i>→</i> <strong>{new}</strong> {unit}</dd></div>"
        for what, (old, new), unit in tiles
    )
    return (
        f"<p><b>{escape(best['stage'])}</b> is {' and '.join(gains)} than {name}, and {change}.</p><dl>{shown}</dl>"
        f"<p>It is the smallest model that keeps at least {KEPT:.0%} of the first one's accuracy.</p>"
    )


def _fastest(rows: Rows, main: Case) -> str:
    """Return which row is the fastest, where accuracy was not measured."""
    ratios = _speed_up(rows, main).values
    best = max(range(len(rows)), key=lambda i: ratios[i] or 0)
    name, first = (f"<b>{escape(rows[i]['stage'])}</b>" for i in (best, 0))
    if best == 0:
        return f"<p>No other model is faster than {first} ({_title(main)}).</p>"
    low, high = (_timing(rows[best], main, f"speed_up_{end}") for end in ("low", "high"))
    sure = f" (95 %: {low:.2f} to {high:.2f})" if low and high else ""
    return (
        f"<p>{name} is <strong>{ratios[best]:.2f} times as fast</strong> as {first}{sure}, {_title(main)}.</p>"
        "<p>Accuracy was not measured.</p>"
    )


def _verdicts(told: Sequence[dict[str, Any]]) -> str:
    """Return whether INT8 and 2:4 pay here, a line each."""
    kinds = {True: "yes", False: "no", None: "unsure"}
    lines = (f'<li class="{kinds[verdict["faster"]]}">{escape(verdict["text"])}</li>' for verdict in told)
    return f'<ul id="verdicts">{"".join(lines)}</ul>' if told else ""


def _layers(rows: Rows) -> str:
    """Return parameters and MACs per layer, models of the same shapes in one column."""
    alike: dict[str, tuple[list[str], dict[tuple[str, str], dict[str, Any]]]] = {}
    for row in rows:
        if layers := row.get("layers"):
            found = alike.setdefault(json.dumps(layers), ([], {(one["tower"], one["name"]): one for one in layers}))
            found[0].append(row["stage"])
    if not alike:
        return "<p>The results hold no costs per layer.</p>"
    names = list(dict.fromkeys(name for _, layers in alike.values() for name in layers))
    columns = [_words("layer", [name for _, name in names]), _words("tower", [tower for tower, _ in names])]
    for key, unit, head in (("params", 1e-3, "parameters (k)"), ("macs", 1e-6, "MACs (M)")):
        shown = [[layers.get(name, {}).get(key) for name in names] for _, layers in alike.values()]
        # bars compare blocks: an embedding table would dwarf them all
        blocks = [v for column in shown for (_, name), v in zip(names, column, strict=True) if v and name != "all else"]
        most = max(blocks, default=1)
        for (stages, _), exact in zip(alike.values(), shown, strict=True):
            values = [None if value is None else value * unit for value in exact]
            titles = ["" if value is None else f"{value:,} {head.split(' ')[0]}" for value in exact]
            parts = [None if value is None else min(value / most, 1.0) for value in exact]
            columns.append(replace(_numbers(head, ", ".join(stages), values, 2), parts=parts, titles=titles))
    return _html_table(columns, "layers")


def _profiles(rows: Rows) -> str:
    """Return where ONNX Runtime spent its time, where it was asked for."""
    told = []
    for i, row in enumerate(rows):
        for profile in row.get("profiles", ()):
            tables = []
            for kind, head in (("operators", "operator"), ("layers", "layer")):
                found = profile[kind]
                columns = [
                    _words(head, [one["name"] for one in found]),
                    _numbers("", "median (ms)", [one["median_ms"] for one in found], 3),
                    replace(
                        _numbers("", "share (%)", [one["percent"] for one in found], 1),
                        parts=[one["percent"] / 100 for one in found],
                    ),
                    _numbers("", "nodes", [one["nodes"] for one in found], 0),
                ]
                tables.append(_html_table(columns, f"profile-{i}-{profile['tower']}-{kind}"))
            title = f"{row['stage']}, {_title((profile['tower'], profile['batch']))}, {profile['queries']} queries"
            shown = "".join(f'<div class="scroll">{table}</div>' for table in tables)
            told.append(f'<details><summary>{escape(title)}</summary><div class="sheet pair">{shown}</div></details>')
    if not told:
        return "<p>Not asked for: <code>clipress bench RUN --profile</code>.</p>"
    return "".join(told)


def _times(before: float, after: float, less: str, more: str) -> str:
    ratio, word = (before / after, less) if before >= after else (after / before, more)
    return f"<strong>{ratio:.1f} times {word}</strong>"


def _pair(before: float, after: float, decimals: int | None = None) -> Sequence[str]:
    return _numbers("", "", [before, after], decimals).cells


def _lineage(rows: Rows) -> str:
    """Return each stage that led to any of the rows, once, in the order it ran."""
    records = {(record["stage"], record["hash"]): record for row in rows for record in row.get("lineage", ())}
    items = []
    for record in records.values():
        settings = [(key, value) for key, value in record.get("settings", {}).items() if value not in (None, [], {})]
        shown = "".join(f"<li>{escape(key)} <b>{escape(_text(value))}</b></li>" for key, value in settings)
        whole = escape(json.dumps(record, indent=1))
        items.append(
            f"<li><h3>{escape(str(record['stage']))} <small>{escape(str(record.get('kind', '')))}</small> "
            f"<code>{escape(str(record['hash']))}</code></h3><ul>{shown}</ul>"
            f"<details><summary>whole record</summary><pre>{whole}</pre></details></li>"
        )
    return f"<ol>{''.join(items)}</ol>" if items else "<p>The results hold no lineage.</p>"


def _definitions(known: dict[str, Any]) -> str:
    named = {re.sub(" ms$", " (ms)", key.replace("_", " ")): value for key, value in known.items()}
    pairs = (f"<div><dt>{escape(k)}</dt><dd>{escape(_text(value))}</dd></div>" for k, value in named.items())
    return f"<dl>{''.join(pairs)}</dl>"


def _text(value: Any) -> str:
    """Return a setting as people read it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        nested = any(isinstance(inner, dict) for inner in value.values())
        told = (f"{key} {_text(inner)}" for key, inner in value.items() if inner is not None)
        return ("; " if nested else ", ").join(told)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    return str(value)
