"""The table of a study, as Markdown: mean ± standard deviation over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import mean, median, stdev
from typing import Any, NamedTuple

from clipress.studies.study import Study, StudyRow, TimedSteps

LATENCIES = (0.7, 0.5, 0.35, 0.25, 0.18)
"""Where methods are compared at equal latency, as parts of the dense teacher's."""


class Point(NamedTuple):
    """One way of getting small: a method at a ratio, in one precision."""

    method: str
    ratio: str
    precision: str
    latency: float
    """As a part of the dense teacher's."""
    r1: float


def recall(accuracy: Mapping[str, float]) -> float:
    """Return the mean R@1 of both directions over all retrieval sets."""
    return mean(value for key, value in accuracy.items() if key.endswith(("/text_r1", "/image_r1")))


def _top1(accuracy: Mapping[str, float]) -> float:
    """Return the mean top-1 over all classification sets; NaN if there are none."""
    return mean([value for key, value in accuracy.items() if key.endswith("/top1")] or [math.nan])


def lost(row: StudyRow, when: str) -> float:
    """Return the points of mean R@1 lost against the dense teacher, `slimmed` or `final`."""
    return recall(row.dense) - recall(getattr(row, when))


def summary(study: Study, rows: Sequence[StudyRow]) -> list[dict[str, Any]]:
    """Return mean and standard deviation over seeds of what is compared, per ratio and method."""
    gathered = []
    for ratio in study.ratios or [None]:
        for method in study.methods:
            mine = [row for row in rows if (row.ratio, row.method) == (ratio, method)]
            if not mine:
                continue
            columns = {
                "macs_m": [row.macs / 1e6 for row in mine],
                "latency_of_dense": [row.latency_of_dense for row in mine],
                "peak_memory_mb": [row.peak_memory_mb for row in mine],
            }
            for when in ("slimmed", "final", "int8"):
                has = getattr(mine[0], when) is not None
                columns |= {
                    f"r1_{when}": [recall(getattr(row, when)) for row in mine] if has else [math.nan],
                    f"lost_{when}": [lost(row, when) for row in mine] if has else [math.nan],
                    f"top1_{when}": [_top1(getattr(row, when)) for row in mine] if has else [math.nan],
                }
            columns["int8_latency_of_dense"] = [row.int8_latency_of_dense or math.nan for row in mine]
            spread = {key: _mean_and_deviation(values) for key, values in columns.items()}
            gathered.append({"ratio": ratio, "method": method, "seeds": len(mine), **spread})
    return gathered


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    average = mean(values)
    return average, None if len(values) == 1 or math.isnan(average) else stdev(values)


def markdown(
    study: Study,
    rows: Sequence[StudyRow],
    conditions: Mapping[str, Any],
    cost: Sequence[TimedSteps] = (),
) -> str:
    """Return the table; below it, what a training step costs."""
    dense = rows[0].dense
    top1 = "" if math.isnan(_top1(dense)) else f", zero-shot top-1 {_top1(dense):.1f} %"
    lines = [
        f"# Study: {study.name}",
        "",
        f"Dense teacher: mean R@1 {recall(dense):.1f} %{top1}. R@1 is the mean of both directions on the test split, over the "
        "seeds ± standard deviation.",
        "",
        *(_pruning_table if study.ratios else _training_table)(study, summary(study, rows)),
    ]
    if any(row.int8 for row in rows):
        lines += ["", *_latency_table(study, points(study, rows))]
    if cost:
        lines += ["", f"Cost of a training step: median of a round, {study.step_cost.rounds} rounds in turns.", ""]
        lines += [
            f"| training | s/step | of {study.step_cost.reference}'s: median (range) | peak MB |",
            "|---|---|---|---|",
        ]
        for row in cost:
            spread = f"{median(row.ratios):.2f} ({min(row.ratios):.2f}–{max(row.ratios):.2f})"
            lines.append(f"| {row.case} | {median(row.seconds):.3f} | {spread} | {row.peak_memory_mb:.0f} |")
    lines += ["", "Conditions: " + ", ".join(f"{key} {value}" for key, value in conditions.items()) + "."]
    return "\n".join(lines) + "\n"


