"""The chart of a pruning study, as SVG: R@1 after recovery against latency, one line per method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from clipress.studies.study import Study, StudyRow
from clipress.studies.table import recall, summary

COLOURS = ("#0b62c4", "#c4510b", "#6b6b6b", "#2a8a4a", "#8a2a7a", "#a08a10")
Point = tuple[float, float, str]
"""Latency as a part of the dense teacher's, R@1, name of the ratio."""
Place = Callable[[float, float], tuple[float, float]]
"""Latency and R@1 -> coordinates in the chart."""


def draw_chart(study: Study, rows: Sequence[StudyRow]) -> str:
    """Draw the chart."""
    table = summary(study, rows)
    lines = {method: _points(table, method) for method in study.methods}
    points = [point for line in lines.values() for point in line]
    dense = recall(rows[0].dense)
    low = min([recovered for _, recovered, _ in points] + [dense]) - 2
    right = max([latency for latency, _, _ in points] + [1.0]) * 1.02

    def at(x: float, y: float) -> tuple[float, float]:
        return 70 + 600 * x / right, 30 + 340 * (dense + 2 - y) / (dense + 2 - low)

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 440" font-family="sans-serif" font-size="13">',
        '<rect width="720" height="440" fill="white"/>',
        *_axes(at, low, dense),
        *_lines(at, lines),
        '<text x="370" y="408" text-anchor="middle">latency, of the dense teacher</text>',
        '<text x="20" y="200" transform="rotate(-90 20 200)" text-anchor="middle">mean R@1 after recovery (%)</text></svg>',
    ]
    return "\n".join(parts) + "\n"


def _points(table: Sequence[Mapping[str, Any]], method: str) -> list[Point]:
    own = [row for row in table if row["method"] == method]
    return sorted((row["latency_of_dense"][0], row["r1_final"][0], row["ratio"]) for row in own)


def _axes(at: Place, low: float, dense: float) -> list[str]:
    """Draw the grid, the ticks, and the dense teacher."""
    parts = []
    for tick in range(int(low // 5 + 1) * 5, int(dense + 2) + 1, 5):
        _, y = at(0, tick)
        parts.append(
            f'<line x1="70" x2="670" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
            f'<text x="62" y="{y + 4:.1f}" text-anchor="end">{tick}</text>'
        )
    for tick in (0.25, 0.5, 0.75, 1.0):
        x, _ = at(tick, 0)
        parts.append(f'<text x="{x:.1f}" y="390" text-anchor="middle">{tick}</text>')
    x, y = at(1.0, dense)
    label = f'<text x="{x - 8:.1f}" y="{y - 8:.1f}" text-anchor="end">dense teacher</text>'
    return [*parts, f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"/>{label}']


def _lines(at: Place, lines: Mapping[str, Sequence[Point]]) -> list[str]:
    """Draw a line per method, and the legend."""
    parts = []
    for points, colour in zip(lines.values(), COLOURS * 3, strict=False):
        placed = [(*at(x, y), ratio) for x, y, ratio in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in placed)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y, ratio in placed:
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'
                f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle" fill="{colour}">{ratio}</text>'
            )
    for place, (method, colour) in enumerate(zip(lines, COLOURS * 3, strict=False)):
        parts.append(f'<text x="{90 + 150 * place}" y="425" fill="{colour}" font-weight="bold">{method}</text>')
    return parts
