"""The chart of a pruning study, as SVG: R@1 after recovery against measured latency, one line per method.

Filled marks are fp32, open ones INT8; the grey staircase joins the points that no other one beats in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from clipress.studies.study import Study, StudyRow
from clipress.studies.table import Point, front, points, recall

COLOURS = ("#6b6b6b", "#a08a10", "#2a8a4a", "#0b62c4", "#5aa0e8", "#8a2a7a", "#c4510b", "#d0607a", "#20a0a0", "#705030")
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 900, 520, 70, 24, 690, 450
TICKS = (0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
Place = Callable[[float, float], tuple[float, float]]
"""Latency, as a part of the dense teacher's, and R@1 -> coordinates in the chart."""


def draw_chart(study: Study, rows: Sequence[StudyRow]) -> str:
    """Draw the chart. The axis of latencies is logarithmic."""
    found, dense = points(study, rows), recall(rows[0].dense)
    high = max([point.r1 for point in found] + [dense]) + 2
    low = max(min(point.r1 for point in found) - 2, 0.0)
    left = min([point.latency for point in found] + [0.9]) / 1.1
    right = max([point.latency for point in found] + [1.0]) * 1.1

    def at(latency: float, r1: float) -> tuple[float, float]:
        x = math.log(latency / left) / math.log(right / left)
        return LEFT + (RIGHT - LEFT) * x, TOP + (BOTTOM - TOP) * (high - r1) / (high - low)

    middle, above = (LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        *_axes(at, (low, high), left, dense),
        _staircase(at, front(found)),
        *_lines(at, study, found),
        f'<text x="{middle:.0f}" y="{BOTTOM + 42}" text-anchor="middle">latency, of the dense teacher</text>',
        f'<text x="20" y="{above:.0f}" transform="rotate(-90 20 {above:.0f})" text-anchor="middle">mean R@1 (%)</text></svg>',
    ]
    return "\n".join(parts) + "\n"


def _axes(at: Place, span: tuple[float, float], left: float, dense: float) -> list[str]:
    """Draw the grid, the ticks, and the dense teacher."""
    parts = []
    step = 5 if span[1] - span[0] < 60 else 10
    for tick in range(math.ceil(span[0] / step) * step, int(span[1]) + 1, step):
        _, y = at(1.0, tick)
        parts.append(
            f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick}</text>'
        )
    for tick in TICKS:
        if tick > left:
            x, _ = at(tick, span[0])
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{BOTTOM}" y2="{BOTTOM + 5}" stroke="#888"/>'
                f'<text x="{x:.1f}" y="{BOTTOM + 20}" text-anchor="middle">{tick:g}</text>'
            )
    x, y = at(1.0, dense)
    label = f'<text x="{x - 8:.1f}" y="{y - 8:.1f}" text-anchor="end">dense teacher</text>'
    return [*parts, f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"/>{label}']


def _staircase(at: Place, best: Sequence[Point]) -> str:
    """Draw what is the best accuracy up to every latency."""
    corners = []
    for number, point in enumerate(best):
        x, y = at(point.latency, point.r1)
        if number:
            corners.append(f"{x:.1f},{at(1.0, best[number - 1].r1)[1]:.1f}")
        corners.append(f"{x:.1f},{y:.1f}")
    return f'<path d="M{" L".join(corners)}" fill="none" stroke="#ccc" stroke-width="7" stroke-linejoin="round"/>'


def _lines(at: Place, study: Study, found: Sequence[Point]) -> list[str]:
    """Draw a line per method and precision, and the legend."""
    parts = []
    for place, (method, colour) in enumerate(zip(study.methods, COLOURS * 3, strict=False)):
        for precision, dash, fill in (("fp32", "none", colour), ("int8", "4 3", "white")):
            own = [point for point in found if (point.method, point.precision) == (method, precision)]
            if not own:
                continue
            placed = [(*at(point.latency, point.r1), point) for point in own]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in placed)
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6" stroke-dasharray="{dash}"/>'
            )
            for x, y, point in placed:
                tip = f"{method}, {point.ratio}, {precision}: {point.latency:.3f} of dense, R@1 {point.r1:.1f}"
                parts.append(
                    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="{colour}" stroke-width="1.6"><title>{tip}</title></circle>'
                )
        y = TOP + 20 + 20 * place
        parts.append(f'<circle cx="{RIGHT + 28}" cy="{y - 4}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{RIGHT + 40}" y="{y}" fill="{colour}" font-weight="bold">{method}</text>')
    y = TOP + 36 + 20 * len(study.methods)
    notes = ["filled: fp32, open: INT8", "grey: best up to that latency"]
    if len(study.ratios) > 1:
        notes.append("ratios: " + ", ".join(study.ratios))
    return parts + [
        f'<text x="{RIGHT + 22}" y="{y + 18 * n}" fill="#555">{note}</text>' for n, note in enumerate(notes)
    ]