def _pruning_table(study: Study, table: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "*Lost* is in points of R@1 against the dense teacher. Latency: ONNX Runtime, median of both towers at the largest "
        "batch, against the dense teacher measured in turns with it.",
        "",
        f"| ratio | method | seeds | R@1 slimmed | R@1 recovered | lost slimmed | lost recovered | than {study.reference} | "
        "top-1 slimmed | top-1 recovered | R@1 INT8 | MACs (M) | latency | latency INT8 | peak MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    reference = {row["ratio"]: row for row in table if row["method"] == study.reference}
    for row in table:
        base = reference.get(row["ratio"])
        better = _against(row["r1_final"], base["r1_final"]) if base and row is not base else "–"
        cells = [_in_words(row[key], 1) for key in ("r1_slimmed", "r1_final", "lost_slimmed", "lost_final")]
        rest = [_in_words(row[key], 1) for key in ("top1_slimmed", "top1_final", "r1_int8", "macs_m")]
        rest += [_in_words(row[key], 3) for key in ("latency_of_dense", "int8_latency_of_dense")]
        rest.append(_in_words(row["peak_memory_mb"], 0))
        lines.append("| " + " | ".join([row["ratio"], row["method"], str(row["seeds"]), *cells, better, *rest]) + " |")
    return lines


def points(study: Study, rows: Sequence[StudyRow]) -> list[Point]:
    """Return what every method reaches at every ratio, recovered and in INT8: means over seeds."""
    found = []
    for row in summary(study, rows):
        for precision, r1, latency in (("fp32", "r1_final", ""), ("int8", "r1_int8", "int8_")):
            if not math.isnan(row[r1][0]):
                at = row[f"{latency}latency_of_dense"][0]
                found.append(Point(row["method"], row["ratio"], precision, at, row[r1][0]))
    return found


def front(of: Sequence[Point]) -> list[Point]:
    """Return the points that no other one beats in both latency and accuracy, fastest first."""
    best: list[Point] = []
    for point in sorted(of, key=lambda one: (one.latency, -one.r1)):
        if not best or point.r1 > best[-1].r1:
            best.append(point)
    return best


def at_latency(of: Sequence[Point], latency: float) -> float:
    """Return the accuracy of a method at a latency: linear between its points in the logarithm of the latency.

    NaN outside of them.
    """
    line = sorted((point.latency, point.r1) for point in of)
    for (x0, y0), (x1, y1) in pairwise(line):
        if x0 <= latency <= x1:
            part = math.log(latency / x0) / math.log(x1 / x0) if x1 > x0 else 0.0
            return y0 + part * (y1 - y0)
    return math.nan


def _latency_table(study: Study, found: Sequence[Point]) -> list[str]:
    lines = [
        "R@1 at equal latency: between two ratios of a method, by the logarithm of their latencies; outside of them, –.",
        "",
        "| method | precision | " + " | ".join(f"{latency:g} of dense" for latency in LATENCIES) + " |",
        "|---|---|" + "---|" * len(LATENCIES),
    ]
    for method in study.methods:
        for precision in ("fp32", "int8"):
            own = [point for point in found if (point.method, point.precision) == (method, precision)]
            cells = [_in_words((at_latency(own, latency), None), 1) for latency in LATENCIES]
            if own:
                lines.append(f"| {method} | {precision} | " + " | ".join(cells) + " |")
    best = [f"{p.method} {p.ratio} {p.precision} ({p.latency:.3f}: {p.r1:.1f})" for p in front(found)]
    return [*lines, "", "Pareto front, fastest first, latency and R@1: " + ", ".join(best) + "."]


def _training_table(study: Study, table: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        f"*Better by*: points against {study.reference}, and in standard deviations (of both methods, pooled).",
        "",
        "| method | seeds | R@1 | better by | top-1 | better by | peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    base = next((row for row in table if row["method"] == study.reference), None)
    for row in table:
        cells = [row["method"], str(row["seeds"])]
        for key in ("r1_final", "top1_final"):
            cells += [_in_words(row[key], 1), _against(row[key], base[key]) if base and row is not base else "–"]
        lines.append("| " + " | ".join([*cells, _in_words(row["peak_memory_mb"], 0)]) + " |")
    return lines


def _against(own: tuple[float, float | None], base: tuple[float, float | None]) -> str:
    gain = own[0] - base[0]
    pooled = math.sqrt(((own[1] or 0.0) ** 2 + (base[1] or 0.0) ** 2) / 2)
    return f"{gain:+.1f}" + (f" ({gain / pooled:+.1f} sd)" if pooled else "")


def _in_words(value: tuple[float, float | None], decimals: int) -> str:
    average, spread = value
    if math.isnan(average):
        return "–"
    return f"{average:.{decimals}f}" + ("" if spread is None else f" ± {spread:.{decimals}f}")
