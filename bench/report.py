"""Results -> the table that is printed and the page that is written."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from clipress.bench.report_columns import (
    ABSENT,
    Column,
    compared_columns,
    grouped,
    model_columns,
    number_column,
    speed_up_column,
)
from clipress.bench.report_page import render_page
from clipress.bench.report_rows import (
    DIRECTIONS,
    MEAN,
    Rows,
    cases_of,
    main_case,
    timed,
    timings,
    unread_line,
    with_means,
)
from clipress.bench.results import Case, Results
from clipress.storage import write_text_whole

WIDTH = 118  # columns of a terminal
UNSTABLE = 2.5  # percent of variation above which trtexec warns
BOUND = 0.8  # Fraction of the latency above which trtexec calls a query bound by enqueue time.


def table(results: Results) -> str:
    """Return the rows as plain text of at most 118 columns, with the conditions and verdicts below them."""
    rows = with_means(results.rows)
    cases = cases_of(rows)
    main = main_case(cases)
    columns = [column for column in model_columns(rows) if column.key != MEAN]
    notes = []
    if main:
        for case in dict.fromkeys([cases[0], main]):
            medians = [timed(row, case, "median_ms") for row in rows]
            columns.append(number_column(f"{case.graph} (ms)", f"batch {case.batch}", medians))
        columns.append(speed_up_column(rows, main))
        notes.append(f"Latency: median; speed-up: against {rows[0].stage} at batch {main.batch}{_trust(rows, main)}.")
        notes += _warnings(rows)
    columns, left_out = _fitted([_for_terminal(column) for column in columns])
    if left_out:
        notes.append(f"Left out for width: {', '.join(left_out)}.")
    about = [describe_conditions(results)]
    if any(column.head == "i->t" for column in columns):
        about.append("R@1 (%): i->t a text found for an image, t->i an image found for a text.")
    unread = unread_line(results)
    notes = [*about, *([unread] if unread else []), *notes, *(one.text for one in (*results.verdicts, *results.kept))]
    return "\n".join([*_lines(columns), "", *(line for note in notes for line in textwrap.wrap(note, WIDTH))])


def comparison(results: Results) -> str:
    """Return every graph and batch of every row against the first row, as plain text."""
    columns = [_for_terminal(column) for column in compared_columns(results.rows)]
    fewest = min(timing.rounds for timing in timings(results.rows))
    note = (
        f"speed-up: against {results.rows[0].stage}, {fewest} rounds or more; above 1 is faster; no difference seen where "
        "the interval includes 1."
    )
    return "\n".join(["", *_lines(columns), "", note])


def write_report(results: Results, folder: Path) -> Path:
    """Write report.html into a folder."""
    path = folder / "report.html"
    write_text_whole(path, report_page(results))
    return path


def report_page(results: Results) -> str:
    """Return one HTML page that needs no other file."""
    return render_page(results, describe_conditions(results))


def describe_conditions(results: Results) -> str:
    """Return what the figures hold for, in a line: machine, threads, versions, date; what is not known is left out."""
    known = results.conditions
    versions = known.known()
    backends = dict.fromkeys(row.backend for row in results.rows if row.backend)
    parts = [
        known.processor,
        known.cores and f"{known.cores} cores",
        " ".join(known.isa),
        known.threads and f"{known.threads} thread{'s' * (known.threads != 1)}",
        *(f"{backend} {versions.get(backend, '')}".strip() for backend in backends),
        known.clipress and f"clipress {known.clipress}",
        known.date and known.date.replace("T", " ").replace("+00:00", " UTC"),
    ]
    return ", ".join(str(part) for part in parts if part) + "."


def _trust(rows: Rows, case: Case) -> str:
    """Return how far off the speed-ups of a case may be, in words."""
    ends = [[timed(row, case, f"speed_up_{end}") for end in ("low", "high")] for row in rows[1:]]
    widths = [(high - low) / (high + low) for low, high in ends if low and high]
    return f", paired by rounds, 95 % intervals of ± {max(widths):.1%} or less" if widths else ""


def _warnings(rows: Rows) -> list[str]:
    """Return trtexec's warnings, where its limits are exceeded."""
    every = timings(rows)
    unstable = [timing.cv_percent for timing in every if (timing.cv_percent or 0) > UNSTABLE]
    warnings = []
    if unstable:
        warnings.append(
            f"Unstable: the coefficient of variation is above {UNSTABLE} % in {len(unstable)} of {len(every)} "
            f"measurements, up to {max(unstable):.0f} %: trust the ratios, which are paired, before single times."
        )
    if exact := [row.stage for row in rows if row.exact_mode]:
        warnings.append(f"In ONNX Runtime's exact mode, since 8-bit weights overflow on this CPU: {', '.join(exact)}.")
    if bound := [timing for timing in every if (timing.enqueue_median_ms or 0) > BOUND * timing.median_ms]:
        warnings.append(
            f"Bound by enqueue time in {len(bound)} of {len(every)} measurements: the host is what is slow."
        )
    return warnings


def _lines(columns: Sequence[Column]) -> list[str]:
    """Return two lines of heads and one per row; words are aligned left, numbers right."""
    blocks = []
    for group, members in grouped(columns):
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
    """Shorten long cells, and keep to ASCII: not every terminal, or file that output goes to, can show an arrow."""
    head = {"image→text": "i->t", "text→image": "t->i"}.get(column.head, column.head)
    return replace(column, head=head, cells=["-" if cell == ABSENT else _short(cell) for cell in column.cells])


def _short(text: str, width: int = 24) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _fitted(columns: list[Column]) -> tuple[list[Column], list[str]]:
    """Leave out accuracies that do not fit: last sets first, and the two directions of a retrieval set before its mean.

    Returns the columns that remain, and the names of those left out.
    """
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
