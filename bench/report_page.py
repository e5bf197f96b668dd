"""Results -> one HTML page that needs no other file: tables, and with JavaScript a chart.

The page's script only draws and sorts what it is given; report_columns.py chooses and rounds the figures.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from clipress.bench.report_columns import (
    Column,
    accuracy_columns,
    grouped,
    latency_columns,
    model_columns,
    standard_errors,
    timing_columns,
)
from clipress.bench.report_headline import headline
from clipress.bench.report_layers import layer_columns, profile_tables
from clipress.bench.report_rows import Rows, cases_of, main_case, overall_key, timed, unread_line, with_means
from clipress.bench.results import Case, Conditions, Results, Verdict

TEMPLATE = Path(__file__).with_name("report.html")


def pareto(points: Sequence[tuple[float, float] | None]) -> list[int]:
    """Return which `(cost, gain)` points no other point beats: none is as cheap and as good, and better in one of both.

    Of equal points, all are returned; None is no point.
    """

    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a != b and a[0] <= b[0] and a[1] >= b[1]

    found = [(i, point) for i, point in enumerate(points) if point is not None]
    return [i for i, point in found if not any(beats(other, point) for _, other in found)]


def render_page(results: Results, subtitle: str) -> str:
    """Return the page. Without JavaScript it has the tables alone."""
    rows = with_means(results.rows)
    cases = cases_of(rows)
    main = main_case(cases)
    view = _view(rows, cases, main)
    front = view["metrics"][0]["fronts"][view["main"]] if view["metrics"] and main else []
    layers = layer_columns(rows)
    parts = {
        "title": escape(results.conditions.recipe or "results"),
        "subtitle": escape(subtitle),
        "headline": headline(rows, main),
        "verdicts": _verdicts(results.verdicts),
        "unread": f'<p class="note" id="unread">{escape(unread)}</p>' if (unread := unread_line(results)) else "",
        "data": _script_json(view),
        "table": html_table([*model_columns(rows), *timing_columns(rows, main)], "main", front),
        "latency": html_table(latency_columns(rows), "latency"),
        "accuracy": html_table(accuracy_columns(rows), "accuracy"),
        "layers": html_table(layers, "layers") if layers else "<p>The results hold no costs per layer.</p>",
        "profiles": _profiles(rows),
        "lineage": _lineage(rows),
        "conditions": _definitions(results.conditions),
    }
    # in one pass, so that nothing inserted can be mistaken for a placeholder
    return re.sub("@@([a-z]+)@@", lambda place: parts[place[1]], TEMPLATE.read_text(encoding="utf-8"))


def _view(rows: Rows, cases: Sequence[Case], main: Case | None) -> dict[str, Any]:
    """Return what the page's script draws: the metrics, the cases, and which rows are on which front."""
    overall = overall_key(rows)
    medians = [[timed(row, case, "median_ms") for row in rows] for case in cases]
    metrics = []
    for column in sorted(accuracy_columns(rows)[1:], key=lambda column: column.key != overall):
        points = [zip(median, column.values, strict=True) for median in medians]
        fronts = [pareto([None if None in point else point for point in case]) for case in points]
        metrics.append(_column_view(column) | {"errors": standard_errors(rows, column.key), "fronts": fronts})
    return {
        "rows": [{"name": row.stage, "bytes": row.bytes} for row in rows],
        "columns": [_column_view(column) for column in model_columns(rows)],
        "metrics": metrics,
        "cases": [
            {
                "tower": case.graph,
                "size": f"{case.batch}, {case.ids} ids" if case.ids else str(case.batch),
                "title": str(case),
                "medians": median,
                "columns": [_column_view(column) for column in timing_columns(rows, case)],
            }
            for case, median in zip(cases, medians, strict=True)
        ],
        "main": None if main is None else cases.index(main),
    }


def _column_view(column: Column) -> dict[str, Any]:
    return {"name": column.name, "head": column.head, "values": column.values, "cells": column.cells}


def _script_json(value: Any) -> str:
    """Return JSON that can neither end the script element that contains it, nor open a comment."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def html_table(columns: Sequence[Column], name: str, front: Sequence[int] | None = None) -> str:
    """Return a table with two rows of heads. `front` lists the rows on the Pareto front; None: the table has none."""
    groups, kinds = [], []
    for group, members in grouped(columns):
        groups.append(_cell("th" if group else "td", group, colspan=len(members), scope="colgroup" if group else None))
        kinds += ["word" if c.is_words else "first" if c is members[0] else None for c in members]
    heads = [_cell("th", c.head, kind, scope="col") for c, kind in zip(columns, kinds, strict=True)]
    body = []
    for i in range(len(columns[0].cells)):
        cells = [_body_cell(c, i, kind, k == 0) for k, (c, kind) in enumerate(zip(columns, kinds, strict=True))]
        kind = "" if front is None else ' class="front"' if i in front else ' class="behind"'
        body.append(f'<tr{kind} data-row="{i}">{"".join(cells)}</tr>')
    top, rows = f"<tr>{''.join(groups)}</tr><tr>{''.join(heads)}</tr>", "\n".join(body)
    return f'<table id="{escape(name)}"><thead>{top}</thead>\n<tbody>\n{rows}\n</tbody></table>'


def _body_cell(column: Column, i: int, kind: str | None, is_head: bool) -> str:
    return _cell(
        "th" if is_head else "td",
        column.cells[i],
        kind,
        column.values[i],
        scope="row" if is_head else None,
        style=f"--part: {column.parts[i]:.4f}" if column.parts and column.parts[i] is not None else None,
        title=column.titles[i] if column.titles else None,
    )


def _cell(tag: str, text: str, kind: str | None = None, value: Any = None, **attributes: Any) -> str:
    known = {"class": kind, "data-value": value, **attributes}
    written = "".join(f' {key}="{escape(str(value))}"' for key, value in known.items() if value is not None)
    return f"<{tag}{written}>{escape(text).replace('→', '→<wbr>')}</{tag}>"


def _verdicts(verdicts: Sequence[Verdict]) -> str:
    """Return whether INT8 and 2:4 pay off here, a line each."""
    kinds = {True: "yes", False: "no", None: "unsure"}
    lines = (f'<li class="{kinds[verdict.faster]}">{escape(verdict.text)}</li>' for verdict in verdicts)
    return f'<ul id="verdicts">{"".join(lines)}</ul>' if verdicts else ""


def _profiles(rows: Rows) -> str:
    """Return where ONNX Runtime spent its time, if it was profiled."""
    shown = []
    for title, tables in profile_tables(rows):
        sheets = "".join(f'<div class="scroll">{html_table(columns, name)}</div>' for name, columns in tables.items())
        shown.append(f'<details><summary>{escape(title)}</summary><div class="sheet pair">{sheets}</div></details>')
    return "".join(shown) or "<p>Not profiled. To add it: <code>clipress bench RUN --profile</code>.</p>"


def _lineage(rows: Rows) -> str:
    """Return each stage that led to any of the rows, once, in the order they ran."""
    records = {(record.stage, record.hash): record for row in rows for record in row.lineage}
    items = []
    for record in records.values():
        whole = record.model_dump(mode="json", exclude_unset=True)
        settings = [(key, value) for key, value in whole.get("settings", {}).items() if value not in (None, [], {})]
        shown = "".join(f"<li>{escape(key)} <b>{escape(_text(value))}</b></li>" for key, value in settings)
        items.append(
            f"<li><h3>{escape(record.stage)} <small>{escape(record.kind or '')}</small> "
            f"<code>{escape(record.hash)}</code></h3><ul>{shown}</ul>"
            f"<details><summary>whole record</summary><pre>{escape(json.dumps(whole, indent=1))}</pre></details></li>"
        )
    return f"<ol>{''.join(items)}</ol>" if items else "<p>The results hold no lineage.</p>"


def _definitions(conditions: Conditions) -> str:
    named = {re.sub(" ms$", " (ms)", key.replace("_", " ")): value for key, value in conditions.known().items()}
    pairs = (f"<div><dt>{escape(k)}</dt><dd>{escape(_text(value))}</dd></div>" for k, value in named.items())
    return f"<dl>{''.join(pairs)}</dl>"


def _text(value: Any) -> str:
    """Return a setting as text for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        nested = any(isinstance(inner, dict) for inner in value.values())
        parts = (f"{key} {_text(inner)}" for key, inner in value.items() if inner is not None)
        return ("; " if nested else ", ").join(parts)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    return str(value)
